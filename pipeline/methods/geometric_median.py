"""The exact geometric median of a family: argmin over m of Σ wᵢ‖xᵢ − m‖.

Owns the method's words; the mathematics lives in `pipeline.numerics`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from pipeline.methods.base import bounded_weights
from pipeline.numerics.geometric_median import MedianSolution, solve_geometric_median
from pipeline.numerics.streamed_median import Measured, Probe, streamed_median
from pipeline.recipe import MethodSchema, Parameter, Recipe

# Squares of ratios of such weights, and sums of a million, are still numbers of float64.
_LARGEST_WEIGHT = 1e75


class GeometricMedian:
    """The geometric median of whole models, blocks or tensors, with a certificate of optimality."""

    schema = MethodSchema(
        name="geometric_median",
        parameters=(
            Parameter(
                name="weight",
                kind="number",
                default=1.0,
                per_model=True,
                positive=True,
                constant=True,
                description="Weight of the model's distance in the objective; duplicates add up.",
            ),
        ),
        uses_statistics=True,
        moment_keys=("average", "metric"),
    )
    summary = "exact geometric median of the full parameter vector, certified; robust against broken models"
    reference = "Gupta & Gupta 2024 (NeurIPS LLM merging competition); Weiszfeld 1937; Vardi & Zhang 2000"

    def weights(self, recipe: Recipe) -> tuple[float, ...]:
        """Return the weight of every model.

        Raises:
            RecipeError: One is so large or small that sums and ratios of weights leave the range of float64.
        """
        return bounded_weights(recipe, self.schema, _LARGEST_WEIGHT)

    def solve(self, distances_NN: np.ndarray, weights_N: Sequence[float], *, tolerance: float) -> MedianSolution:
        """Solve on the table of squared distances."""
        return solve_geometric_median(distances_NN, weights_N, tolerance=tolerance)

    def stream(self, weights_N: Sequence[float], *, tolerance: float) -> Generator[Probe, Measured, MedianSolution]:
        """Solve by iterations that each measure the parameters again."""
        return streamed_median(weights_N, tolerance=tolerance)


METHOD = GeometricMedian()
