"""mergekit's settings: a number per layer, per tensor name, per model or for all.

Owns the grammar `number | [numbers] | {value, filter} | [{value, filter}, ...]`, its check and its evaluation; knows
nothing of YAML lines, checkpoints or methods.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.errors import Problem, RecipeError
from pipeline.recipe.content import Recipe
from pipeline.recipe.document import Path
from pipeline.recipe.findings import Findings, nearest, path_text
from pipeline.recipe.parameters import MethodSchema, Parameter
from pipeline.recipe.values import (
    RefusalError,
    describe,
    read_boolean,
    read_count,
    read_number,
    read_word,
    without_credentials,
)

# The filter that, like no filter, matches every tensor.
_MATCH_ALL = "*"


def read_setting(raw: object, parameter: Parameter, path: Path, findings: Findings) -> object:
    """Check one setting and return it with its numbers read.

    Args:
        raw: The YAML value.
        parameter: What it is a setting of.
        path: Where it stands.
        findings: Collects what is wrong.

    Returns:
        The same shape with floats, booleans, counts or words; None where something is wrong.
    """
    if (parameter.constant or parameter.kind in ("count", "word")) and isinstance(raw, (list, dict)):
        what = f"`{path_text(path)}` must be a single {parameter.kind}, not {describe(raw)}"
        findings.add(path, what, f"{parameter.name} is one value per model here: no filters, no gradients")
        return None
    if isinstance(raw, dict):
        return _read_rule(raw, parameter, path, findings)
    if not isinstance(raw, list):
        return _read_scalar(raw, parameter, path, findings)
    if not raw:
        findings.add(path, f"`{path_text(path)}` is an empty list", "give at least one value")
        return None
    if any(isinstance(part, dict) for part in raw):
        return [_read_rule(part, parameter, (*path, index), findings) for index, part in enumerate(raw)]
    return [_read_scalar(part, parameter, (*path, index), findings) for index, part in enumerate(raw)]


def _read_rule(raw: object, parameter: Parameter, path: Path, findings: Findings) -> object:
    if not isinstance(raw, dict):
        what = f"`{path_text(path)}` must be a mapping, not {describe(raw)}"
        findings.add(path, what, "write {value: ..., filter: ...}, or numbers only")
        return None
    for key in (key for key in raw if key not in ("value", "filter")):
        findings.add((*path, key), f"unknown key `{key}` in `{path_text(path)}`", nearest(key, _RULE_KEYS), key=True)
    rule: dict[str, object] = {}
    if "value" not in raw:
        findings.add(path, f"`{path_text(path)}` has no value", "write {value: ..., filter: ...}")
    elif isinstance(raw["value"], dict) or (isinstance(raw["value"], list) and _has_mapping(raw["value"])):
        findings.add((*path, "value"), f"`{path_text((*path, 'value'))}` must be a number or a list of numbers")
    else:
        rule["value"] = read_setting(raw["value"], parameter, (*path, "value"), findings)
    name = raw.get("filter")
    if name is not None and (not isinstance(name, str) or not name):
        what = f"`{path_text((*path, 'filter'))}` must be part of a tensor name, not {describe(name)}"
        findings.add((*path, "filter"), what, "for example mlp; leave it out to match every tensor")
    elif name is not None:
        rule["filter"] = name
    return rule


_RULE_KEYS = ("value", "filter")


def _has_mapping(values: list[object]) -> bool:
    return any(isinstance(value, dict) for value in values)


def _read_scalar(raw: object, parameter: Parameter, path: Path, findings: Findings) -> float | bool | str | None:
    try:
        if parameter.kind == "word":
            return read_word(raw, parameter.choices)
        if parameter.kind == "count":
            return read_count(raw)
        value = read_boolean(raw) if parameter.kind == "boolean" else read_number(raw)
        if parameter.positive and value <= 0:
            remedy = "leave the model out to exclude it" if parameter.per_model else ""
            raise RefusalError(f"must be greater than 0, not {describe(raw)}", remedy)
        if parameter.bounds is not None and not parameter.bounds[0] <= value <= parameter.bounds[1]:
            least, most = parameter.bounds
            remedy = "" if parameter.default is None else f"the default is {parameter.default}"
            raise RefusalError(f"must be from {least:g} to {most:g}, not {describe(raw)}", remedy)
    except RefusalError as error:
        findings.add(path, f"`{path_text(path)}` {error.what}", error.remedy)
        return None
    return value


def resolve(
    recipe: Recipe, method: MethodSchema, name: str, *, model: int | None, tensor: str, layer: int | None, layers: int
) -> float | bool | str:
    """Return the value of a parameter for one tensor of one model: the model's setting, the document's, the default.

    Args:
        recipe: A parsed recipe.
        method: The recipe's method.
        name: One of the method's parameters.
        model: Index into `recipe.models`; None asks for the document's value, which is also the base model's.
        tensor: Tensor name that filters are looked up in.
        layer: The block the tensor belongs to, from 0; None outside the blocks.
        layers: Number of blocks.

    Returns:
        The value.

    Raises:
        RecipeError: No level has a value for this tensor and the parameter is required.
    """
    parameter = method.parameter(name)
    levels = [recipe.parameters] if model is None else [recipe.models[model].parameters, recipe.parameters]
    for settings in levels:
        values = _match(settings[name], tensor) if name in settings else None
        if values is not None:
            return _at(values, _position(layer, layers))
    if parameter.default is None:
        who = "" if model is None else f" of {without_credentials(recipe.models[model].model)}"
        what = f"{name} has no value for tensor {tensor}{who}"
        raise RecipeError(Problem(what=what, remedy="add an entry without a filter after the others"))
    return parameter.default


def model_numbers(recipe: Recipe, method: MethodSchema, name: str) -> tuple[float, ...]:
    """Return the one number that each model has for a constant parameter.

    Args:
        recipe: A parsed recipe.
        method: The recipe's method.
        name: A parameter with `constant=True`.

    Returns:
        N numbers, in the order of `recipe.models`.

    Raises:
        ValueError: The parameter is not constant, so that one number does not exist.
    """
    if not method.parameter(name).constant:
        raise ValueError(f"{name} of {method.name} may differ between tensors; use resolve")
    return tuple(
        float(resolve(recipe, method, name, model=index, tensor="", layer=None, layers=0))
        for index in range(len(recipe.models))
    )


def unused_filters(recipe: Recipe, tensors: Iterable[str]) -> tuple[Problem, ...]:
    """Return a problem for every filter that no tensor name contains; mergekit is silent about those.

    Args:
        recipe: A parsed recipe.
        tensors: All tensor names of the output.

    Returns:
        Problems, none when every filter is of use.
    """
    names = list(tensors)
    places = [("parameters", recipe.parameters)]
    places += [(f"models[{index}].parameters", entry.parameters) for index, entry in enumerate(recipe.models)]
    return tuple(
        Problem(
            what=f"the filter {describe(text)} of `{place}.{name}` is part of no tensor name",
            remedy="correct the filter or leave it out",
        )
        for place, settings in places
        for name, setting in settings.items()
        for text, _ in _rules(setting)
        if text != _MATCH_ALL and not any(text in tensor for tensor in names)
    )


def _rules(setting: object) -> list[tuple[str, list[float | bool | str]]]:
    """Return a setting of any form as (filter, values) pairs."""
    if isinstance(setting, dict):
        value = setting["value"]
        return [(setting.get("filter", _MATCH_ALL), value if isinstance(value, list) else [value])]
    if isinstance(setting, list) and isinstance(setting[0], dict):
        return [pair for rule in setting for pair in _rules(rule)]
    return [(_MATCH_ALL, setting if isinstance(setting, list) else [setting])]  # type: ignore[list-item]


def _match(setting: object, tensor: str) -> list[float | bool | str] | None:
    return next((values for text, values in _rules(setting) if text == _MATCH_ALL or text in tensor), None)


def _position(layer: int | None, layers: int) -> float:
    """Return where a tensor stands between the first layer, 0, and the last, 1; outside the layers it is 0."""
    if layer is None:
        return 0.0
    return layer / (layers - 1) if layers > 1 else 1.0


def _at(values: list[float | bool | str], position: float) -> float | bool | str:
    """Return a gradient's value: numbers are interpolated, switches step; a word is one value."""
    place = position * (len(values) - 1)
    left = min(int(place), len(values) - 1)
    below, above = values[left], values[min(left + 1, len(values) - 1)]
    share = place - left
    if isinstance(below, (bool, str)) or isinstance(above, (bool, str)) or share == 0.0:
        return below
    return (1.0 - share) * below + share * above
