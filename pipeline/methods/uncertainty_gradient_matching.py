"""Uncertainty-based gradient matching: task arithmetic, its task vectors scaled by the models' Hessians.

Owns the method's words; the mathematics lives in `pipeline.numerics.linear_systems`.
"""

from __future__ import annotations

from pipeline.methods.base import SystemRule, document_number, moment_weights, weight_parameter
from pipeline.recipe import MethodSchema, Parameter, Recipe


class UncertaintyGradientMatching:
    """θ₀ + Σ αₜ H̄⁻¹(H₀ + Hₜ)(θₜ − θ₀) with H̄ = H₀ + Σ αₜHₜ, all of them diagonal."""

    schema = MethodSchema(
        name="uncertainty_gradient_matching",
        parameters=(
            weight_parameter("Factor on the model's task vector."),
            Parameter(
                name="data_size",
                kind="number",
                default=None,
                per_model=True,
                positive=True,
                constant=True,
                optional=True,
                description="Examples of the model's training data, which its diagonal is multiplied by; those of its"
                " statistics when absent. That of the document is the base's too.",
            ),
            Parameter(
                name="prior",
                kind="number",
                default=1e-12,
                per_model=False,
                bounds=(0.0, 1e30),
                constant=True,
                description="What is added to the base's diagonal.",
            ),
        ),
        uses_statistics=False,
        moment_keys=("base_statistics", "average"),
        needs_moments=True,
        needs_base=True,
        solves=True,
    )
    summary = "task arithmetic whose task vectors are scaled by diagonal Hessians to match the gradients of the tasks"
    reference = "Daheim et al. 2024 (ICLR), Model merging by uncertainty-based gradient matching"

    def weights(self, recipe: Recipe) -> tuple[float, ...]:
        """Return the factors on the task vectors."""
        return moment_weights(recipe, self.schema)

    def rule(self, recipe: Recipe) -> SystemRule:
        """Return the closed form with its prior."""
        prior = document_number(recipe, self.schema, "prior")
        return SystemRule(objective="diagonal", rule="gradient_matching", prior=prior)


METHOD = UncertaintyGradientMatching()
