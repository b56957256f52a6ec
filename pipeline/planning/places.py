"""Where chunks and factors lie in the inputs' files.

Owns the arithmetic from elements to byte ranges. Reads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.planning.grid import Chunk
from pipeline.planning.plan import Plan, Update


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """So many bytes of a file from `start` on; the path is relative to the input."""

    path: str
    start: int
    size_bytes: int


def chunk_range(plan: Plan, chunk: Chunk, index: int) -> ByteRange:
    """Return where a chunk lies in an input that holds its tensor whole."""
    source = plan.tensors[chunk.tensor].sources[index]
    if source is None:
        raise ValueError(f"input {index} does not hold tensor {plan.tensors[chunk.tensor].name} whole")
    width = DTYPES[source.dtype].bits // 8
    path = plan.inputs[index].files[source.file].path
    return ByteRange(path=path, start=source.start + chunk.start * width, size_bytes=chunk.elements * width)


def copy_ranges(plan: Plan, chunk: Chunk, index: int) -> tuple[ByteRange, ...]:
    """Return where an input holds tied copies of a chunk; nowhere if it does not hold the chunk's tensor whole."""
    source = plan.tensors[chunk.tensor].sources[index]
    if source is None:
        return ()
    width = DTYPES[source.dtype].bits // 8
    files = plan.inputs[index].files
    return tuple(
        ByteRange(path=files[file].path, start=start + chunk.start * width, size_bytes=chunk.elements * width)
        for file, start in source.copies
    )


def factor_ranges(plan: Plan, tensor: int, update: Update) -> tuple[ByteRange, ...]:
    """Return where the factors of an update lie: left, and right where there is one."""
    planned = plan.tensors[tensor]
    sides = [(update.left, planned.rows * update.rank), (update.right, planned.columns * update.rank)]
    files = plan.inputs[update.input].files
    return tuple(
        ByteRange(
            path=files[source.file].path,
            start=source.start,
            size_bytes=elements * (DTYPES[source.dtype].bits // 8),
        )
        for source, elements in sides
        if source is not None
    )
