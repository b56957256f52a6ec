"""RegMean: every linear layer is the least-squares fit to what the models' layers make of their own inputs.

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
from pipeline.recipe import MethodSchema, Recipe


class RegMean:
    """(Σ Aᵢ) X = Σ AᵢXᵢ with Aᵢ the Gram matrix of a layer's inputs, solved directly."""

    schema = MethodSchema(
        name="regmean",
        parameters=(
            weight_parameter("Factor on the model's input Grams."),
            off_diagonal_parameter(),
        ),
        uses_statistics=False,
        moment_keys=START_KEYS,
        needs_moments=True,
        solves=True,
    )
    summary = "least-squares fit of every linear layer to the models' outputs on their own inputs, in closed form"
    reference = "Jin et al. 2023 (ICLR), Dataless knowledge fusion by merging weights of language models"

    def weights(self, recipe: Recipe) -> tuple[float, ...]:
        """Return the factors on the models' Grams."""
        return moment_weights(recipe, self.schema)

    def rule(self, recipe: Recipe) -> SystemRule:
        """Return the direct solve of input Grams."""
        off_diagonal = document_number(recipe, self.schema, "off_diagonal")
        return SystemRule(objective="gram", rule="direct", off_diagonal=off_diagonal)


METHOD = RegMean()
