"""Recipe and open checkpoints in, plan out.

Owns the order of the checks and the translation of the recipe's words into the plan's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.checkpoints.sidecars import has_tokenizer
from pipeline.errors import CheckpointError, PipelineError, Problem, RecipeError
from pipeline.methods.base import Method
from pipeline.numerics.dtypes import header_name, promote
from pipeline.planning.blocks import group_names, layer_count, layer_of
from pipeline.planning.family import Aligned, Family, align
from pipeline.planning.grid import chunk_elements
from pipeline.planning.layout import lay_out
from pipeline.planning.plan import GroupPlan, Input, Plan, Settings, Source, SourceFile, TensorPlan
from pipeline.recipe import Recipe, canonical, unused_filters
from pipeline.recipe.values import without_credentials


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The open checkpoints of a recipe: distinct inputs and who plays which part.

    Attributes:
        checkpoints: I open checkpoints, the base or else the first model first.
        names: I names as the recipe has them.
        base: Index of the base, or None.
        models: N indices.
    """

    checkpoints: tuple[Checkpoint, ...]
    names: tuple[str, ...]
    base: int | None
    models: tuple[int, ...]


def open_sources(recipe: Recipe) -> Sources:
    """Open every checkpoint that a recipe names, headers only, each once.

    Raises:
        CheckpointError: What is wrong with any of them, all together.
        StorageError: None of the errors was about the content.
    """
    names: list[str] = [recipe.base_model] if recipe.base_model is not None else []
    names += [entry.model for entry in recipe.models if entry.model not in names]
    opened: dict[str, Checkpoint] = {}
    errors: list[PipelineError] = []
    for name in names:
        try:
            opened[name] = open_checkpoint(name)
        except PipelineError as error:
            errors.append(error)
    if errors:
        problems = [problem for error in errors for problem in error.problems]
        raise (type(errors[0]) if len({type(error) for error in errors}) == 1 else CheckpointError)(*problems)
    models = [names.index(entry.model) for entry in recipe.models]
    if recipe.base_is_input:
        models.append(0)
    return Sources(
        checkpoints=tuple(opened[name] for name in names),
        names=tuple(names),
        base=0 if recipe.base_model is not None else None,
        models=tuple(models),
    )


def build_plan(recipe: Recipe, method: Method, sources: Sources) -> Plan:
    """Return the plan of a merge.

    Args:
        recipe: The validated recipe.
        method: The recipe's method.
        sources: Its open checkpoints.

    Raises:
        CheckpointError: The checkpoints are no family.
        RecipeError: A pattern or weight does not fit the tensors.
    """
    family = align(sources.checkpoints)
    _check_tokenizer(recipe, sources)
    groups, group_of, weights = _groups(recipe, method, family)
    positions = [
        {file.path: number for number, file in enumerate(checkpoint.files)} for checkpoint in sources.checkpoints
    ]
    tensors = tuple(
        TensorPlan(
            name=aligned.name,
            shape=aligned.shape,
            elements=aligned.elements,
            dtype=_output_dtype(recipe, aligned, sources),
            group=group,
            sources=_places(aligned, positions),
        )
        for aligned, group in zip(family.tensors, group_of, strict=True)
    )
    settings = _settings(recipe, method)
    return Plan(
        recipe=canonical(recipe),
        settings=settings,
        inputs=tuple(_input(name, item) for name, item in zip(sources.names, sources.checkpoints, strict=True)),
        base=sources.base,
        donor=_donor(recipe, sources),
        models=sources.models,
        weights=weights,
        tensors=tensors,
        files=lay_out(
            tensors,
            file_size_bytes=recipe.pipeline.file_size_bytes,
            solve_in_file=settings.measured and settings.distances == "gram",
        ),
        groups=groups,
        chunk_elements=chunk_elements(len(sources.checkpoints)),
        notes=(*recipe.warnings, *family.notes, *_notes(recipe, sources)),
    )


def _settings(recipe: Recipe, method: Method) -> Settings:
    pipeline = recipe.pipeline
    return Settings(
        method=recipe.merge_method,
        scope=pipeline.scope if isinstance(pipeline.scope, str) else "patterns",
        distances=pipeline.distances,
        scale=pipeline.scale,
        tolerance=pipeline.tolerance,
        non_finite=pipeline.non_finite,
        cast=header_name(recipe.dtype) if recipe.dtype else None,
        measured=method.schema.uses_statistics,
    )


def _groups(
    recipe: Recipe, method: Method, family: Family
) -> tuple[tuple[GroupPlan, ...], tuple[int, ...], tuple[float, ...]]:
    """Return the groups, each tensor's group index (-1: copied) and the models' weights."""
    merged = [aligned for aligned in family.tensors if aligned.merged]
    names = [aligned.name for aligned in merged]
    if not names:
        raise CheckpointError(Problem(what="the models have no float tensors: there is nothing to merge"))
    if problems := unused_filters(recipe, names):
        raise RecipeError(*problems)
    layers = layer_count(names)
    if method.schema.uses_statistics:
        labels = group_names(names, recipe.pipeline.scope)
        weights = method.weights(recipe)  # type: ignore[attr-defined]
        fixed: dict[str, tuple[float, ...] | None] = dict.fromkeys(labels)
    else:
        per_tensor = [
            method.coefficients(recipe, tensor=name, layer=layer_of(name), layers=layers)  # type: ignore[attr-defined]
            for name in names
        ]
        distinct = list(dict.fromkeys(per_tensor))
        labels = tuple("model" if len(distinct) == 1 else f"weights {distinct.index(row) + 1}" for row in per_tensor)
        weights = per_tensor[0]
        fixed = dict(zip(labels, per_tensor, strict=True))
    order = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    elements = [0] * len(order)
    for label, aligned in zip(labels, merged, strict=True):
        elements[order[label]] += aligned.elements
    groups = tuple(
        GroupPlan(name=label, elements=elements[index], coefficients=fixed[label]) for label, index in order.items()
    )
    label_of = dict(zip(names, labels, strict=True))
    return groups, tuple(order[label_of[a.name]] if a.merged else -1 for a in family.tensors), tuple(weights)


def _output_dtype(recipe: Recipe, aligned: Aligned, sources: Sources) -> str:
    """Return what a tensor is written as: `out_dtype`, else `dtype`, else what all models' dtypes promote to."""
    if not aligned.merged:
        return aligned.entries[0].dtype
    word = recipe.out_dtype or recipe.dtype
    return header_name(word) if word else promote(tuple(aligned.entries[index].dtype for index in sources.models))


def _places(aligned: Aligned, positions: Sequence[Mapping[str, int]]) -> tuple[Source, ...]:
    return tuple(
        Source(
            file=position[entry.file],
            start=entry.start,
            dtype=entry.dtype,
            copies=tuple((position[copy.file], copy.start) for copy in copies),
        )
        for entry, copies, position in zip(aligned.entries, aligned.copies, positions, strict=True)
    )


def _input(name: str, checkpoint: Checkpoint) -> Input:
    files = tuple(SourceFile(path=f.path, size_bytes=f.size_bytes, version=f.version) for f in checkpoint.files)
    # The folder, also where one file of it was named: paths of files are relative to the store.
    return Input(url=checkpoint.store.url, name=without_credentials(name), files=files)


def _donor(recipe: Recipe, sources: Sources) -> int:
    """Return the input whose configuration and tokenizer are copied: `tokenizer_source`, else base or first model."""
    if recipe.tokenizer_source in (None, "base"):
        return 0
    return sources.names.index(str(recipe.tokenizer_source))


def _check_tokenizer(recipe: Recipe, sources: Sources) -> None:
    """Raise when the recipe asks for a tokenizer that is not there."""
    donor = _donor(recipe, sources)
    if recipe.tokenizer_source is not None and not has_tokenizer(sources.checkpoints[donor].store):
        raise CheckpointError(
            Problem(
                what="has no tokenizer files, although tokenizer_source names it",
                where=f"model {without_credentials(sources.names[donor])}",
                remedy="leave tokenizer_source out to merge without a tokenizer",
            )
        )


def _notes(recipe: Recipe, sources: Sources) -> list[str]:
    """Return what is legal but worth saying."""
    notes = []
    donor = sources.checkpoints[_donor(recipe, sources)]
    if recipe.tokenizer_source is None and not has_tokenizer(donor.store):
        notes.append(f"{donor.url} has no tokenizer files, so the output has none")
    if not donor.config:
        notes.append(f"{donor.url} has no config.json, so the output has none and transformers cannot load it as it is")
    if len(sources.models) == 1:
        notes.append("one model only: the result is that model")
    if sources.base is None:
        notes.append("no base_model: norms and cosines of task vectors are not reported")
    return notes
