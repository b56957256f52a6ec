"""The weighted average of the models: the baseline that everybody knows.

Owns the method's words and its arithmetic on weights.
"""

from __future__ import annotations

from pipeline.errors import Problem, RecipeError
from pipeline.recipe import MethodSchema, Parameter, Recipe, resolve


class Linear:
    """Σ wᵢxᵢ, divided by Σ wᵢ unless `normalize` is false."""

    schema = MethodSchema(
        name="linear",
        parameters=(
            Parameter(
                name="weight",
                kind="number",
                default=1.0,
                per_model=True,
                description="Share of the model: a number, or by tensor name or layer.",
            ),
            Parameter(
                name="normalize",
                kind="boolean",
                default=True,
                per_model=False,
                description="Divide by the sum of the weights.",
            ),
        ),
        uses_statistics=False,
    )
    summary = "weighted average of the models (model soup)"
    reference = "Wortsman et al. 2022 (ICML), Model soups"

    def coefficients(self, recipe: Recipe, *, tensor: str, layer: int | None, layers: int) -> tuple[float, ...]:
        """Return the normalised weights of one tensor."""
        indices = range(len(recipe.models) + recipe.base_is_input)
        weights = [
            float(
                resolve(
                    recipe,
                    self.schema,
                    "weight",
                    model=index if index < len(recipe.models) else None,
                    tensor=tensor,
                    layer=layer,
                    layers=layers,
                )
            )
            for index in indices
        ]
        normalize = resolve(recipe, self.schema, "normalize", model=None, tensor=tensor, layer=layer, layers=layers)
        if not normalize:
            return tuple(weights)
        total = sum(weights)
        # Weights that cancel leave only their rounding errors, which normalisation would blow up.
        if abs(total) <= 1e-12 * sum(abs(weight) for weight in weights):
            raise RecipeError(
                Problem(
                    what=f"the weights sum to {total:g}, so there is no mean of them",
                    where=f"tensor {tensor}",
                    remedy="change a weight, or set parameters: {normalize: false}",
                )
            )
        return tuple(weight / total for weight in weights)


METHOD = Linear()
