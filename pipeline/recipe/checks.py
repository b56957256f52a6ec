"""Checks of a recipe that need its context: which keys may stand where, and what the method understands.

Owns unknown, unsupported and idle keys, parameters against the method's schema, and conditions between keys; the types
of single fields are content.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from pydantic import BaseModel

from pipeline.recipe.content import (
    SCALES,
    MetricSettings,
    ModelEntry,
    ModelSettings,
    NamedPatterns,
    PipelineSettings,
    Recipe,
    keys_of,
)
from pipeline.recipe.document import Path
from pipeline.recipe.findings import Findings, nearest, path_text
from pipeline.recipe.parameters import MethodSchema
from pipeline.recipe.references import shown
from pipeline.recipe.settings import read_setting
from pipeline.recipe.values import (
    RefusalError,
    describe,
    join_model,
    model_key,
    read_model,
    read_number,
    split_model,
    without_credentials,
)
from pipeline.storage.options import check_storage_options

_Value = TypeVar("_Value")

# mergekit's keys that are refused by name, with the reason.
UNSUPPORTED = {
    "slices": ("layers cannot be restacked: whole models are merged", "list the models under `models`"),
    "modules": ("parts of a model cannot be merged on their own", "list the models under `models`"),
    "tokenizer": ("vocabularies are not rearranged: all models must share one", "use `tokenizer_source`"),
    "chat_template": ("the chat template is copied with the tokenizer", "use `tokenizer_source`"),
    "name": ("merges that build on each other are not supported", "write one recipe per merge and leave `name` out"),
}
# Keys of published recipes that change nothing in mergekit either, as keys and as parameters.
IDLE = ("input_model_parameters", "residual_weight", "embed_slerp")
IDLE_PARAMETERS = (*IDLE, "int8_mask")
# What `pipeline:` can say only about a method that looks at the models' distances.
STATISTICS_KEYS = ("scope", "distances", "scale", "tolerance")
# What `pipeline:` can say about second moments; a method's `moment_keys` are those of them that it knows.
MOMENT_KEYS = ("base_statistics", "start", "start_scale", "average", "metric")

# Which mappings have fixed keys; "[]" stands for any index.
_SHAPES: Mapping[Path, type[BaseModel]] = {
    (): Recipe,
    ("models", "[]"): ModelEntry,
    ("models", "[]", "pipeline"): ModelSettings,
    ("pipeline",): PipelineSettings,
    ("pipeline", "metric"): MetricSettings,
    ("pipeline", "scope", "[]"): NamedPatterns,
}


def known_part(raw: object, methods: Mapping[str, MethodSchema], findings: Findings, path: Path = ()) -> object:
    """Return the recipe, or a part of it, without the keys that have no meaning; each of those is noted.

    Args:
        raw: The YAML value at `path`.
        methods: All methods by name, for advice on misplaced parameters.
        findings: Collects what is wrong.
        path: Where it stands.

    Returns:
        A copy with known keys only.
    """
    if isinstance(raw, list):
        return [known_part(part, methods, findings, (*path, index)) for index, part in enumerate(raw)]
    shape = _SHAPES.get(tuple("[]" if isinstance(step, int) else step for step in path))
    if not isinstance(raw, dict) or shape is None:
        return raw
    keys = keys_of(shape)
    for key in (key for key in raw if key not in keys):
        _note_key(key, keys, (*path, key), methods, findings)
    return {key: known_part(raw[key], methods, findings, (*path, key)) for key in raw if key in keys}


def _note_key(
    key: str, keys: Iterable[str], path: Path, methods: Mapping[str, MethodSchema], findings: Findings
) -> None:
    where = f" in `{path_text(path[:-1])}`" if len(path) > 1 else ""
    if key in IDLE and "pipeline" not in path:
        findings.warn(path, f"`{key}` is ignored: it has no effect, in mergekit either")
    elif key in UNSUPPORTED and len(path) == 1:
        reason, remedy = UNSUPPORTED[key]
        findings.add(path, f"`{key}` is not supported: {reason}", remedy, key=True)
    elif key in keys_of(PipelineSettings):
        findings.add(path, f"unknown key `{key}`{where}", f"`{key}` belongs under `pipeline:`", key=True)
    elif "pipeline" not in path and key in _parameter_names(methods):
        findings.add(path, f"unknown key `{key}`{where}", f"`{key}` belongs under `parameters:`", key=True)
    else:
        findings.add(path, f"unknown key `{key}`{where}", nearest(key, keys), key=True)


def _parameter_names(methods: Mapping[str, MethodSchema]) -> list[str]:
    return [parameter.name for method in methods.values() for parameter in method.parameters]


def check_method(name: object, methods: Mapping[str, MethodSchema], findings: Findings) -> MethodSchema | None:
    """Return the method a recipe asks for; an unknown name is noted.

    Args:
        name: The value of `merge_method`.
        methods: All methods by name.
        findings: Collects what is wrong.

    Returns:
        Its schema, None when there is no such method.
    """
    if not isinstance(name, str) or name in methods:
        return methods.get(name) if isinstance(name, str) else None
    known = sorted(methods)
    advice = nearest(name, known)
    listed = f" Known are {', '.join(known)}" if advice.startswith("did you mean") else ""
    findings.add(("merge_method",), f"there is no merge method {describe(name)}", advice + listed)
    return None


def check_parameters(
    raw: object, method: MethodSchema, methods: Mapping[str, MethodSchema], findings: Findings
) -> object:
    """Return a recipe with all settings read; unknown, misplaced, wrong and missing parameters are noted.

    Args:
        raw: What `known_part` returned.
        method: The recipe's method.
        methods: All methods by name.
        findings: Collects what is wrong.

    Returns:
        A copy whose `parameters` hold floats and booleans.
    """
    if not isinstance(raw, dict):
        return raw
    read = dict(raw)
    document = raw.get("parameters")
    if isinstance(document, dict):
        read["parameters"] = _read_settings(document, ("parameters",), method, methods, findings)
    models = raw.get("models")
    if isinstance(models, list):
        read["models"] = list(models)
        for index, entry in enumerate(models):
            if isinstance(entry, dict) and isinstance(entry.get("parameters"), dict):
                path = ("models", index, "parameters")
                settings = _read_settings(entry["parameters"], path, method, methods, findings)
                read["models"][index] = {**entry, "parameters": settings}
    _check_required(read, method, findings)
    return read


def _read_settings(
    raw: dict[str, object], path: Path, method: MethodSchema, methods: Mapping[str, MethodSchema], findings: Findings
) -> dict[str, object]:
    own = {parameter.name: parameter for parameter in method.parameters}
    read: dict[str, object] = {}
    for name, value in raw.items():
        place = (*path, name)
        if name in own and (own[name].per_model or len(path) == 1):
            read[name] = read_setting(value, own[name], place, findings)
        elif name in own:
            what = f"`{path_text(place)}`: {name} cannot differ between models"
            findings.add(place, what, "move it to the `parameters` of the document", key=True)
        elif name in IDLE_PARAMETERS:
            findings.warn(place, f"`{name}` is ignored: it has no effect on the result")
        else:
            others = [other.name for other in methods.values() if name in _parameter_names({"": other})]
            what = f"`{path_text(place)}` is a parameter of {', '.join(others)}, not of {method.name}"
            unknown = f"unknown parameter `{name}` of {method.name} in `{path_text(path)}`"
            findings.add(place, what if others else unknown, nearest(name, own), key=True)
    return read


def _check_required(read: Mapping[str, object], method: MethodSchema, findings: Findings) -> None:
    document, models = read.get("parameters"), read.get("models")
    for parameter in method.parameters:
        if not parameter.required or (isinstance(document, dict) and parameter.name in document):
            continue
        if not parameter.per_model:
            what = f"{method.name} needs the parameter `{parameter.name}`"
            findings.add(("parameters",), what, "add it to the `parameters` of the document")
            continue
        for index, entry in enumerate(models if isinstance(models, list) else ()):
            own = entry.get("parameters") if isinstance(entry, dict) else None
            if isinstance(entry, dict) and not (isinstance(own, dict) and parameter.name in own):
                what = f"`models[{index}]` has no `{parameter.name}`, which {method.name} needs"
                findings.add(("models", index), what, "add it to its `parameters` or to those of the document")


def check_conditions(raw: object, method: MethodSchema | None, findings: Findings) -> None:
    """Note what is wrong only in combination: repeated models, keys that need a base, keys the method ignores.

    Works on what was written, so that it speaks even when single fields are wrong; those are left out of account.

    Args:
        raw: What `known_part` returned.
        method: The recipe's method, None when it is unknown.
        findings: Collects what is wrong.
    """
    if not isinstance(raw, dict):
        return
    entries = raw.get("models") if isinstance(raw.get("models"), list) else []
    named = [_readable(read_model, entry.get("model")) if isinstance(entry, dict) else None for entry in entries or ()]
    models = {index: model for index, model in enumerate(named) if model is not None}
    base = raw.get("base_model")
    _check_repeated(models, None if base is None else _readable(read_model, base), findings)
    pipeline = raw["pipeline"] if isinstance(raw.get("pipeline"), dict) else {}
    if method is not None and not method.uses_statistics:
        for key in (key for key in STATISTICS_KEYS if key in pipeline):
            what = f"`pipeline.{key}` has no meaning for {method.name}, which measures no distances"
            findings.add(("pipeline", key), what, "leave it out", key=True)
    if method is not None:
        _check_moments(method, pipeline, entries or (), base is None, findings)
    _check_output(pipeline, findings)
    _check_storage(pipeline.get("storage"), findings)
    if base is None:
        _check_no_base(raw, pipeline, findings)
    known = [*models.values()] if base is None else [*models.values(), _readable(read_model, base)]
    if None not in named and None not in known:
        _check_tokenizer(raw.get("tokenizer_source"), [model for model in known if model is not None], findings)


def _check_repeated(models: Mapping[int, str], base: str | None, findings: Findings) -> None:
    """Note models that are listed twice, the first place named."""
    seen: dict[str, int] = {}
    for index, model in models.items():
        first = seen.setdefault(_identity(model, base), index)
        if first != index:
            line = findings.line(("models", first))
            what = f"the model {without_credentials(model)} is listed twice, first in line {line}"
            findings.add(("models", index), what, "list it once and give it a larger weight")


def _identity(model: str, base: str | None) -> str:
    """Return what equal models share; an adapter is the same with the base model in front of it and without."""
    path, adapter = split_model(model)
    if adapter is not None and base is not None and model_key(join_model(path)) == model_key(base):
        return model_key(join_model(adapter))
    return model_key(model)


def _check_moments(
    method: MethodSchema, pipeline: Mapping[str, object], entries: Iterable[object], baseless: bool, findings: Findings
) -> None:
    """Note what is said about second moments to a method that knows none, and what it misses."""
    for key in (key for key in MOMENT_KEYS if key in pipeline and key not in method.moment_keys):
        what = f"`pipeline.{key}` has no meaning for {method.name}"
        findings.add(("pipeline", key), what, "leave it out", key=True)
    for index, entry in enumerate(entries):
        own = entry.get("pipeline") if isinstance(entry, dict) else None
        given = isinstance(own, dict) and own.get("statistics") is not None
        if given and not method.needs_moments:
            what = f"`models[{index}].pipeline.statistics` has no meaning for {method.name}"
            findings.add(("models", index, "pipeline", "statistics"), what, "leave it out", key=True)
        elif isinstance(entry, dict) and method.needs_moments and not given:
            what = f"`models[{index}]` has no statistics, which {method.name} needs"
            remedy = "collect them by `geomerge calibrate` and add pipeline: {statistics: FOLDER} to the model"
            findings.add(("models", index), what, remedy)
    if method.uses_statistics and "average" in pipeline and pipeline.get("metric") is None:
        what = "`pipeline.average` needs `metric`: Euclidean distances need no statistics"
        findings.add(("pipeline", "average"), what, "leave it out", key=True)
    if "start_scale" in pipeline and pipeline.get("start") != "task_arithmetic":
        what = "`pipeline.start_scale` needs `start: task_arithmetic`"
        findings.add(("pipeline", "start_scale"), what, "add it under `pipeline:`, or leave this out", key=True)
    if baseless and method.needs_base:
        findings.add(("merge_method",), f"{method.name} needs a base model", "add `base_model`")
    elif baseless and "start" in method.moment_keys and pipeline.get("start") in ("base", "task_arithmetic"):
        what = f"`pipeline.start: {pipeline['start']}` needs a base model"
        findings.add(("pipeline", "start"), what, "add `base_model`")


def _check_output(pipeline: Mapping[str, object], findings: Findings) -> None:
    """Note keys that do not go with what is written."""
    output = pipeline.get("output", "model")
    if output == "model" and pipeline.get("rank") is not None:
        what = "`pipeline.rank` needs `output: adapter`: a whole model has no rank"
        findings.add(("pipeline", "rank"), what, "add `output: adapter` under `pipeline:`, or leave it out", key=True)
    if output == "adapter" and "file_size" in pipeline:
        what = "`pipeline.file_size` has no meaning for `output: adapter`, which is always one file"
        findings.add(("pipeline", "file_size"), what, "leave it out", key=True)


def _check_storage(raw: object, findings: Findings) -> None:
    """Note storage options that cannot be, credentials above all: a recipe and a plan are read by many."""
    for path, what, remedy in check_storage_options(raw) if raw is not None else ():
        place: Path = ("pipeline", "storage", *path)
        findings.add(place, f"`{shown(path_text(place))}`: {what}", remedy, key=bool(path))


def _check_no_base(raw: Mapping[str, object], pipeline: Mapping[str, object], findings: Findings) -> None:
    """Note what needs a base model, of which there is none."""
    if pipeline.get("non_finite") == "base":
        what = "`pipeline.non_finite: base` needs a base model"
        findings.add(("pipeline", "non_finite"), what, "add `base_model`")
    scale = pipeline.get("scale", 1.0)
    if scale in SCALES or _readable(read_number, scale) not in (None, 1.0):
        what = "a `pipeline.scale` other than 1 needs a base model that task vectors start from"
        findings.add(("pipeline", "scale"), what, "add `base_model`")
    if raw.get("tokenizer_source") == "base":
        findings.add(("tokenizer_source",), "`tokenizer_source: base` needs a base model", "add `base_model`")


def _check_tokenizer(raw: object, models: list[str], findings: Findings) -> None:
    source = _readable(read_model, raw)
    if source is None or source in ("base", "union"):
        return
    if model_key(source) not in {model_key(model) for model in models}:
        what = f"`tokenizer_source` is none of the models: {without_credentials(source)}"
        findings.add(("tokenizer_source",), what, nearest(source, ["base", *map(without_credentials, models)]))


def _readable(read: Callable[[object], _Value], raw: object) -> _Value | None:
    """Return a value, or None when it cannot be read; why is noted with the fields."""
    try:
        return read(raw)
    except RefusalError:
        return None
