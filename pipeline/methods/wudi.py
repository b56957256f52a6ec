"""WUDI: least interference between task vectors, with the moments taken from the weights themselves: no data.

Owns the method's words; the mathematics lives in `pipeline.numerics.linear_systems`.
"""

from __future__ import annotations

from pipeline.methods.base import START_KEYS, SystemRule, moment_weights, weight_parameter
from pipeline.recipe import MethodSchema, Recipe


class Wudi:
    """The minimiser of Σ ‖(Δ − Δₜ)Δₜᵀ‖² / ‖Δₜ‖² in closed form: RegMean with Cₜ = ΔₜᵀΔₜ / ‖Δₜ‖²."""

    schema = MethodSchema(
        name="wudi",
        parameters=(weight_parameter("Factor on the moments of the model's task vector."),),
        uses_statistics=False,
        moment_keys=START_KEYS,
        needs_base=True,
        solves=True,
    )
    summary = "data-free least interference of the task vectors of every matrix, in closed form"
    reference = "Cheng et al. 2025 (ICML), Whoever started the interference should end it"

    def weights(self, recipe: Recipe) -> tuple[float, ...]:
        """Return the factors on the models' moments."""
        return moment_weights(recipe, self.schema)

    def rule(self, recipe: Recipe) -> SystemRule:
        """Return the direct solve with moments of the task vectors."""
        return SystemRule(objective="weights", rule="direct")


METHOD = Wudi()
