"""MaTS: every block matches the models in the subspaces that matter to their tasks, by conjugate gradients.

Owns the method's words; the mathematics lives in `pipeline.numerics.linear_systems`.
"""

from __future__ import annotations

from pipeline.methods.base import (
    START_KEYS,
    SystemRule,
    document_number,
    moment_weights,
    off_diagonal_parameter,
    weight_parameter,
)
from pipeline.recipe import MethodSchema, Parameter, Recipe
from pipeline.recipe.settings import resolve


class Mats:
    """(Σ Cᵢ) θ = Σ Cᵢθᵢ, block by block, with moments of several kinds."""

    schema = MethodSchema(
        name="mats",
        parameters=(
            weight_parameter("Factor on the model's moments."),
            Parameter(
                name="objective",
                kind="word",
                default="gram",
                per_model=False,
                constant=True,
                choices=("diagonal", "gram", "kfac", "block"),
                description="Moments: diagonal Fisher, input Gram, input and output Gram (K-FAC), or whole block.",
            ),
            Parameter(
                name="iterations",
                kind="count",
                default=100,
                per_model=False,
                constant=True,
                description="Most iterations of one block; with the start they are part of the method.",
            ),
            Parameter(
                name="tolerance",
                kind="number",
                default=1e-5,
                per_model=False,
                positive=True,
                bounds=(1e-300, 1.0),
                constant=True,
                description="Relative residual that ends the iterations of a block.",
            ),
            off_diagonal_parameter(),
        ),
        uses_statistics=False,
        moment_keys=START_KEYS,
        needs_moments=True,
        solves=True,
    )
    summary = "matching of the models in their task subspaces: one linear system a block, by conjugate gradients"
    reference = "Tam, Bansal & Raffel 2024 (TMLR), Merging by matching models in task parameter subspaces"

    def weights(self, recipe: Recipe) -> tuple[float, ...]:
        """Return the factors on the models' moments."""
        return moment_weights(recipe, self.schema)

    def rule(self, recipe: Recipe) -> SystemRule:
        """Return the iteration of the objective; diagonal moments have a closed form."""

        def word(name: str) -> str:
            return str(resolve(recipe, self.schema, name, model=None, tensor="", layer=None, layers=0))

        objective = word("objective")
        return SystemRule(
            objective=objective,
            rule="quotient" if objective == "diagonal" else "iterative",
            iterations=int(word("iterations")),
            tolerance=document_number(recipe, self.schema, "tolerance"),
            off_diagonal=document_number(recipe, self.schema, "off_diagonal"),
        )


METHOD = Mats()
