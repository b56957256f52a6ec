"""Reading a recipe: YAML text in, a checked `Recipe` out, or everything that is wrong with it at once.

Owns the order of the checks and the translation of the models' errors; knows neither checkpoints nor any method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.errors import Problem, RecipeError
from pipeline.recipe.checks import MOMENT_KEYS, check_conditions, check_method, check_parameters, known_part
from pipeline.recipe.content import ModelEntry, NamedPatterns, PipelineSettings, Recipe
from pipeline.recipe.document import Path, read_document
from pipeline.recipe.findings import Findings, path_text
from pipeline.recipe.json_schema import recipe_schema
from pipeline.recipe.parameters import MethodSchema
from pipeline.recipe.references import shown
from pipeline.recipe.values import RefusalError, describe, model_key, without_credentials

__all__ = ["ModelEntry", "NamedPatterns", "PipelineSettings", "Recipe", "canonical", "parse_recipe", "recipe_schema"]

# pydantic's names of the type errors that can be left once our own readers have spoken.
_EXPECTED = {
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
}


def parse_recipe(text: str, *, source: str, methods: Mapping[str, MethodSchema]) -> Recipe:
    """Read and check a recipe.

    Args:
        text: The YAML file's content.
        source: The file's name, for messages.
        methods: All methods by name.

    Returns:
        The recipe; oddities that are legal are in its `warnings`.

    Raises:
        RecipeError: Something is wrong; the error holds every problem with file and line.
    """
    document = read_document(text, source)
    if not isinstance(document.data, dict):
        what = f"a recipe must be a mapping of keys to values, not {describe(document.data)}"
        raise RecipeError(Problem(what=what, where=f"{source}:{document.place.line}", remedy="write `key: value`"))
    findings = Findings(document)
    given = known_part(document.data, methods, findings)
    method = check_method(document.data.get("merge_method"), methods, findings)
    read = given if method is None else check_parameters(given, method, methods, findings)
    recipe = _validate(read, findings)
    check_conditions(given, method, findings)
    findings.raise_problems()
    if recipe is None:
        raise RecipeError(Problem(what="the recipe cannot be read", where=source))
    if recipe.base_is_input:
        text = "linear averages the base model too, as mergekit does, because `weight` is given for all models"
        findings.warn(("base_model",), f"{text}; give each model its own weight to leave the base out")
    return recipe.model_copy(update={"warnings": findings.warnings, **_one_spelling(recipe)})


def _one_spelling(recipe: Recipe) -> dict[str, str]:
    """Return base model and tokenizer source as `models` spells them, so that equal models are equal text."""
    spellings = {} if recipe.base_model is None else {model_key(recipe.base_model): recipe.base_model}
    spellings |= {model_key(entry.model): entry.model for entry in recipe.models}
    references = {"base_model": recipe.base_model, "tokenizer_source": recipe.tokenizer_source}
    return {
        key: spellings.get(model_key(model), model)
        for key, model in references.items()
        if model is not None and (key, model) != ("tokenizer_source", "base")
    }


def _validate(read: object, findings: Findings) -> Recipe | None:
    try:
        return Recipe.model_validate(read)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            # Entries that were refused do not count, so that a list of bad ones is called too short as well.
            if found["type"] != "too_short" or not found["input"]:
                _note(found, findings)
        return None


def _note(found: Mapping[str, Any], findings: Findings) -> None:
    """Note one of pydantic's errors in our words; the tags of unions in its path are no steps of the document."""
    path: Path = tuple(step for step in found["loc"] if step not in ("word", "sets"))
    name = path_text(path)
    reason = found.get("ctx", {}).get("error")
    if isinstance(reason, RefusalError):
        findings.add(path, f"`{name}` {reason.what}", reason.remedy)
    elif found["type"] == "too_short":
        findings.add(path, f"`{name}` is an empty list", "give at least one entry")
    elif found["type"] == "missing":
        findings.add(path, f"`{name}` is missing", f"add `{path[-1]}`")
    else:
        expected = _EXPECTED.get(found["type"])
        text = f"must be {expected}, not {describe(found['input'])}" if expected else str(found["msg"])
        findings.add(path, f"`{name}` {text}")


def canonical(recipe: Recipe) -> dict[str, object]:
    """Return a recipe as JSON-ready data with every default filled in, for fingerprints and reports.

    Args:
        recipe: A parsed recipe.

    Returns:
        The recipe's keys in a fixed order, byte counts as integers, URLs without credentials.
    """
    content = recipe.model_dump(mode="json", by_alias=True)
    for key in ("base_model", "tokenizer_source"):
        if content[key] is not None:
            content[key] = without_credentials(content[key])
    pipeline = content["pipeline"]
    # What most methods know nothing of is left out where nothing is said.
    for key in (key for key in MOMENT_KEYS if pipeline.get(key, "") is None):
        del pipeline[key]
    for place, key in ((pipeline, "base_statistics"), (pipeline, "start"), (pipeline.get("metric", {}), "statistics")):
        if key in place:
            place[key] = shown(place[key])
    for entry in content["models"]:
        entry["model"] = without_credentials(entry["model"])
        own = entry.pop("pipeline")
        if own["statistics"] is not None:
            entry["pipeline"] = {"statistics": shown(own["statistics"])}
    return content
