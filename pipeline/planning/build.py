"""Recipe and open checkpoints in, plan out.

Owns the order of the checks and the translation of the recipe's words into the plan's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.checkpoints.adapter import ADAPTER_FILE, Factors
from pipeline.checkpoints.header import TensorEntry
from pipeline.checkpoints.sidecars import has_tokenizer
from pipeline.errors import CheckpointError, Problem, RecipeError
from pipeline.methods.base import Method
from pipeline.numerics.dtypes import header_name, promote
from pipeline.planning.adapter_output import adapter_family, module_name, refuse_sums, stored_as
from pipeline.planning.adapters import Member, align_members
from pipeline.planning.blocks import group_names, layer_count, layer_of
from pipeline.planning.family import Aligned, Family
from pipeline.planning.grid import chunk_elements
from pipeline.planning.layout import lay_out
from pipeline.planning.metric import metric_note, plan_metric
from pipeline.planning.moments import statistics_inputs
from pipeline.planning.plan import GroupPlan, Input, Plan, Settings, Source, SourceFile, Stored, TensorPlan, Update
from pipeline.planning.solving import plan_solver, plan_systems, statistics_notes, treatment_groups
from pipeline.planning.sources import Sources
from pipeline.planning.system import Statistic, System
from pipeline.recipe import Recipe, canonical, unused_filters
from pipeline.recipe.values import without_credentials

# What the group of the tensors that no adapter touches is called.
UNCHANGED = "unchanged"


def build_plan(recipe: Recipe, method: Method, sources: Sources) -> Plan:
    """Return the plan of a merge.

    Args:
        recipe: The validated recipe.
        method: The recipe's method.
        sources: Its open checkpoints and adapters.

    Raises:
        CheckpointError: The inputs are no family.
        RecipeError: A pattern or weight does not fit the tensors, or the models cannot make an adapter.
    """
    family = align_members(sources.members, sources.overs)
    _check_tokenizer(recipe, sources)
    as_adapter = recipe.pipeline.output == "adapter"
    if as_adapter:
        family = adapter_family(family, sources)
    settings = _settings(recipe, method, sources)
    points = ((sources.base,) if sources.base is not None else ()) + sources.models
    shared = tuple(_shared(aligned, points, sources.overs) for aligned in family.tensors)
    metric = plan_metric(recipe, family.tensors, sources)
    if recipe.pipeline.metric is not None:
        # Factors tell Euclidean distances alone: what they are added to is read, and the sums are measured.
        shared = tuple(
            None if aligned.updates else stands for aligned, stands in zip(family.tensors, shared, strict=True)
        )
    systems: tuple[System | None, ...] = (None,) * len(family.tensors)
    if settings.solver is not None:
        systems = plan_systems(recipe, method, family.tensors, shared, sources)  # type: ignore[arg-type]
    groups, group_of, weights = _groups(recipe, method, family, shared, systems)
    if as_adapter:
        refuse_sums(groups)
    tensors = _tensors(recipe, family, sources, group_of=group_of, shared=shared, systems=systems, metric=metric)
    widest = max((1 if tensor.shared is not None else len(sources.members) for tensor in tensors), default=1)
    return Plan(
        recipe=canonical(recipe),
        settings=settings,
        inputs=tuple(map(_input, sources.names, sources.members, sources.overs)),
        base=sources.base,
        donor=_donor(recipe, sources),
        models=sources.models,
        weights=weights,
        tensors=tensors,
        files=lay_out(
            tensors,
            file_size_bytes=recipe.pipeline.file_size_bytes,
            solve_in_file=settings.measured and settings.distances == "gram",
            fixed=frozenset(index for index, group in enumerate(groups) if group.coefficients is not None),
            name=ADAPTER_FILE if as_adapter else None,
        ),
        groups=groups,
        chunk_elements=chunk_elements(widest),
        notes=(
            *recipe.warnings,
            *family.notes,
            *_notes(recipe, sources),
            *metric_note(recipe, family.tensors, metric),
            *statistics_notes(sources),
        ),
        statistics=statistics_inputs(sources),
    )


def _tensors(
    recipe: Recipe,
    family: Family,
    sources: Sources,
    *,
    group_of: Sequence[int],
    shared: Sequence[int | None],
    systems: Sequence[System | None],
    metric: Sequence[Statistic | None],
) -> tuple[TensorPlan, ...]:
    """Return the plans of all tensors; the sequences have an entry for each."""
    positions = [{file.path: number for number, file in enumerate(member.files)} for member in sources.members]
    factored = zip(family.tensors, shared, strict=True)
    wrapped = frozenset(module_name(a, family) for a, stands in factored if stands is not None and a.updates)
    return tuple(
        replace(
            _tensor(recipe, family, aligned, sources, positions, wrapped, group=group, shared=stands),
            system=system,
            metric=None if stands is not None else place,
        )
        for aligned, group, stands, system, place in zip(family.tensors, group_of, shared, systems, metric, strict=True)
    )


def _settings(recipe: Recipe, method: Method, sources: Sources) -> Settings:
    pipeline = recipe.pipeline
    solver = plan_solver(recipe, method, sources) if method.schema.solves else None  # type: ignore[arg-type]
    scope = pipeline.scope if isinstance(pipeline.scope, str) else "patterns"
    return Settings(
        method=recipe.merge_method,
        scope=scope if solver is None else "tensor",
        distances=pipeline.distances,
        scale=pipeline.scale,
        tolerance=pipeline.tolerance,
        non_finite=pipeline.non_finite,
        cast=header_name(recipe.dtype) if recipe.dtype else None,
        measured=method.schema.uses_statistics,
        output=pipeline.output,
        rank=pipeline.rank,
        solver=solver,
        metric=pipeline.metric.kind if pipeline.metric is not None else None,
    )


def _tensor(
    recipe: Recipe,
    family: Family,
    aligned: Aligned,
    sources: Sources,
    positions: Sequence[Mapping[str, int]],
    wrapped: frozenset[str],
    *,
    group: int,
    shared: int | None,
) -> TensorPlan:
    factored = shared is not None
    stored: tuple[Stored, ...] = ()
    merged_rank = None
    if recipe.pipeline.output == "adapter":
        stored, merged_rank = stored_as(aligned, family, recipe.pipeline.rank, factored=factored, wrapped=wrapped)
    return TensorPlan(
        name=aligned.name,
        shape=aligned.reference.shape,
        elements=aligned.reference.elements,
        dtype=_output_dtype(recipe, aligned, sources, factors=merged_rank is not None),
        group=group,
        sources=_places(aligned, positions),
        updates=tuple(_update(index, factors, positions[index]) for index, factors in aligned.updates),
        shared=shared,
        stored=stored,
        merged_rank=merged_rank,
    )


def _shared(aligned: Aligned, points: Sequence[int], overs: Sequence[int | None]) -> int | None:
    """Return the input whose values all points have before their updates; None where that is not so.

    A family without adapters shares nothing: its models are compared as they are.
    """
    if not any(over is not None for over in overs) or not aligned.merged:
        return None
    held = {index if aligned.entries[index] is not None else overs[index] for index in points}
    return held.pop() if len(held) == 1 else None


def _update(index: int, factors: Factors, position: Mapping[str, int]) -> Update:
    def place(entry: TensorEntry) -> Source:
        return Source(file=position[entry.file], start=entry.start, dtype=entry.dtype)

    return Update(
        input=index,
        left=place(factors.left),
        right=place(factors.right) if factors.right is not None else None,
        rank=factors.rank,
        scale=factors.scale,
        transposed=factors.transposed,
    )


def _groups(
    recipe: Recipe,
    method: Method,
    family: Family,
    shared: Sequence[int | None],
    systems: Sequence[System | None],
) -> tuple[tuple[GroupPlan, ...], tuple[int, ...], tuple[float, ...]]:
    """Return the groups, each tensor's group index (-1: copied) and the models' weights."""
    merged = [(aligned, stands) for aligned, stands in zip(family.tensors, shared, strict=True) if aligned.merged]
    names = [aligned.name for aligned, _ in merged]
    if not names:
        raise CheckpointError(Problem(what="the models have no float tensors: there is nothing to merge"))
    if problems := unused_filters(recipe, names):
        raise RecipeError(*problems)
    if method.schema.solves:
        weights = method.weights(recipe)  # type: ignore[attr-defined]
        return *treatment_groups(family.tensors, systems, weights), weights
    layers = layer_count(names)
    labels: Sequence[str]
    fixed: dict[str, tuple[float, ...] | None]
    if method.schema.uses_statistics:
        labels = group_names(names, recipe.pipeline.scope)
        weights = method.weights(recipe)  # type: ignore[attr-defined]
        fixed = dict.fromkeys(labels)
        # What no adapter touches is the base's, whatever the coefficients: nothing to measure, nothing to solve.
        idle = [stands is not None and not aligned.updates for aligned, stands in merged]
        name = UNCHANGED
        while name in labels:
            name += "_"
        labels = [name if untouched else label for label, untouched in zip(labels, idle, strict=True)]
        if any(idle):
            fixed[name] = tuple(weight / math.fsum(weights) for weight in weights)
    else:
        per_tensor = [
            method.coefficients(recipe, tensor=name, layer=layer_of(name), layers=layers)  # type: ignore[attr-defined]
            for name in names
        ]
        distinct = {row: number for number, row in enumerate(dict.fromkeys(per_tensor))}
        labels = ["model" if len(distinct) == 1 else f"weights {distinct[row] + 1}" for row in per_tensor]
        weights = per_tensor[0]
        fixed = dict(zip(labels, per_tensor, strict=True))
    order = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    elements = [0] * len(order)
    for label, (aligned, _) in zip(labels, merged, strict=True):
        elements[order[label]] += aligned.reference.elements
    groups = tuple(
        GroupPlan(name=label, elements=elements[index], coefficients=fixed[label]) for label, index in order.items()
    )
    label_of = dict(zip(names, labels, strict=True))
    return groups, tuple(order[label_of[a.name]] if a.merged else -1 for a in family.tensors), tuple(weights)


def _output_dtype(recipe: Recipe, aligned: Aligned, sources: Sources, *, factors: bool) -> str:
    """Return what a tensor is written as: `out_dtype`, else `dtype`, else what all models' dtypes promote to."""
    if not aligned.merged:
        return aligned.reference.dtype
    if word := recipe.out_dtype or recipe.dtype:
        return header_name(word)
    if factors:
        entries = [entry for _, update in aligned.updates for entry in (update.left, update.right) if entry is not None]
    else:
        held = [aligned.entries[index] or aligned.entries[sources.overs[index] or 0] for index in sources.models]
        entries = [entry for entry in held if entry is not None]
    return promote(tuple(dict.fromkeys(entry.dtype for entry in entries)))


def _places(aligned: Aligned, positions: Sequence[Mapping[str, int]]) -> tuple[Source | None, ...]:
    return tuple(
        Source(
            file=position[entry.file],
            start=entry.start,
            dtype=entry.dtype,
            copies=tuple((position[copy.file], copy.start) for copy in copies),
        )
        if entry is not None
        else None
        for entry, copies, position in zip(aligned.entries, aligned.copies, positions, strict=True)
    )


def _input(name: str, member: Member, over: int | None) -> Input:
    files = tuple(SourceFile(path=f.path, size_bytes=f.size_bytes, version=f.version) for f in member.files)
    # The folder, also where one file of it was named: paths of files are relative to the store.
    return Input(url=member.store.url, name=without_credentials(name), files=files, over=over)


def _donor(recipe: Recipe, sources: Sources) -> int:
    """Return the input whose configuration and tokenizer are copied: `tokenizer_source`, else base or first model."""
    if recipe.tokenizer_source in (None, "base"):
        return 0
    return sources.names.index(str(recipe.tokenizer_source))


def _check_tokenizer(recipe: Recipe, sources: Sources) -> None:
    """Raise when the recipe asks for a tokenizer that is not there."""
    donor = _donor(recipe, sources)
    if recipe.tokenizer_source is not None and not has_tokenizer(sources.members[donor].store):
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
    if recipe.pipeline.output == "model":
        donor = sources.donors(_donor(recipe, sources))[0]
        if recipe.tokenizer_source is None and not has_tokenizer(donor.store):
            notes.append(f"{donor.url} has no tokenizer files, so the output has none")
        if not donor.config:
            notes.append(
                f"{donor.url} has no config.json, so the output has none and transformers cannot load it as it is"
            )
    if len(sources.models) == 1:
        notes.append("one model only: the result is that model")
    if sources.base is None:
        notes.append("no base_model: norms and cosines of task vectors are not reported")
    return notes
