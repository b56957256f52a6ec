"""The JSON Schema of recipes, for editors.

Owns the translation of keys, parameters and their descriptions to JSON Schema (draft 2020-12). Decides nothing: what
only a reader with context can see (repeated models, references to models) is left to `parse_recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from pipeline.recipe.checks import IDLE, IDLE_PARAMETERS, MOMENT_KEYS, STATISTICS_KEYS
from pipeline.recipe.content import (
    DISTANCES,
    METRICS,
    NON_FINITE,
    OUTPUTS,
    SCALES,
    SCOPES,
    STARTS,
    MetricSettings,
    ModelEntry,
    ModelSettings,
    NamedPatterns,
    PipelineSettings,
    Recipe,
    keys_of,
)
from pipeline.recipe.parameters import MethodSchema, Parameter
from pipeline.recipe.values import DTYPES, NUMBER_PATTERN

Schema = dict[str, object]

_TEXT: Schema = {"type": "string", "pattern": r"\S"}
_NULL: Schema = {"type": "null"}
_NUMBER_TEXT: Schema = {"type": "string", "pattern": rf"^\s*{NUMBER_PATTERN}\s*$"}
# The mantissa must hold a digit that is not 0, without a minus sign in front.
_POSITIVE_TEXT: Schema = {"type": "string", "pattern": rf"^\s*(?=\+?[0-9.]*[1-9]){NUMBER_PATTERN}\s*$"}
# The units of pipeline.units, in any case.
_SIZE_TEXT: Schema = {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([KMGTPkmgtp]([Ii]?[Bb])?|[Bb])?\s*$"}
_SIZE: Schema = {"anyOf": [{"type": "integer", "minimum": 1}, _SIZE_TEXT]}
# One step through a path as references.py splits it: another character, backslashes in front of no plus sign, or an odd
# number of them with the plus sign that they make part of the path.
_STEP = r"(?:[^+\\]|\\+(?=[^+\\])|(?:\\\\)*\\\+)"
# In a plain path "@" would mean a revision, in a URL it does not.
_PLAIN_STEP = _STEP.replace("[^+", "[^@+", 1)
_HALF = rf"(?=\s*[^\s+])(?:{_PLAIN_STEP}*|{_STEP}*://{_STEP}*)"
# A plus sign behind an even number of backslashes parts base and adapter; at the end of a path backslashes are its own.
_PATH: Schema = {"type": "string", "pattern": rf"^{_HALF}((\\\\)*\+{_HALF})?\\*$"}
_FOLDER: Schema = {
    "type": "object",
    "properties": {"path": _TEXT, "revision": _NULL},
    "required": ["path"],
    "additionalProperties": False,
}
_PATH_OBJECT: Schema = {
    "type": "object",
    "properties": {"model": _FOLDER, "lora": {"anyOf": [_NULL, _FOLDER]}, "override_architecture": _NULL},
    "required": ["model"],
    "additionalProperties": False,
}
_MODEL: Schema = {"anyOf": [_PATH, _PATH_OBJECT]}
_FULL_PATH: Schema = {"type": "string", "pattern": rf"^{_HALF}\\*$"}
_FULL_OBJECT: Schema = {
    "type": "object",
    "properties": {"model": _FOLDER, "lora": _NULL, "override_architecture": _NULL},
    "required": ["model"],
    "additionalProperties": False,
}
_START: Schema = {"anyOf": [_NULL, {"enum": list(STARTS)}, _FULL_PATH, _FULL_OBJECT]}
_OPTIONAL_PLACE: Schema = {"type": ["string", "null"], "pattern": r"\S"}
_DTYPE: Schema = {"enum": [None, *DTYPES, *(f"torch.{name}" for name in DTYPES)]}
_FRACTION: Schema = {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, _POSITIVE_TEXT]}
_OPTIONAL_OBJECT: Schema = {"type": ["object", "null"]}
_HTTP_URL: Schema = {"type": ["string", "null"], "pattern": r"^https?://[^/]"}
_OPTIONAL_TEXT: Schema = {"type": ["string", "null"], "minLength": 1}
# Most names of credentials; the reader knows more of them.
_CREDENTIAL = r"(^|_)(auth|credentials?|keys?|passphrase|passw(or)?d|sas|secrets?|signature|tokens?)(_|$)"
_STORAGE_OPTIONS: Schema = {"type": "object", "propertyNames": {"not": {"pattern": _CREDENTIAL}}}
_S3_OPTIONS: Schema = {
    "properties": {
        "endpoint_url": _HTTP_URL,
        "region": _OPTIONAL_TEXT,
        "profile": _OPTIONAL_TEXT,
        "anon": {"type": ["boolean", "null"]},
    },
}
# By scheme or URL prefix; a user or a query could hold a credential, and folders have no options.
_STORAGE: Schema = {
    "type": ["object", "null"],
    "propertyNames": {
        "pattern": r"^([a-z][a-z0-9+.\-]*|[A-Za-z][A-Za-z0-9+.\-]*://[^@?/]*(/[^?]*)?)$",
        "not": {"pattern": r"^([Ff][Ii][Ll][Ee]|[Ll][Oo][Cc][Aa][Ll])(:|$)"},
    },
    "additionalProperties": _STORAGE_OPTIONS,
    "patternProperties": {r"^[Ss]3[Aa]?(://|$)": {**_STORAGE_OPTIONS, **_S3_OPTIONS}},
}


def recipe_schema(methods: Mapping[str, MethodSchema]) -> Schema:
    """Return the JSON Schema of recipes for the given methods.

    Args:
        methods: All methods by name.

    Returns:
        A schema of draft 2020-12 that accepts the same words as `parse_recipe`.
    """
    values: dict[str, Schema] = {
        "merge_method": {"enum": sorted(methods)},
        "base_model": {"anyOf": [_NULL, _MODEL]},
        "models": {"type": "array", "minItems": 1, "items": _entry_schema()},
        "parameters": _OPTIONAL_OBJECT,
        "dtype": _DTYPE,
        "out_dtype": _DTYPE,
        "tokenizer_source": {"anyOf": [_NULL, {"allOf": [_MODEL, {"not": {"const": "union"}}]}]},
        "pipeline": _pipeline_schema(),
    }
    content = _object_schema(Recipe, values, ("merge_method", "models"))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "geomerge recipe",
        **_with_idle(content),
        "allOf": [*(_method_schema(method) for method in methods.values()), *_base_conditions()],
    }


def _object_schema(model: type[BaseModel], values: Mapping[str, Schema], required: tuple[str, ...]) -> Schema:
    """Return a closed object whose keys are those of `model`, each described as there."""
    fields = (field for field in model.model_fields.values() if not field.exclude)
    descriptions = dict(zip(keys_of(model), (field.description or "" for field in fields), strict=True))
    properties = {key: {"description": text, **values[key]} for key, text in descriptions.items()}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _with_idle(schema: Schema) -> Schema:
    idle = {key: {"deprecated": True, "description": "Has no effect."} for key in IDLE}
    properties = schema["properties"]
    return {**schema, "properties": {**properties, **idle}} if isinstance(properties, dict) else schema


def _entry_schema() -> Schema:
    own = {**_object_schema(ModelSettings, {"statistics": _OPTIONAL_PLACE}, ()), "type": ["object", "null"]}
    values: dict[str, Schema] = {"model": _MODEL, "parameters": _OPTIONAL_OBJECT, "pipeline": own}
    return _with_idle(_object_schema(ModelEntry, values, ("model",)))


def _pipeline_schema() -> Schema:
    sets = _object_schema(
        NamedPatterns,
        {"name": _TEXT, "tensors": {"type": "array", "minItems": 1, "items": _TEXT}},
        ("name", "tensors"),
    )
    number: Schema = {"anyOf": [{"type": "number"}, _NUMBER_TEXT]}
    values: dict[str, Schema] = {
        "scope": {"anyOf": [{"enum": list(SCOPES)}, {"type": "array", "minItems": 1, "items": sets}]},
        "distances": {"enum": list(DISTANCES)},
        "scale": {"anyOf": [*_branches(number), {"enum": list(SCALES)}]},
        "tolerance": _FRACTION,
        "file_size": _SIZE,
        "non_finite": {"enum": list(NON_FINITE)},
        "bandwidth": {"anyOf": [_NULL, *_branches(_SIZE)]},
        "output": {"enum": list(OUTPUTS)},
        "rank": {"anyOf": [_NULL, {"type": "integer", "minimum": 1}]},
        "storage": _STORAGE,
        "base_statistics": _OPTIONAL_PLACE,
        "start": _START,
        "start_scale": {"anyOf": [_NULL, *_branches(number)]},
        "average": {"anyOf": [_NULL, {"type": "array", "minItems": 1, "items": _TEXT}]},
        "metric": _metric_schema(),
    }
    adapter: Schema = {"type": "object", "properties": {"output": {"const": "adapter"}}, "required": ["output"]}
    return {
        **_object_schema(PipelineSettings, values, ()),
        "type": ["object", "null"],
        "if": adapter,
        "then": {"properties": {"file_size": False}},
        "else": {"properties": {"rank": _NULL}},
        "dependentSchemas": {
            "start_scale": {"properties": {"start": {"const": "task_arithmetic"}}, "required": ["start"]}
        },
    }


def _metric_schema() -> Schema:
    values: dict[str, Schema] = {"kind": {"enum": list(METRICS)}, "statistics": _TEXT}
    return {**_object_schema(MetricSettings, values, ("kind", "statistics")), "type": ["object", "null"]}


def _branches(schema: Schema) -> list[Schema]:
    branches = schema["anyOf"]
    return list(branches) if isinstance(branches, list) else [schema]


def _method_schema(method: MethodSchema) -> Schema:
    """Return what holds in addition when this method is chosen."""
    own = {parameter.name: parameter for parameter in method.parameters if parameter.per_model}
    document = _settings_schema({parameter.name: parameter for parameter in method.parameters})
    entry: Schema = {"type": "object", "properties": {"parameters": _settings_schema(own)}}
    properties: Schema = {"parameters": document, "models": {"type": "array", "items": entry}}
    properties["pipeline"] = _method_pipeline_schema(method)
    if method.needs_moments:
        given: Schema = {"properties": {"statistics": {"type": "string"}}, "required": ["statistics"]}
        entry["properties"] = {"parameters": _settings_schema(own), "pipeline": {"type": "object", **given}}
        entry["required"] = ["pipeline"]
    else:
        none: Schema = {"properties": {"statistics": _NULL}}
        entry["properties"] = {"parameters": _settings_schema(own), "pipeline": none}
    then: Schema = {"properties": properties}
    if method.needs_base:
        then = {**then, "required": ["base_model"]}
        properties["base_model"] = {"not": _NULL}
    required = [_required_schema(parameter) for parameter in method.parameters if parameter.required]
    # JSON Schema allows no empty allOf.
    if required:
        then["allOf"] = required
    return {"if": {"properties": {"merge_method": {"const": method.name}}, "required": ["merge_method"]}, "then": then}


def _method_pipeline_schema(method: MethodSchema) -> Schema:
    """Return what a method forbids under `pipeline:`."""
    idle = [key for key in MOMENT_KEYS if key not in method.moment_keys]
    if not method.uses_statistics:
        idle += STATISTICS_KEYS
    schema: Schema = {"properties": dict.fromkeys(idle, False)}
    if method.uses_statistics:
        # Only with a metric are there tensors without one.
        schema["if"] = {"type": "object", "required": ["average"]}
        schema["then"] = {"properties": {"metric": {"not": _NULL}}, "required": ["metric"]}
    return schema


def _settings_schema(parameters: Mapping[str, Parameter]) -> Schema:
    settings = {name: _setting_schema(parameter) for name, parameter in parameters.items()}
    idle: dict[str, Schema] = {
        name: {"deprecated": True, "description": "Has no effect."} for name in IDLE_PARAMETERS if name not in settings
    }
    return {"type": ["object", "null"], "properties": {**settings, **idle}, "additionalProperties": False}


def _setting_schema(parameter: Parameter) -> Schema:
    """Return the grammar of mergekit's settings for one parameter."""
    scalar = _scalar_schema(parameter)
    described: Schema = {"description": parameter.description}
    if parameter.default is not None:
        described["default"] = parameter.default
    if parameter.constant or parameter.kind in ("count", "word"):
        return {**described, **scalar}
    gradient: Schema = {"type": "array", "minItems": 1, "items": scalar}
    rule: Schema = {
        "type": "object",
        "properties": {"value": {"anyOf": [scalar, gradient]}, "filter": {"type": ["string", "null"], "minLength": 1}},
        "required": ["value"],
        "additionalProperties": False,
    }
    return {**described, "anyOf": [scalar, gradient, rule, {"type": "array", "minItems": 1, "items": rule}]}


def _scalar_schema(parameter: Parameter) -> Schema:
    if parameter.kind == "boolean":
        return {"enum": [True, False, 0, 1]}
    if parameter.kind == "word":
        return {"enum": list(parameter.choices)}
    if parameter.kind == "count":
        return {"type": "integer", "minimum": 1}
    if parameter.bounds is not None:
        least, most = parameter.bounds
        return {"anyOf": [{"type": "number", "minimum": least, "maximum": most}, _NUMBER_TEXT]}
    if parameter.positive:
        return {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, _POSITIVE_TEXT]}
    return {"anyOf": [{"type": "number"}, _NUMBER_TEXT]}


def _required_schema(parameter: Parameter) -> Schema:
    """Return that the document has the parameter, or that every model has it."""
    given: Schema = {
        "required": ["parameters"],
        "properties": {"parameters": {"type": "object", "required": [parameter.name]}},
    }
    if not parameter.per_model:
        return given
    return {"anyOf": [given, {"properties": {"models": {"items": given}}}]}


def _base_conditions() -> list[Schema]:
    """Return what needs a base model: values of the base, a scale, a start at it, the base's tokenizer."""
    neutral: Schema = {"anyOf": [{"const": 1}, {"type": "string", "pattern": r"^\s*\+?1(\.0*)?([eE][+-]?0+)?\s*$"}]}
    scaled: Schema = {"type": "object", "properties": {"scale": {"not": neutral}}, "required": ["scale"]}
    replaced: Schema = {
        "type": "object",
        "properties": {"non_finite": {"const": "base"}},
        "required": ["non_finite"],
    }
    started: Schema = {
        "type": "object",
        "properties": {"start": {"enum": ["base", "task_arithmetic"]}},
        "required": ["start"],
    }
    conditions: list[Schema] = [
        {"properties": {"pipeline": need}, "required": ["pipeline"]} for need in (scaled, replaced, started)
    ]
    conditions.append({"properties": {"tokenizer_source": {"const": "base"}}, "required": ["tokenizer_source"]})
    based: Schema = {"properties": {"base_model": {"not": _NULL}}, "required": ["base_model"]}
    return [{"if": condition, "then": based} for condition in conditions]
