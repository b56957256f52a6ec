"""Symmetric matrices as their upper triangle, row by row, and what makes a statistic unusable.

Owns packing, unpacking, and the check of numbers. Must not know files. Legend: D the size of a matrix,
T = D(D+1)/2 the elements of its triangle.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

# Rows whose mirror image is written in one step: columns one by one would miss the cache at every element.
_MIRRORED_AT_ONCE = 64
# Elements looked at in one step: the check of a matrix of gigabytes needs no second one.
_CHECKED_AT_ONCE = 1 << 20
# By how much sums of millions of products in float32 may break |a_ij| ≤ √(a_ii a_jj), where equality holds.
_SUMMING_ROUNDING = 1.01


def pack_triangle(matrix_DD: Floats) -> Floats:
    """Return the upper triangle, row by row.

    Args:
        matrix_DD: Symmetric [D, D]; the lower triangle is not looked at.

    Returns:
        A new array [T] of the same dtype.
    """
    size = _size_of_square(matrix_DD)
    packed_T = np.empty(size * (size + 1) // 2, dtype=matrix_DD.dtype)
    start = 0
    for row in range(size):
        stop = start + size - row
        packed_T[start:stop] = matrix_DD[row, row:]
        start = stop
    return packed_T


def unpack_triangle(packed_T: Floats, out_DD: Floats | None = None) -> Floats:
    """Return the symmetric matrix of a triangle.

    Args:
        packed_T: Its upper triangle, row by row [T].
        out_DD: Filled and returned when given, of any floating dtype; else an array of the triangle's dtype is made.

    Raises:
        ValueError: The number of elements is that of no triangle, `out_DD` is of another size, or a finite element
            overflows its dtype.
    """
    size = triangle_size(packed_T.size)
    if out_DD is None:
        out_DD = np.empty((size, size), dtype=packed_T.dtype)
    if out_DD.shape != (size, size):
        raise ValueError(f"a triangle of {packed_T.size} elements fills [{size}, {size}], not {list(out_DD.shape)}")
    start = 0
    with np.errstate(over="raise"):
        for row in range(size):
            stop = start + size - row
            try:
                out_DD[row, row:] = packed_T[start:stop]
            except FloatingPointError as error:
                raise ValueError(f"an element in row {row} of the triangle overflows {out_DD.dtype}") from error
            start = stop
    for start in range(0, size, _MIRRORED_AT_ONCE):
        stop = min(start + _MIRRORED_AT_ONCE, size)
        square = out_DD[start:stop, start:stop]
        square[...] = np.triu(square) + np.triu(square, 1).T
        out_DD[stop:, start:stop] = out_DD[start:stop, stop:].T
    return out_DD


def triangle_size(elements: int) -> int:
    """Return the D of a triangle of so many elements; ValueError when there is none."""
    size = (math.isqrt(8 * elements + 1) - 1) // 2
    if size * (size + 1) // 2 != elements:
        raise ValueError(f"no triangle has {elements} elements")
    return size


def diagonal_of_triangle(packed_T: Floats) -> Floats:
    """Return the diagonal [D] of a packed matrix, a copy."""
    size = triangle_size(packed_T.size)
    rows = np.arange(size, dtype=np.int64)
    return packed_T[rows * size - rows * (rows - 1) // 2]


def statistic_fault(values: Floats, *, matrix: bool) -> str | None:
    """Return what makes a statistic unusable, or None.

    Numbers that are not finite, a negative diagonal, and of a matrix elements larger than their diagonals allow. A
    matrix that passes may still have negative eigenvalues: only a factorisation tells.

    Args:
        values: A diagonal of any shape, or a matrix as its packed triangle [T].
        matrix: Whether it is a triangle.
    """
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CHECKED_AT_ONCE):
        finite = np.isfinite(flat[start : start + _CHECKED_AT_ONCE])
        if not finite.all():
            place = start + int(np.argmin(finite))
            return f"element {place} of {flat.size} is {flat[place]}, not a finite number"
    diagonal = diagonal_of_triangle(flat) if matrix else flat
    if diagonal.size and diagonal.min() < 0:
        place = int(np.argmin(diagonal))
        return f"element {place} of its diagonal is {diagonal[place]:.3g}; a mean of squares is never negative"
    return _fault_beside_diagonal(flat, diagonal) if matrix else None


def _fault_beside_diagonal(packed_T: Floats, diagonal_D: Floats) -> str | None:
    """Return which element is too large to be a mean of products of what the diagonal has the squares of."""
    # A square below the smallest normal number may have vanished; what it was the square of has not.
    roots_D = np.sqrt(diagonal_D.astype(np.float64) + np.finfo(packed_T.dtype).tiny)
    start, size = 0, diagonal_D.size
    for row in range(size):
        stop = start + size - row
        beyond = np.abs(packed_T[start:stop]) > roots_D[row:] * (_SUMMING_ROUNDING * roots_D[row])
        if beyond.any():
            column = row + int(np.argmax(beyond))
            return (
                f"element ({row}, {column}) is {packed_T[start + column - row]:.3g} between {diagonal_D[row]:.3g} and"
                f" {diagonal_D[column]:.3g} on the diagonal: this is no mean of outer products"
            )
        start = stop
    return None


def _size_of_square(matrix_DD: Floats) -> int:
    if matrix_DD.ndim != 2 or matrix_DD.shape[0] != matrix_DD.shape[1]:
        raise ValueError(f"{list(matrix_DD.shape)} is no square matrix")
    return int(matrix_DD.shape[0])
