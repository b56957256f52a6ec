"""What a merge method is to the engine.

Owns the protocols. The first two shapes end in coefficients: each group of tensors is written as Σ cᵢ·modelᵢ. The third
solves a linear system for every tensor that it has second moments of. Legend: N models.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.errors import Problem, RecipeError
from pipeline.numerics.geometric_median import MedianSolution
from pipeline.numerics.streamed_median import Measured, Probe
from pipeline.recipe import MethodSchema, Parameter, Recipe
from pipeline.recipe.settings import model_numbers, resolve
from pipeline.recipe.values import without_credentials

# Keys of `pipeline:` that have a meaning where a system leaves directions to where it starts.
START_KEYS = ("start", "start_scale", "average")
# Ratios of such weights, times sums of squares, are still numbers of float32.
_LARGEST_WEIGHT = 1e12


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemRule:
    """The linear system of a method: what moments it asks for, and how it is solved.

    Attributes:
        objective: "diagonal", "gram", "kfac", "block", or "weights" for moments made of the task vectors.
        rule: "quotient" and "gradient_matching" are elementwise closed forms; "direct" and "iterative" solve matrices.
        iterations: Most iterations, of an iterative one.
        tolerance: Relative residual that ends it.
        off_diagonal: Factor on what lies off the diagonal of every moment.
        normalize: Divide each model's diagonals by their global norm.
        prior: What is added to the base's diagonal.
    """

    objective: str
    rule: str
    iterations: int = 1
    tolerance: float = 1e-5
    off_diagonal: float = 1.0
    normalize: bool = False
    prior: float = 0.0


class LinearSystemMethod(Method, Protocol):
    """A method whose tensors are the solutions of (Σ Cᵢ) θ = Σ Cᵢ θᵢ; what has no moments is averaged."""

    def weights(self, recipe: Recipe) -> tuple[float, ...]:
        """Return the N positive factors on the models' moments."""
        ...

    def rule(self, recipe: Recipe) -> SystemRule:
        """Return the system.

        Raises:
            RecipeError: A parameter is out of range.
        """
        ...


def weight_parameter(description: str) -> Parameter:
    """Return the parameter `weight` of a method that weighs moments."""
    return Parameter(
        name="weight",
        kind="number",
        default=1.0,
        per_model=True,
        positive=True,
        constant=True,
        description=description,
    )


def off_diagonal_parameter() -> Parameter:
    """Return the parameter `off_diagonal`."""
    return Parameter(
        name="off_diagonal",
        kind="number",
        default=1.0,
        per_model=False,
        bounds=(0.0, 1.0),
        constant=True,
        description="Factor from 0 to 1 on what lies off the diagonal of every moment.",
    )


def moment_weights(recipe: Recipe, schema: MethodSchema) -> tuple[float, ...]:
    """Return the weight of every model's moments.

    Raises:
        RecipeError: One is so large or small that nothing would be left of the others.
    """
    return bounded_weights(recipe, schema, _LARGEST_WEIGHT)


def bounded_weights(recipe: Recipe, schema: MethodSchema, most: float) -> tuple[float, ...]:
    """Return the weight of every model.

    Args:
        recipe: The validated recipe.
        schema: The method's.
        most: The largest weight; the smallest is its inverse.

    Raises:
        RecipeError: One lies outside.
    """
    weights = model_numbers(recipe, schema, "weight")
    problems = [
        Problem(
            what=f"the weight {weight:g} does not lie between {1 / most:g} and {most:g}",
            where=f"model {without_credentials(entry.model)}",
            remedy="only ratios of weights count: scale all of them, or leave the model out",
        )
        for entry, weight in zip(recipe.models, weights, strict=True)
        if not 1 / most <= weight <= most
    ]
    if problems:
        raise RecipeError(*problems)
    return weights


def document_number(recipe: Recipe, schema: MethodSchema, name: str) -> float:
    """Return a number that the document sets for all models."""
    return float(resolve(recipe, schema, name, model=None, tensor="", layer=None, layers=0))
