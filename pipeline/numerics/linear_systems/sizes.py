"""How much memory the solvers take, for the plan: pure arithmetic on shapes.

Owns the counts; must not import torch. What the caller hands in is its own to count. Legend: I inputs, O outputs.
"""

from __future__ import annotations

_FLOAT64_BYTES = 8


def diagonal_work_bytes(elements: int) -> int:
    """Return the most bytes an elementwise solve of so many elements allocates, the result included."""
    # Float64: reference, largest or total, anchor, shift, a share, a task vector, and temporaries; and masks.
    return elements * 10 * _FLOAT64_BYTES


def moments_work_bytes(inputs: int, outputs: int) -> int:
    """Return the bytes of the accumulators of one matrix and of what adding to them takes."""
    # Float64: sum and weighted moment with its unweighted copy; right-hand side and widened values.
    return _FLOAT64_BYTES * (3 * inputs * inputs + 2 * inputs * outputs)


def dense_work_bytes(inputs: int, outputs: int) -> int:
    """Return the most bytes a direct solve allocates besides its arguments, the result included."""
    # The scaled moment, eigenvectors, what LAPACK takes for them (2 I² and a copy) and the kept ones; residual, start,
    # step, and a temporary.
    return _FLOAT64_BYTES * (6 * inputs * inputs + 5 * inputs * outputs + 64 * inputs)


def iteration_work_bytes(inputs: int, outputs: int, *, element_bytes: int = 4) -> int:
    """Return the most bytes an iterative solve allocates besides its arguments, the result included."""
    # x, r, p, the product, and one factor of it; dot products take blocks of 2 MiB elements in float64, thrice.
    return element_bytes * 6 * inputs * outputs + 3 * _FLOAT64_BYTES * (1 << 21) + inputs * outputs
