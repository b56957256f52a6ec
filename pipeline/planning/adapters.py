"""A family whose inputs are checkpoints and adapters: which tensor each adapter adds to, or replaces.

Owns the joining of adapters to the tensors of the checkpoints they stand on. Legend: I inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.checkpoints.adapter import Adapter, Factors, Placement, place
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.header import TensorEntry
from pipeline.errors import CheckpointError, Problem
from pipeline.numerics.dtypes import is_mergeable
from pipeline.planning.family import Aligned, Family, align

Member = Checkpoint | Adapter


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
    for index, (member, over) in enumerate(zip(members, overs, strict=True)):
        base = members[over] if over is not None else None
        if isinstance(member, Adapter) and isinstance(base, Checkpoint):
            try:
                placements[index] = place(member, base)
            except CheckpointError as error:
                problems += error.problems
    if problems:
        raise CheckpointError(*problems)
    updates, replaced = _by_tensor(placements, family.aliases)
    tensors = tuple(_joined(aligned, len(members), whole, updates, replaced) for aligned in family.tensors)
    problems = [problem for aligned in tensors for problem in _kind_problems(aligned, members)]
    if problems:
        raise CheckpointError(*problems)
    notes = dict.fromkeys(note for placement in placements.values() for note in placement.notes)
    return Family(tensors=tensors, aliases=family.aliases, notes=(*family.notes, *notes, *_base_notes(members, overs)))


def _by_tensor(
    placements: Mapping[int, Placement], aliases: Mapping[str, str]
) -> tuple[dict[str, list[tuple[int, Factors]]], dict[tuple[str, int], list[TensorEntry]]]:
    """Return updates by tensor, and replacements by tensor and input, a tied copy after the tensor itself."""
    updates: dict[str, list[tuple[int, Factors]]] = {}
    replaced: dict[tuple[str, int], list[TensorEntry]] = {}
    for index, placement in placements.items():
        # An adapter may store a copy of an embedding that no checkpoint stores.
        names = {**aliases, **placement.aliases}
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
    """Return a note when adapters over one checkpoint say that they were trained on different ones."""
    notes = []
    for over in dict.fromkeys(over for over in overs if over is not None):
        names = Counter(
            (member.base_name or "").rstrip("/").rpartition("/")[2]
            for member, stands in zip(members, overs, strict=True)
            if isinstance(member, Adapter) and stands == over and member.base_name
        )
        if len(names) > 1:
            listed = ", ".join(f"{name} ({count})" for name, count in sorted(names.items()))
            notes.append(f"the adapters over {members[over].url} name different base models: {listed}")
    return notes
