"""Recipes as Python values."""

import json

from pipeline.methods import registry
from pipeline.recipe import Recipe, parse_recipe


def recipe(method: str, weights: list[object], **keys: object) -> Recipe:
    """A recipe of models a, b, …, each with a weight where that is not None."""
    models = [
        {"model": f"/{chr(97 + index)}", **({} if weight is None else {"parameters": {"weight": weight}})}
        for index, weight in enumerate(weights)
    ]
    document = {"merge_method": method, "models": models, **keys}
    return parse_recipe(
        json.dumps(document), source="recipe.yaml", methods={name: m.schema for name, m in registry().items()}
    )
