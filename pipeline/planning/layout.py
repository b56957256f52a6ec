"""How the output's tensors are laid into files.

Owns packing and naming: files of bounded size, groups kept whole where they fit, every tensor aligned.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.planning.plan import FilePlan, TensorPlan


def lay_out(
    tensors: Sequence[TensorPlan],
    *,
    file_size_bytes: int,
    solve_in_file: bool,
    fixed: frozenset[int] = frozenset(),
    name: str | None = None,
) -> tuple[FilePlan, ...]:
    """Return the output files.

    Args:
        tensors: The output's tensors, in the order of the reference.
        file_size_bytes: Largest file, except for a tensor that is larger by itself.
        solve_in_file: Whether a file that holds all of its groups may be measured, solved and written in one go.
        fixed: Groups that need no solving.
        name: Of the one file that holds everything.
    """
    bins: list[list[int]] = []
    room = 0
    for unit in _units(tensors, file_size_bytes):
        size = sum(tensors[index].stored_bytes for index in unit)
        if not bins or (size > room and name is None):
            bins.append([])
            room = file_size_bytes
        bins[-1] += unit
        room -= size
    homes: dict[int, set[int]] = {}
    for number, members in enumerate(bins):
        for index in members:
            homes.setdefault(tensors[index].group, set()).add(number)
    files = []
    for number, members in enumerate(bins):
        order = _order(tensors, members, fixed)
        groups = [-1 if tensors[index].group in fixed else tensors[index].group for index in order]
        solved = {group for group in groups if group >= 0}
        files.append(
            FilePlan(
                name=name or f"model-{number + 1:05d}-of-{len(bins):05d}.safetensors",
                tensors=tuple(order),
                size_bytes=sum(tensors[index].stored_bytes for index in order),
                fused=solve_in_file
                and bool(solved)
                and _contiguous(groups)
                and all(len(homes[group]) == 1 for group in solved),
            )
        )
    return tuple(files)


def _order(tensors: Sequence[TensorPlan], members: Sequence[int], fixed: frozenset[int]) -> list[int]:
    """Return a file's tensors in the order of their bytes, those that need no solving not between others.

    The widest types come first: every tensor then starts at a multiple of its own element size.
    """
    widest = max(DTYPES[tensors[index].dtype].bits for index in members)

    def key(index: int) -> tuple[int, bool, int]:
        bits = DTYPES[tensors[index].dtype].bits
        aside = tensors[index].group in fixed
        return -bits, aside != (bits == widest), index

    return sorted(members, key=key)


def _units(tensors: Sequence[TensorPlan], file_size_bytes: int) -> list[list[int]]:
    """Return what must not be torn apart: a whole group where it fits into a file, else its single tensors."""
    groups: dict[int, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.group, []).append(index)
    units: list[list[int]] = []
    for group, members in groups.items():
        whole = group >= 0 and sum(tensors[index].stored_bytes for index in members) <= file_size_bytes
        units += [members] if whole else [[index] for index in members]
    return units


def _contiguous(groups: Sequence[int]) -> bool:
    """Return whether each group's tensors follow one another, with no copied tensor (-1) between them."""
    starts = [group for index, group in enumerate(groups) if index == 0 or group != groups[index - 1]]
    runs = [group for group in starts if group >= 0]
    return len(runs) == len(set(runs))
