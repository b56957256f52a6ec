"""The CPU's element loops, compiled: read a 16-bit element once, widen it in a register, keep blocks in the cache.

Owns machine code for points of one dtype (bfloat16 as its bits, float32, float64). `kernels` decides when it is used
and has the same arithmetic in torch for other devices. The loops run without the interpreter's lock. Sums are float64
in an order that the number of elements fixes, on one kind of processor: the width of its vector registers decides how
many partial sums a block has. Legend: P points, E elements, K elements of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# Elements of a block: a row of float64 differences is 4 KiB, so that those of ten models stay in the first-level cache.
BLOCK = 512
# Sums may be reassociated into vector lanes and products contracted; NaN, infinities and signed zeros keep their
# meaning.
_MATH = {"reassoc", "contract"}


@intrinsic
def _pointer(_: Any, address: Any) -> Any:
    """Return an integer address as a pointer."""

    def generate(__: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def _bitcast(source: Any, target: Any) -> Any:
    """Return an intrinsic that takes the bits of one scalar type as another."""

    @intrinsic
    def cast(_: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, ___: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return cast


_float_of_bits = _bitcast(types.uint32, types.float32)
_bits_of_float = _bitcast(types.float32, types.uint32)


@intrinsic
def _bfloat16_bits(_: Any, value: Any) -> Any:
    """Return 16 bits in the upper half of 32, without the detour by 64 bits that a shift of NumPy scalars takes."""

    def generate(context: Any, builder: Any, ___: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], context.get_value_type(types.uint32))
        return builder.shl(wide, wide.type(16))

    return types.uint32(types.uint16), generate


def _widen(value):
    """Return an element as float64; uint16 holds the bits of a bfloat16."""
    raise LookupError("only for compiled code")


@overload(_widen, inline="always")
def _widen_compiled(value):
    if value == types.uint16:
        return lambda value: np.float64(_float_of_bits(_bfloat16_bits(value)))
    return lambda value: np.float64(value)


def _round(value, kind):
    """Return a float64 rounded once to nearest even in the dtype of the array `kind`."""
    raise LookupError("only for compiled code")


@overload(_round, inline="always")
def _round_compiled(value, kind):
    if kind.dtype == types.float64:
        return lambda value, kind: value
    if kind.dtype == types.float32:
        return lambda value, kind: np.float32(value)

    def to_bfloat16(value, kind):
        # Round to odd in float32 first, so that the second rounding sees on which side of a tie the value lies.
        single = np.float32(value)
        back = np.float64(single)
        bits = _bits_of_float(single)
        if back != value and np.isfinite(value):
            if abs(back) > abs(value):
                bits -= np.uint32(1)
            bits |= np.uint32(1)
        if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return to_bfloat16


@njit(nogil=True, cache=True, error_model="numpy", fastmath=_MATH)
def gram(addresses_P: Any, kind: Any, elements: int, reference: int, gram_PP: Any, unchanged_P: Any) -> None:
    """Add a chunk's products of differences from one point, and its counts of equal elements.

    Args:
        addresses_P: int64, where each point's first element lies.
        kind: An array of the points' dtype; only its type matters.
        elements: E.
        reference: The point that is subtracted.
        gram_PP: float64, added to in its upper triangle.
        unchanged_P: int64, added to.
    """
    points = len(addresses_P)
    differences_PK = np.empty((points, BLOCK))
    reference_K = np.empty(BLOCK)
    for start in range(0, elements, BLOCK):
        size = min(BLOCK, elements - start)
        source = carray(_pointer(addresses_P[reference]), elements, kind.dtype)[start : start + size]
        for k in range(size):
            reference_K[k] = _widen(source[k])
        for p in range(points):
            source = carray(_pointer(addresses_P[p]), elements, kind.dtype)[start : start + size]
            row_K = differences_PK[p]
            equal = 0
            for k in range(size):
                row_K[k] = _widen(source[k]) - reference_K[k]
                equal += row_K[k] == 0.0
            row_K[size:] = 0.0
            unchanged_P[p] += equal
        # Two rows against two: each loaded value serves two products.
        for i in range(0, points, 2):
            i1 = min(i + 1, points - 1)
            for j in range(i, points, 2):
                j1 = min(j + 1, points - 1)
                a_K, b_K, c_K, d_K = differences_PK[i], differences_PK[i1], differences_PK[j], differences_PK[j1]
                ac = ad = bc = bd = 0.0
                for k in range(BLOCK):
                    ac += a_K[k] * c_K[k]
                    ad += a_K[k] * d_K[k]
                    bc += b_K[k] * c_K[k]
                    bd += b_K[k] * d_K[k]
                gram_PP[i, j] += ac
                if j1 > j:
                    gram_PP[i, j1] += ad
                if i1 > i and j > i:
                    gram_PP[i1, j] += bc
                if i1 > i and j1 > j:
                    gram_PP[i1, j1] += bd


@njit(nogil=True, cache=True, error_model="numpy", fastmath=_MATH)
def combine(
    addresses_P: Any, kind: Any, factors_P: Any, anchor: int, anchor_factor: float, values_E: Any, squared_P: Any
) -> float:
    """Write x_r·f + Σ c_p (x_p − x_r), rounded once, and return the squared distance to its exact values.

    Args:
        addresses_P: int64, where each point's first element lies.
        kind: An array of the points' dtype; only its type matters.
        factors_P: float64 c.
        anchor: r.
        anchor_factor: f.
        values_E: The output: bits of bfloat16 as uint16, float32 or float64.
        squared_P: float64, added to: squared distances from what is written to the points.
    """
    elements, points = len(values_E), len(addresses_P)
    differences_PK = np.empty((points, BLOCK))
    anchor_K, shift_K, offset_K = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    rounding = 0.0
    for start in range(0, elements, BLOCK):
        size = min(BLOCK, elements - start)
        source = carray(_pointer(addresses_P[anchor]), elements, kind.dtype)[start : start + size]
        for k in range(size):
            anchor_K[k] = _widen(source[k])
            shift_K[k] = 0.0
        for p in range(points):
            source = carray(_pointer(addresses_P[p]), elements, kind.dtype)[start : start + size]
            row_K, factor = differences_PK[p], factors_P[p]
            for k in range(size):
                row_K[k] = _widen(source[k]) - anchor_K[k]
                shift_K[k] += factor * row_K[k]
        target = values_E[start : start + size]
        for k in range(size):
            scaled = anchor_factor * anchor_K[k]
            # A shift of zero must not turn -0.0 into 0.0.
            exact = scaled if shift_K[k] == 0.0 else scaled + shift_K[k]
            target[k] = _round(exact, values_E)
            written = _widen(target[k])
            offset_K[k] = written - anchor_K[k]
            rounding += (written - exact) * (written - exact)
        for p in range(points):
            row_K = differences_PK[p]
            total = 0.0
            for k in range(size):
                distance = row_K[k] - offset_K[k]
                total += distance * distance
            squared_P[p] += total
    return rounding
