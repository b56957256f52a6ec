"""Recipes: what to merge and how, in mergekit's words, read strictly.

Owns the YAML format, its checks and the evaluation of its settings. Must not know checkpoints, stores or any method:
methods hand in their `MethodSchema`, and of storage it knows what options look like.
"""

from pipeline.recipe.content import ModelEntry, NamedPatterns, PipelineSettings, Recipe
from pipeline.recipe.json_schema import recipe_schema
from pipeline.recipe.parameters import MethodSchema, Parameter
from pipeline.recipe.recipe import canonical, parse_recipe
from pipeline.recipe.references import join_model, model_key, split_model, without_credentials
from pipeline.recipe.settings import model_numbers, resolve, unused_filters

__all__ = [
    "MethodSchema",
    "ModelEntry",
    "NamedPatterns",
    "Parameter",
    "PipelineSettings",
    "Recipe",
    "canonical",
    "join_model",
    "model_key",
    "model_numbers",
    "parse_recipe",
    "recipe_schema",
    "resolve",
    "split_model",
    "unused_filters",
    "without_credentials",
]
