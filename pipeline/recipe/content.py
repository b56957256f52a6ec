"""What a recipe holds, as frozen models: the keys, their types and their defaults.

Owns the fields of `Recipe` and their descriptions; knows neither files and lines nor which methods exist. Keys are
mergekit's; what mergekit has no word for stands under `pipeline:`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    InstanceOf,
    PlainSerializer,
    Tag,
)

from pipeline.recipe.values import (
    RefusalError,
    describe,
    model_key,
    read_count,
    read_dtype,
    read_model,
    read_number,
    read_size,
    read_word,
    split_model,
)
from pipeline.storage.options import NO_OPTIONS, StorageOptions, check_storage_options

SCOPES = ("model", "block", "tensor")
DISTANCES = ("gram", "stream")
SCALES = ("norm", "median_norm")
NON_FINITE = ("error", "base")
OUTPUTS = ("model", "adapter")
# Where systems start from; anything else is the path or URL of a checkpoint.
STARTS = ("average", "zero", "base", "task_arithmetic")
METRICS = ("diagonal", "gram")
# mergekit's default, and what the Hugging Face hub and its tools are used to.
DEFAULT_FILE_SIZE_BYTES = 5_000_000_000
# Far below what any output type can show (2^-24 for float32) and well within reach of the solver.
DEFAULT_TOLERANCE = 1e-10


def _word(*allowed: str) -> BeforeValidator:
    def check(raw: object) -> str:
        return read_word(raw, allowed)

    return BeforeValidator(check)


def _optional(read: Callable[[object], object]) -> BeforeValidator:
    def check(raw: object) -> object:
        return None if raw is None else read(raw)

    return BeforeValidator(check)


def _read_scale(raw: object) -> float | str:
    if raw in SCALES:
        return str(raw)
    if isinstance(raw, (bool, str, list, dict)) or raw is None:
        try:
            return read_number(raw)
        except RefusalError as error:
            words = " or ".join(f'"{word}"' for word in SCALES)
            raise RefusalError(f"must be a number or {words}, not {describe(raw)}") from error
    return read_number(raw)


def _read_tolerance(raw: object) -> float:
    tolerance = read_number(raw)
    if not 0.0 < tolerance < 1.0:
        raise RefusalError(f"must lie between 0 and 1, not {describe(raw)}", f"the default is {DEFAULT_TOLERANCE}")
    return tolerance


def _read_tokenizer_source(raw: object) -> str:
    if raw == "union":
        raise RefusalError(
            "cannot be `union`: all models must share one vocabulary, and embeddings are merged row by row",
            "write `base` or the path of one of the models",
        )
    return read_model(raw)


def _read_name(raw: object) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise RefusalError(f"must be text, not {describe(raw)}")
    return raw


def _read_place(raw: object) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise RefusalError(f"must be the path or URL of a folder of statistics, not {describe(raw)}")
    return raw


def _read_start(raw: object) -> str:
    if raw in STARTS:
        return str(raw)
    start = read_model(raw)
    if split_model(start)[1] is not None:
        raise RefusalError(f"must be a full model, not an adapter on one: {describe(raw)}", "merge the two first")
    return start


def _read_storage(raw: object) -> StorageOptions:
    # What is wrong with them is noted with the place of each fault, by the checks of the whole document.
    if isinstance(raw, StorageOptions):
        return raw
    return StorageOptions(raw) if isinstance(raw, dict) and not any(check_storage_options(raw)) else NO_OPTIONS


def _empty_when_null(raw: object) -> object:
    return {} if raw is None else raw


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, allow_inf_nan=False)


ModelPath = Annotated[str, BeforeValidator(read_model)]
Settings = Annotated[dict[str, object], BeforeValidator(_empty_when_null)]
Name = Annotated[str, BeforeValidator(_read_name)]
# As it is, without a look into it: options are the storage room's.
Storage = Annotated[InstanceOf[StorageOptions], BeforeValidator(_read_storage), PlainSerializer(StorageOptions.to_json)]


class ModelSettings(_Frozen):
    """What mergekit has no word for, of one model."""

    statistics: Annotated[str | None, _optional(_read_place)] = Field(
        default=None, description="Path or URL of the folder of the model's statistics, as `geomerge calibrate` writes."
    )


class ModelEntry(_Frozen):
    """One input model and its own parameters."""

    model: ModelPath = Field(
        description="Path or URL of the folder of a model or adapter; base+adapter for an adapter on that base."
    )
    parameters: Settings = Field(default={}, description="Parameters of this model; they win over the document's.")
    pipeline: Annotated[ModelSettings, BeforeValidator(_empty_when_null)] = Field(
        default=ModelSettings(), description="What mergekit has no word for, of this model."
    )


class NamedPatterns(_Frozen):
    """A named set of tensors that share one solution."""

    name: Name = Field(description="Name of the set, for reports.")
    tensors: tuple[Name, ...] = Field(
        min_length=1, description="Patterns of tensor names; * stands for any text, ? for one character."
    )


def _check_names(sets: tuple[NamedPatterns, ...]) -> tuple[NamedPatterns, ...]:
    names = [patterns.name for patterns in sets]
    twice = [name for position, name in enumerate(names) if name in names[:position]]
    if twice:
        raise RefusalError(f"has two sets with the name {describe(twice[0])}", "give each set its own name")
    return sets


def _scope_kind(raw: object) -> str:
    return "sets" if isinstance(raw, (list, tuple)) else "word"


Scope = Annotated[
    Annotated[Literal["model", "block", "tensor"], _word(*SCOPES), Tag("word")]
    | Annotated[tuple[NamedPatterns, ...], Field(min_length=1), AfterValidator(_check_names), Tag("sets")],
    Discriminator(_scope_kind),
]


class MetricSettings(_Frozen):
    """The metric that distances are measured in."""

    kind: Annotated[Literal["diagonal", "gram"], _word(*METRICS)] = Field(
        description="diagonal: each element counts by its diagonal statistic; gram: each matrix by its inputs."
    )
    statistics: Annotated[str, BeforeValidator(_read_place)] = Field(
        description="Path or URL of the folder of statistics."
    )


class PipelineSettings(_Frozen):
    """What mergekit has no word for: what changes the result or its layout, its projection, or the way to storage."""

    scope: Scope = Field(
        default="model",
        description="What shares one solution: the whole model, each block, each tensor, or named sets of tensors.",
    )
    distances: Annotated[Literal["gram", "stream"], _word(*DISTANCES)] = Field(
        default="gram",
        description="gram: one pass measures all pairwise distances; stream: every iteration measures its own.",
    )
    scale: Annotated[float | Literal["norm", "median_norm"], BeforeValidator(_read_scale)] = Field(
        default=1.0,
        description="Factor on the merged task vector; norm makes it as long as the weighted mean of the inputs' task"
        " vectors, median_norm as long as their weighted median.",
    )
    tolerance: Annotated[float, BeforeValidator(_read_tolerance)] = Field(
        default=DEFAULT_TOLERANCE, description="Relative gap that the certificate must prove, between 0 and 1."
    )
    file_size_bytes: Annotated[int, BeforeValidator(read_size)] = Field(
        default=DEFAULT_FILE_SIZE_BYTES,
        validation_alias="file_size",
        serialization_alias="file_size",
        description="Largest size of one output file, for example 5GB.",
    )
    non_finite: Annotated[Literal["error", "base"], _word(*NON_FINITE)] = Field(
        default="error",
        description="What to do with a NaN or infinite parameter: stop, or take the base model's value.",
    )
    bandwidth_bytes: Annotated[int | None, _optional(read_size)] = Field(
        default=None,
        validation_alias="bandwidth",
        serialization_alias="bandwidth",
        description="Bytes per second of the storage, for the projected time; measured when absent.",
    )
    output: Annotated[Literal["model", "adapter"], _word(*OUTPUTS)] = Field(
        default="model",
        description="What is written: a whole model, or an adapter for the base that all adapters share.",
    )
    rank: Annotated[int | None, _optional(read_count)] = Field(
        default=None, description="Largest rank in a written adapter; exact, without truncation, when absent."
    )
    storage: Storage = Field(
        default=NO_OPTIONS,
        description="How stores are opened, by scheme or URL prefix: endpoint_url, region, profile and anon for s3. No"
        " credentials.",
    )
    base_statistics: Annotated[str | None, _optional(_read_place)] = Field(
        default=None, description="Path or URL of the folder of the base model's statistics."
    )
    start: Annotated[str | None, _optional(_read_start)] = Field(
        default=None,
        description="Where solving starts and what directions keep that no statistic sees: average (the default), zero,"
        " base, task_arithmetic, or the path or URL of a checkpoint.",
    )
    start_scale: Annotated[float | None, _optional(read_number)] = Field(
        default=None, description="Factor on the sum of the task vectors, of `start: task_arithmetic`; 1 when absent."
    )
    average: tuple[Name, ...] | None = Field(
        default=None,
        min_length=1,
        description="Patterns of tensor names that are averaged, although they have no statistic, or whether they have"
        " one or not; * stands for any text, ? for one character.",
    )
    metric: MetricSettings | None = Field(
        default=None, description="Measure distances in the metric of second moments; Euclidean when absent."
    )


class Recipe(_Frozen):
    """One merge, as the user wrote it, with all defaults filled in."""

    merge_method: Name = Field(description="The merge method.")
    base_model: Annotated[str | None, _optional(read_model)] = Field(
        default=None, description="The model that task vectors start from; also gives config and tokenizer."
    )
    models: tuple[ModelEntry, ...] = Field(min_length=1, description="The input models, in the order of the report.")
    parameters: Settings = Field(default={}, description="Parameters for all models.")
    dtype: Annotated[str | None, _optional(read_dtype)] = Field(
        default=None, description="Type that full weights are cast to."
    )
    out_dtype: Annotated[str | None, _optional(read_dtype)] = Field(
        default=None, description="Type of the output; dtype when absent, else that of the inputs."
    )
    tokenizer_source: Annotated[str | None, _optional(_read_tokenizer_source)] = Field(
        default=None, description="Whose tokenizer is copied: base, or one of the models."
    )
    pipeline: Annotated[PipelineSettings, BeforeValidator(_empty_when_null)] = Field(
        default=PipelineSettings(), description="What mergekit has no word for."
    )
    warnings: tuple[str, ...] = Field(default=(), exclude=True, description="What the reader noticed; no key.")

    @property
    def base_is_input(self) -> bool:
        """Whether `linear` averages the base too: mergekit appends a base that is not listed to the inputs."""
        listed = [model_key(entry.model) for entry in self.models]
        return (
            self.merge_method == "linear"
            and self.base_model is not None
            and model_key(self.base_model) not in listed
            and "weight" in self.parameters
        )


def keys_of(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the keys a mapping of the recipe may have, as they are written in YAML.

    Args:
        model: One of this module's models.

    Returns:
        The keys, in the order of documentation.
    """
    return tuple(str(field.validation_alias or name) for name, field in model.model_fields.items() if not field.exclude)
