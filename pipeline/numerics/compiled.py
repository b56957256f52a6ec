"""The CPU's element loops, compiled: read a 16-bit element once, widen it in a register, keep blocks in the cache.

Owns the loops' memory and their whole blocks; the loops themselves are `loop_code`'s, compiled when they are first
needed for a dtype and a number of points. `kernels` decides when they are used. They run without the interpreter's
lock. Every sum is taken in eight lanes by fused multiply-adds within a block of 256 elements, then over blocks, then
over lanes: an order that the number of elements fixes, on every processor. Legend: P points, E elements, L lanes, R
rows of lanes, Q pairs of points.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.numerics.element_code import element_of
from pipeline.numerics.loop_code import BLOCK, STRIP, combine_loop, gram_loop
from pipeline.numerics.vector_text import LANES

# A row of lanes is as long as a cache line, and begins with one.
_ROW_BYTES = LANES * 8


def gram(
    addresses_P: np.ndarray,
    kind: np.ndarray,
    elements: int,
    reference: int,
    gram_PP: np.ndarray,
    unchanged_P: np.ndarray,
) -> None:
    """Add a chunk's products of differences from one point, and its counts of equal elements.

    Args:
        addresses_P: int64, where each point's first element lies.
        kind: An array of the points' dtype, bfloat16 or its bits as uint16; only its type matters.
        elements: E.
        reference: The point that is subtracted. Its own differences, all zero, are left out of the products.
        gram_PP: float64, added to in its upper triangle.
        unchanged_P: int64, added to.
    """
    unchanged_P[reference] += elements
    others = [point for point in range(len(addresses_P)) if point != reference]
    count = len(others)
    if not count:
        return
    loop, first_Q, second_Q = gram_loop(element_of(kind.dtype), count)
    pairs = len(first_Q)
    address, rows_RL = _memory(pairs + count + count * (BLOCK // LANES))
    equal_address = address + pairs * _ROW_BYTES
    differences_address = equal_address + count * _ROW_BYTES
    for starts, covered in _blocks(addresses_P, kind, elements):
        sources = _pointers([starts[point] for point in others])
        loop(sources, starts[reference], covered, differences_address, address, equal_address)
    others_N, sums_R = np.array(others), rows_RL[: pairs + count].sum(axis=1)
    gram_PP[others_N[first_Q], others_N[second_Q]] += sums_R[:pairs]
    # What fills up the last block is equal everywhere.
    unchanged_P[others_N] += sums_R[pairs:].astype(np.int64) - (-elements % BLOCK)


def combine(
    addresses_P: np.ndarray,
    kind: np.ndarray,
    factors_P: np.ndarray,
    anchor: int,
    anchor_factor: float,
    values_E: np.ndarray,
    squared_P: np.ndarray,
) -> float:
    """Write x_r·f + Σ c_p (x_p − x_r), rounded once, and return the squared distance to its exact values.

    Args:
        addresses_P: int64, where each point's first element lies.
        kind: An array of the points' dtype, bfloat16 or its bits as uint16; only its type matters.
        factors_P: float64 c.
        anchor: r.
        anchor_factor: f.
        values_E: The output, contiguous: bfloat16 or its bits as uint16, float16, float32 or float64.
        squared_P: float64, added to: squared distances from what is written to the points.
    """
    points, elements = len(addresses_P), len(values_E)
    loop = combine_loop(element_of(kind.dtype), element_of(values_E.dtype))
    # The loop takes the anchor first and at least one other: alone, it stands beside itself.
    order = [anchor, *(point for point in range(points) if point != anchor)] if points > 1 else [anchor, anchor]
    count = len(order)
    factors = factors_P.tolist()
    shares = (ctypes.c_double * count)(*(factors[point] for point in order))
    address, rows_RL = _memory(count + 1 + count + count * (STRIP // LANES))
    block_address = address + (count + 1) * _ROW_BYTES
    strips_address = block_address + count * _ROW_BYTES
    done = 0
    for starts, covered in _blocks(addresses_P, kind, elements):
        fits = done + covered <= elements
        target_K = values_E[done:] if fits else np.empty(covered, dtype=values_E.dtype)
        sources = _pointers([starts[point] for point in order])
        target = target_K.ctypes.data
        loop(sources, shares, count, covered, anchor_factor, target, block_address, address, strips_address)
        if not fits:
            values_E[done:] = target_K[: elements - done]
        done += covered
    sums_P = rows_RL[: count + 1].sum(axis=1)
    squared_P[order[:points]] += sums_P[:points]
    return float(sums_P[count])


def _blocks(addresses_P: np.ndarray, kind: np.ndarray, elements: int) -> Iterator[tuple[list[int], int]]:
    """Yield addresses (P) and how many elements lie there: all full blocks, then the rest followed by zeros."""
    addresses = addresses_P.tolist()
    rest = elements % BLOCK
    if elements > rest:
        yield addresses, elements - rest
    if rest:
        skipped_bytes, rest_bytes, block_bytes = (size * kind.itemsize for size in (elements - rest, rest, BLOCK))
        filled, _rows_RL = _memory(len(addresses) * block_bytes // _ROW_BYTES)
        starts = [filled + point * block_bytes for point in range(len(addresses))]
        for start, address in zip(starts, addresses, strict=True):
            ctypes.memmove(start, address + skipped_bytes, rest_bytes)
        yield starts, BLOCK


def _memory(rows: int) -> tuple[int, np.ndarray]:
    """Return rows of lanes (R, L), float64 zeros that begin with a cache line, and their address before them."""
    memory = (ctypes.c_double * ((rows + 1) * LANES))()
    address = ctypes.addressof(memory)
    skipped_bytes = -address % _ROW_BYTES
    rows_RL = np.frombuffer(memoryview(memory), count=rows * LANES, offset=skipped_bytes)
    return address + skipped_bytes, rows_RL.reshape(rows, LANES)


def _pointers(addresses: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(addresses))(*addresses)
