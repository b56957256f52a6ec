"""Fisher merging: every parameter is the mean of the models', weighted by how much each model's likelihood feels it.

Owns the method's words; the mathematics lives in `pipeline.numerics.linear_systems`.
"""

from __future__ import annotations

from pipeline.methods.base import SystemRule, moment_weights, weight_parameter
from pipeline.recipe import MethodSchema, Parameter, Recipe
from pipeline.recipe.settings import resolve


class Fisher:
    """Σ λᵢFᵢθᵢ / Σ λᵢFᵢ, element by element; where all are zero, the weighted average."""

    schema = MethodSchema(
        name="fisher",
        parameters=(
            weight_parameter("Factor on the model's Fisher information."),
            Parameter(
                name="normalize",
                kind="boolean",
                default=False,
                per_model=False,
                constant=True,
                description="Divide each model's Fisher information by its global norm first.",
            ),
        ),
        uses_statistics=False,
        moment_keys=("average",),
        needs_moments=True,
        solves=True,
    )
    summary = "average of every parameter, weighted by the diagonal of each model's Fisher information"
    reference = "Matena & Raffel 2022 (NeurIPS), Merging models with Fisher-weighted averaging"

    def weights(self, recipe: Recipe) -> tuple[float, ...]:
        """Return the factors on the models' diagonals."""
        return moment_weights(recipe, self.schema)

    def rule(self, recipe: Recipe) -> SystemRule:
        """Return the quotient, with or without normalisation."""
        normalize = resolve(recipe, self.schema, "normalize", model=None, tensor="", layer=None, layers=0)
        return SystemRule(objective="diagonal", rule="quotient", normalize=bool(normalize))


METHOD = Fisher()
