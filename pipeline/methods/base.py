"""What a merge method is to the engine.

Owns the protocol. Both shapes so far end in coefficients: each group of tensors is written as Σ cᵢ·modelᵢ.
Legend: N models.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np

from pipeline.numerics.geometric_median import MedianSolution
from pipeline.numerics.streamed_median import Measured, Probe
from pipeline.recipe import MethodSchema, Recipe


class Method(Protocol):
    """A merge method: its words in the recipe, its citation, and how it finds coefficients."""

    schema: MethodSchema
    summary: str
    reference: str


class FixedMethod(Method, Protocol):
    """A method whose coefficients follow from the recipe alone; nothing is measured."""

    def coefficients(self, recipe: Recipe, *, tensor: str, layer: int | None, layers: int) -> tuple[float, ...]:
        """Return the N coefficients of one tensor.

        Args:
            recipe: The validated recipe.
            tensor: The tensor's name.
            layer: Its transformer layer, or None outside layers.
            layers: How many layers the model has.

        Raises:
            RecipeError: The weights do not make a mean.
        """
        ...


class GramMethod(Method, Protocol):
    """A method whose coefficients follow from the pairwise squared distances of a group."""

    def weights(self, recipe: Recipe) -> tuple[float, ...]:
        """Return the N positive weights of the models."""
        ...

    def solve(self, distances_NN: np.ndarray, weights_N: Sequence[float], *, tolerance: float) -> MedianSolution:
        """Return the coefficients and their certificate.

        Args:
            distances_NN: Squared distances, float64.
            weights_N: Positive.
            tolerance: Largest accepted relative gap between objective and lower bound.

        Raises:
            ConvergenceError: No certificate within the tolerance.
        """
        ...

    def stream(self, weights_N: Sequence[float], *, tolerance: float) -> Generator[Probe, Measured, MedianSolution]:
        """Return the same solve as a loop that asks for distances measured from the parameters."""
        ...
