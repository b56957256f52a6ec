"""How much memory a system takes: sums of named parts, checked before work starts.

Owns the projection of one chunk and of one matrix. Pure arithmetic. Legend: I inputs, O outputs of a matrix.
"""

from __future__ import annotations

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.numerics.linear_systems import (
    dense_work_bytes,
    diagonal_work_bytes,
    iteration_work_bytes,
    moments_work_bytes,
)
from pipeline.planning.plan import Plan, TensorPlan
from pipeline.planning.system import System

# Float64 and float32 numbers.
_DOUBLE, _SINGLE = 8, 4
# Float64 rows of a chunk while task vectors are read or a solution is written: two widened values, their difference,
# the solution and its sum with the reference.
_CHUNK_COPIES = 5


def chunk_bytes(plan: Plan, tensor: TensorPlan, length: int) -> int:
    """Return what a chunk of so many elements takes beside the models' ranges and the merged chunk.

    Args:
        plan: The plan.
        tensor: Which tensor's.
        length: Elements.
    """
    system = tensor.system
    if system is None:
        return 0
    if not system.elementwise:
        return length * _DOUBLE * _CHUNK_COPIES
    diagonals = sum(_DOUBLE if statistic.dtype == "F64" else _SINGLE for statistic in system.statistics)
    # Updates of low rank make float64 values of each point that has one.
    composed = _DOUBLE * len(tensor.updates)
    return length * (diagonals + composed + 2 * _DOUBLE) + diagonal_work_bytes(length)


def matrix_sides(tensor: TensorPlan, system: System) -> tuple[int, int]:
    """Return I and O of a tensor's system; a block is one column of all its elements."""
    return (tensor.elements, 1) if system.objective == "block" else (tensor.columns, tensor.rows)


def matrix_bytes(plan: Plan, index: int, *, resident: bool = False) -> int:
    """Return what solving one matrix takes beside the chunks that it is read by; 0 where none is solved whole.

    Args:
        plan: The plan.
        index: Of the tensor.
        resident: Whether moments that every iteration needs are all held, and not read anew.
    """
    tensor = plan.tensors[index]
    system, solver = tensor.system, plan.settings.solver
    if system is None or solver is None or system.elementwise:
        return 0
    inputs, outputs = matrix_sides(tensor, system)
    area = inputs * outputs
    # The first point's values, one task vector, the start and the sum that it may be made of; and the merged matrix.
    values = (4 * _DOUBLE + DTYPES[tensor.dtype].bits // 8) * area
    if system.objective == "kfac":
        pair = sum(_pair_bytes(statistic.size, statistic.dtype) for statistic in system.terms[0].statistics)
        if resident:
            pair += sum(_SINGLE * s.size * s.size for term in system.terms for s in term.statistics)
        # The test that a moment is semidefinite scales a copy, narrows it and factors that.
        pair += (_DOUBLE + 2 * _SINGLE) * max(statistic.size**2 for statistic in system.terms[0].statistics)
        # Right-hand side, start, and what the product makes on its way.
        return values + pair + 4 * _SINGLE * area + iteration_work_bytes(inputs, outputs)
    moment = max((_pair_bytes(s.size, s.dtype) for s in system.statistics), default=_DOUBLE * 2 * inputs * inputs)
    gathered = moments_work_bytes(inputs, outputs) + moment
    if solver.rule == "direct":
        return values + gathered + dense_work_bytes(inputs, outputs)
    narrowed = _SINGLE * (inputs * inputs + 2 * area)
    return values + gathered + narrowed + iteration_work_bytes(inputs, outputs)


def _pair_bytes(size: int, dtype: str) -> int:
    """Return the bytes of a symmetric matrix as it is read: its triangle, and itself unpacked."""
    width = _DOUBLE if dtype == "F64" else _SINGLE
    return width * (size * (size + 1) // 2 + size * size)


def largest_matrix(plan: Plan, *, resident: bool = False) -> int:
    """Return what the largest matrix takes; 0 where none is solved whole."""
    return max((matrix_bytes(plan, index, resident=resident) for index in range(len(plan.tensors))), default=0)
