"""What must hold of bytes that were read: copied tensors agree, and a second read brings what the first one did.

Owns the comparisons and their errors. Reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.engine.loaded import Loaded
from pipeline.errors import CheckpointError, Problem, VerificationError
from pipeline.planning.places import chunk_range
from pipeline.planning.plan import Plan


def check_agreement(plan: Plan, loaded: Loaded) -> None:
    """Raise when the inputs' bytes of a chunk are not all the same, as integers and booleans must be.

    Raises:
        CheckpointError: Names the first model that differs.
    """
    reference, *others = loaded.raw
    for index in others:
        if not np.array_equal(loaded.raw[reference], loaded.raw[index]):
            names = [plan.inputs[i].name for i in (index, reference)]
            tensor = plan.tensors[loaded.chunk.tensor]
            raise CheckpointError(
                Problem(
                    what=f"differs from the same tensor of {names[1]}; {tensor.dtype} is copied, never averaged",
                    where=f"model {names[0]}, tensor {tensor.name}",
                    remedy="leave one of the models out",
                )
            )


def check_sums(plan: Plan, loaded: Loaded, checksums: np.ndarray, factor_sums: Mapping[int, int]) -> None:
    """Raise when bytes differ from those of the first read.

    Args:
        plan: The plan.
        loaded: The chunk as read now.
        checksums: I hashes of the first read, as `chunk_checksums` makes them.
        factor_sums: By input, hashes of the factors as read now.

    Raises:
        VerificationError: Names model, tensor and range.
    """
    chunk = loaded.chunk
    for index in loaded.raw:
        if loaded.checksum(index) ^ factor_sums.get(index, 0) != checksums[index]:
            what = f"elements {chunk.start} to {chunk.stop}"
            raise _other_bytes(plan, what, index, chunk.tensor, chunk_range(plan, chunk, index).path)
    check_factor_sums(plan, chunk.tensor, factor_sums, checksums, skip=tuple(loaded.raw))


def check_factor_sums(
    plan: Plan, tensor: int, factor_sums: Mapping[int, int], checksums: np.ndarray, *, skip: Sequence[int] = ()
) -> None:
    """Raise when factors differ from those of the first read.

    Args:
        plan: The plan.
        tensor: Whose factors.
        factor_sums: By input, hashes of the factors as read now.
        checksums: I hashes of the first read.
        skip: Inputs whose hash holds more than their factors.

    Raises:
        VerificationError: Names model and tensor.
    """
    for update in plan.tensors[tensor].updates:
        if update.input not in skip and factor_sums[update.input] != checksums[update.input]:
            path = plan.inputs[update.input].files[update.left.file].path
            raise _other_bytes(plan, "its adapter's factors", update.input, tensor, path)


def _other_bytes(plan: Plan, what: str, index: int, tensor: int, path: str) -> VerificationError:
    return VerificationError(
        Problem(
            what=f"{what} are not the bytes of the first read",
            where=f"model {plan.inputs[index].name}, tensor {plan.tensors[tensor].name}, file {path}",
            remedy="the source changed or was read wrongly: check disk and memory, then start again with --overwrite",
        )
    )
