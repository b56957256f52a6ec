"""A family whose inputs are checkpoints and adapters: which tensor each adapter adds to, or replaces.

Owns the joining of adapters to the tensors of the checkpoints they stand on. Legend: I inputs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from pipeline.checkpoints.adapter import Adapter, Factors, Placement, place
from pipeline.checkpoints.adapter_ties import tie_problems
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.header import TensorEntry
from pipeline.errors import CheckpointError, Problem
from pipeline.numerics.dtypes import is_mergeable
from pipeline.planning.family import Aligned, Family, align
from pipeline.storage import Store

Member = Checkpoint | Adapter

# Bytes compared at a time.
_PIECE_BYTES = 8 << 20
# Problems of one adapter, or names in a note, before the rest is left out: one cause makes hundreds.
_SHOWN = 4


def align_members(members: Sequence[Member], overs: Sequence[int | None]) -> Family:
    """Return the tensors of a family of checkpoints and adapters.

    Args:
        members: I open inputs; the first is a checkpoint.
        overs: Of each adapter, the index of the checkpoint it stands on; None for checkpoints.

    Raises:
        CheckpointError: Every mismatch between checkpoints; or else between adapters and what they stand on.
    """
    whole = [index for index, member in enumerate(members) if isinstance(member, Checkpoint)]
    family = align([member for member in members if isinstance(member, Checkpoint)])
    if len(whole) == len(members):
        return family
    placements: dict[int, Placement] = {}
    problems: list[Problem] = []
    notes: list[str] = []
    for index, (member, over) in enumerate(zip(members, overs, strict=True)):
        base = members[over] if over is not None else None
        if isinstance(member, Adapter) and isinstance(base, Checkpoint):
            try:
                placements[index], own = _without_copies(place(member, base), member, base)
                notes += own
            except CheckpointError as error:
                problems += _misfits(member, base, error.problems)
    if problems:
        raise CheckpointError(*problems)
    problems = [
        problem
        for index, placement in placements.items()
        for problem in _tied(placement, members, index, overs, family)
    ]
    if problems:
        raise CheckpointError(*problems)
    names = {aligned.name for aligned in family.tensors}
    updates, replaced = _by_tensor(placements, family.aliases, names)
    tensors = tuple(_joined(aligned, len(members), whole, updates, replaced) for aligned in family.tensors)
    problems = [problem for aligned in tensors for problem in _kind_problems(aligned, members)]
    if problems:
        raise CheckpointError(*problems)
    notes += dict.fromkeys(note for placement in placements.values() for note in placement.notes)
    return Family(
        tensors=tensors,
        aliases=family.aliases,
        notes=(*family.notes, *notes, *_base_notes(members, overs)),
        correction=placements[min(placements)].correction,
    )


def _tied(
    placement: Placement, members: Sequence[Member], index: int, overs: Sequence[int | None], family: Family
) -> list[Problem]:
    """Return changes of embeddings that the family ties, though the adapter's own base may not say so."""
    base = members[overs[index] or 0]
    if not family.aliases or not isinstance(base, Checkpoint):
        return []
    where = f"model {members[index].url} on {base.url}"
    return list(tie_problems(placement.updates, placement.replaced, base, family.aliases, where))


def _misfits(adapter: Adapter, base: Checkpoint, problems: Sequence[Problem]) -> list[Problem]:
    """Return why an adapter does not fit its base, the most likely cause first."""
    stated = adapter.base_name
    if not stated or _last(stated) == _last(base.url):
        return list(problems)
    first = Problem(
        what=f"does not fit the model that it stands on here; it says that it was trained on {stated}",
        where=f"model {adapter.url} on {base.url}",
        remedy="name that model as base_model, or write BASE+ADAPTER",
    )
    return [first, *problems[:_SHOWN]]


def _without_copies(placement: Placement, adapter: Adapter, base: Checkpoint) -> tuple[Placement, list[str]]:
    """Return a placement without the copies of the base's own values, and a note for each copy that is none.

    peft stores an adapted embedding or head whole beside its factors, although it was not trained.
    """
    notes = []
    replaced = dict(placement.replaced)
    for name, entry in placement.replaced.items():
        original = base.tensors.get(name)
        if name not in placement.updates or original is None:
            continue
        if entry.dtype == original.dtype and _same_bytes(adapter.store, entry, base.store, original):
            del replaced[name]
        else:
            notes.append(
                f"{adapter.url} stores values of its own for {name}, beside its factors: they replace the base's"
            )
    return dataclasses.replace(placement, replaced=replaced), notes


def _same_bytes(store: Store, entry: TensorEntry, other: Store, original: TensorEntry) -> bool:
    """Return whether two stored tensors of one size have the same bytes; the first difference ends the reading."""
    try:
        return all(
            store.read(entry.file, entry.start + begin, min(entry.start + begin + _PIECE_BYTES, entry.stop))
            == other.read(
                original.file, original.start + begin, min(original.start + begin + _PIECE_BYTES, original.stop)
            )
            for begin in range(0, entry.size_bytes, _PIECE_BYTES)
        )
    finally:
        store.close()
        other.close()


def _last(name: str) -> str:
    """Return the last part of a path or of a name on a hub, in small letters."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _by_tensor(
    placements: Mapping[int, Placement], aliases: Mapping[str, str], known: Collection[str]
) -> tuple[dict[str, list[tuple[int, Factors]]], dict[tuple[str, int], list[TensorEntry]]]:
    """Return updates by tensor, and replacements by tensor and input, a tied copy after the tensor itself."""
    updates: dict[str, list[tuple[int, Factors]]] = {}
    replaced: dict[tuple[str, int], list[TensorEntry]] = {}
    for index, placement in placements.items():
        # An adapter may store a copy of an embedding that no checkpoint stores; what is a tensor by itself is no copy.
        names = {**{alias: name for alias, name in placement.aliases.items() if alias not in known}, **aliases}
        for name, factors in placement.updates.items():
            updates.setdefault(names.get(name, name), []).append((index, factors))
        for name, entry in placement.replaced.items():
            members = replaced.setdefault((names.get(name, name), index), [])
            members.insert(len(members) if name in names else 0, entry)
    return updates, replaced


def _joined(
    aligned: Aligned,
    inputs: int,
    whole: Sequence[int],
    updates: Mapping[str, Sequence[tuple[int, Factors]]],
    replaced: Mapping[tuple[str, int], Sequence[TensorEntry]],
) -> Aligned:
    """Return a tensor of the checkpoints with what the adapters do to it."""
    entries: list[TensorEntry | None] = [None] * inputs
    copies: list[tuple[TensorEntry, ...]] = [()] * inputs
    for index, entry, further in zip(whole, aligned.entries, aligned.copies, strict=True):
        entries[index], copies[index] = entry, further
    for index in range(inputs):
        if found := replaced.get((aligned.name, index)):
            entries[index], copies[index] = found[0], tuple(found[1:])
    return Aligned(
        name=aligned.name,
        entries=tuple(entries),
        copies=tuple(copies),
        merged=aligned.merged,
        updates=tuple(updates.get(aligned.name, ())),
    )


def _kind_problems(aligned: Aligned, members: Sequence[Member]) -> list[Problem]:
    """Return adapters that add to integers, or replace a tensor by one of another kind."""
    problems = [
        Problem(
            what=f"adds to a tensor of {aligned.reference.dtype}, which can only be copied",
            where=f"model {members[index].url}, tensor {aligned.name}",
            remedy="leave the adapter out",
        )
        for index, _ in aligned.updates
        if not aligned.merged
    ]
    for index, entry in enumerate(aligned.entries):
        if entry is not None and is_mergeable(entry.dtype) != aligned.merged:
            problems.append(
                Problem(
                    what=f"dtype {entry.dtype}, but {aligned.reference.dtype} in the base",
                    where=f"model {members[index].url}, tensor {aligned.name}",
                    remedy="leave the adapter out",
                )
            )
    return problems


def _base_notes(members: Sequence[Member], overs: Sequence[int | None]) -> list[str]:
    """Return a note when adapters say that they were trained on another model than the one they stand on.

    Shapes cannot tell: two fine-tunes of one architecture take the same adapters.
    """
    notes = []
    for over in dict.fromkeys(over for over in overs if over is not None):
        standing = [m for m, stands in zip(members, overs, strict=True) if isinstance(m, Adapter) and stands == over]
        stated = Counter(member.base_name for member in standing if member.base_name)
        if any(_last(name) != _last(members[over].url) for name in stated):
            listed = ", ".join(
                f"{name} ({count} of {len(standing)})" for name, count in sorted(stated.items())[:_SHOWN]
            )
            notes.append(
                f"the adapters say that they were trained on {listed}; here they stand on {members[over].url}:"
                " make sure that this is the same model"
            )
    return notes
