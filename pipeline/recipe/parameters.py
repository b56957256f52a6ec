"""What a merge method says about its parameters, so that a recipe can be checked without running the method.

Owns the two descriptions `Parameter` and `MethodSchema`; knows neither YAML nor any method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a merge method.

    Attributes:
        name: The key in `parameters:`.
        kind: What its values are.
        default: The value when the recipe gives none; None makes the parameter required.
        per_model: Whether each model may have its own value; otherwise the document alone may set it.
        positive: Whether numbers must be greater than zero.
        constant: Whether filters and gradients are refused: one value per model.
        description: One line for people and for the editors' schema.
    """

    name: str
    kind: Literal["number", "boolean"]
    default: float | bool | None
    per_model: bool
    positive: bool = False
    constant: bool = False
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSchema:
    """The name of a merge method and everything a recipe may say to it.

    Attributes:
        name: The value of `merge_method:`.
        parameters: What may stand in `parameters:`, in the order of documentation.
        uses_statistics: Whether scope, distances, scale and tolerance of `pipeline:` have a meaning.
    """

    name: str
    parameters: tuple[Parameter, ...]
    uses_statistics: bool

    def parameter(self, name: str) -> Parameter:
        """Return the parameter of that name.

        Args:
            name: One of this method's parameter names.

        Returns:
            Its description.

        Raises:
            KeyError: The method has no such parameter.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise KeyError(f"{self.name} has no parameter {name}")
