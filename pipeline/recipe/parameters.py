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
        kind: What its values are; a count is a whole number greater than zero, a word one of `choices`.
        default: The value when the recipe gives none; None makes the parameter required, unless it is optional.
        per_model: Whether each model may have its own value; otherwise the document alone may set it.
        positive: Whether numbers must be greater than zero.
        bounds: The least and the largest number; None without bounds.
        constant: Whether filters and gradients are refused: one value per model. Always so of counts and words.
        optional: Whether the method knows what to do without a value that the recipe does not give.
        choices: The words of a word.
        description: One line for people and for the editors' schema.
    """

    name: str
    kind: Literal["number", "boolean", "count", "word"]
    default: float | bool | str | None
    per_model: bool
    positive: bool = False
    bounds: tuple[float, float] | None = None
    constant: bool = False
    optional: bool = False
    choices: tuple[str, ...] = ()
    description: str

    @property
    def required(self) -> bool:
        """Whether the recipe must give a value."""
        return self.default is None and not self.optional


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSchema:
    """The name of a merge method and everything a recipe may say to it.

    Attributes:
        name: The value of `merge_method:`.
        parameters: What may stand in `parameters:`, in the order of documentation.
        uses_statistics: Whether scope, distances, scale and tolerance of `pipeline:` have a meaning.
        moment_keys: Which of the keys about second moments have a meaning, as checks.py lists them.
        needs_moments: Whether every model needs `pipeline: {statistics: ...}`.
        needs_base: Whether the recipe must name a base model.
        solves: Whether tensors are solutions of linear systems.
    """

    name: str
    parameters: tuple[Parameter, ...]
    uses_statistics: bool
    moment_keys: tuple[str, ...] = ()
    needs_moments: bool = False
    needs_base: bool = False
    solves: bool = False

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
