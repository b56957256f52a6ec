"""The arithmetic on one chunk: all pairwise distances, weighted combination, distances to given combinations.

Owns the CPU's kernels and what every device's return; knows nothing of files, plans or workers. Legend: P points (base
included where there is one), E elements of the chunk, K elements of a block, Q combinations. Points are one-dimensional
contiguous arrays of any float dtype of `dtypes`. Every kernel takes differences first, in float64, and accumulates in
float64 in an order fixed by E alone, so that its result does not depend on who computes it. The loops of `compiled` do
the work; the compiler is imported when the first chunk is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.numerics.dtypes import BFLOAT16, finite, widen

# Elements of one block: P x K float64 differences of ten models stay inside a core's second-level cache.
BLOCK_ELEMENTS = 1 << 14
# G_ii + G_jj - 2 G_ij is wrong by some 5e-15 of the larger diagonal entry: a squared distance below this share of it
# would have fewer than twelve digits.
CANCELLATION = 1e-2


# Normalised weights of any number of models sum to 1 far better than this.
_SUM_PRECISION = 1e-9
_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
# What the compiled loops read and write; the eight-bit types are widened for them, and are never written.
_COMPILED = frozenset((BFLOAT16, np.dtype(np.float16), _SINGLE, _DOUBLE))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkDistances:
    """What the measuring pass keeps of a chunk.

    Attributes:
        distances_PP: Squared Euclidean distances, float64, symmetric, zero diagonal. Not finite where a point is not.
        unchanged_P: How many elements equal the first point's.
    """

    distances_PP: np.ndarray
    unchanged_P: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """A merged chunk and how it lies among its points.

    Attributes:
        values_E: The combination in the output dtype, rounded once; an array, or a tensor of the points' device.
        squared_distances_P: From the rounded values to each point, float64.
        squared_rounding: Squared distance between the rounded values and the float64 combination.
    """

    values_E: Any
    squared_distances_P: np.ndarray
    squared_rounding: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkProbe:
    """Partial sums of given combinations m_q = Σ C_qp x_p over one chunk.

    Attributes:
        squared_distances_QP: ‖m_q − x_p‖², float64.
        products_QQ: ⟨m_q − m_0, m_s − m_0⟩, float64.
    """

    squared_distances_QP: np.ndarray
    products_QQ: np.ndarray


def work_bytes(points: int) -> int:
    """Return the float64 working memory of one kernel call: differences, their copy and a few rows, in bytes."""
    return (2 * points + 8) * BLOCK_ELEMENTS * 8


def pairwise_distances(points: Sequence[np.ndarray]) -> ChunkDistances:
    """Return all pairwise squared distances of a chunk.

    Args:
        points: P arrays of shape (E,); the first is the reference (the base where there is one).
    """
    alike = _of_one_kind(points)
    return distances_by(lambda reference: gram(alike, reference))


def distances_by(gram_from: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> ChunkDistances:
    """Return all pairwise squared distances from products of differences.

    The differences from the first point are formed in float64 (exact for 16-bit inputs of like magnitude), one
    symmetric product a block gives G, and D_ij = G_ii + G_jj − 2 G_ij. Pairs much closer to each other than to the
    first point are taken again from one of themselves, which serves all that lie around it.

    Args:
        gram_from: By the point that is subtracted, the products, symmetric, and counts of elements equal to its.
    """
    distances_PP, sound_PP, unchanged_P = _distances_from(gram_from, 0)
    while not sound_PP.all():
        reference = int(np.argmin(sound_PP.sum(axis=0)))
        again_PP, sound_again_PP, _ = _distances_from(gram_from, reference)
        better_PP = sound_again_PP & ~sound_PP
        distances_PP[better_PP] = again_PP[better_PP]
        sound_PP |= better_PP
    return ChunkDistances(distances_PP=distances_PP, unchanged_P=unchanged_P)


def total_factor(factors: Sequence[float]) -> float:
    """Return the sum of factors; one that is 1 up to rounding is meant to be 1, and is: values then stay what they are.

    Args:
        factors: Of any points.
    """
    total = math.fsum(factors)
    return 1.0 if abs(total - 1.0) < _SUM_PRECISION else total


def anchored(coefficients_P: Sequence[float]) -> tuple[np.ndarray, int, float]:
    """Return factors (P,) float64, the point r of the largest one, and what x_r itself is multiplied by."""
    factors_P = np.array(coefficients_P, dtype=np.float64)
    return factors_P, int(np.abs(factors_P).argmax()), total_factor(coefficients_P)


def combine(points: Sequence[np.ndarray], coefficients_P: Sequence[float], dtype: np.dtype[Any]) -> Combined:
    """Return Σ c_p x_p rounded once to `dtype`, with its distance from every point.

    Written as x_r + Σ c_p (x_p − x_r) around the point r of the largest coefficient: a combination that is one of the
    points is that point bit for bit, and so is one of equal points. The coefficients must sum to 1 unless the sum is
    not meant to be affine (`linear` without normalisation), in which case the missing part is added to x_r's share.

    Args:
        points: P arrays of shape (E,).
        coefficients_P: One factor a point.
        dtype: Output float type, of 16 bits or more.
    """
    from pipeline.numerics import compiled

    factors_P, anchor, anchor_factor = anchored(coefficients_P)
    alike = _of_one_kind(points)
    addresses_P, kind = _compiled_points(alike)
    values_E, squared_P = np.empty(points[0].shape, dtype=dtype), np.zeros(len(points))
    # What is not finite shows in the sums, and is the caller's finding.
    with np.errstate(over="ignore", invalid="ignore"):
        rounding = compiled.combine(addresses_P, kind, factors_P, anchor, anchor_factor, values_E, squared_P)
    return Combined(values_E=values_E, squared_distances_P=squared_P, squared_rounding=float(rounding))


def probe(points: Sequence[np.ndarray], coefficients_QP: np.ndarray) -> ChunkProbe:
    """Return the distances from given affine combinations to all points, taken from the parameters themselves.

    Sums are einsum's: of a matrix product, how many threads it takes may decide the order.

    Args:
        points: P arrays of shape (E,).
        coefficients_QP: float64; each row sums to 1.
    """
    count = len(coefficients_QP)
    squared_QP, products_QQ = np.zeros(coefficients_QP.shape), np.zeros((count, count))
    with np.errstate(over="ignore", invalid="ignore"):
        for differences_PK in _difference_blocks(points):
            combinations_QK = np.einsum("qp,pk->qk", coefficients_QP, differences_PK)
            for squared_P, combination_K in zip(squared_QP, combinations_QK, strict=True):
                offsets_PK = differences_PK - combination_K
                squared_P += np.einsum("pk,pk->p", offsets_PK, offsets_PK)
            steps_QK = combinations_QK - combinations_QK[0]
            products_QQ += np.einsum("qk,sk->qs", steps_QK, steps_QK)
    return ChunkProbe(squared_distances_QP=squared_QP, products_QQ=products_QQ)


def gram(points: Sequence[np.ndarray], reference: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the products of the differences from one point, symmetric, and the counts of elements equal to its.

    Args:
        points: P arrays of shape (E,), of one dtype that the compiled loops read.
        reference: The point that is subtracted.
    """
    from pipeline.numerics import compiled

    count = len(points)
    addresses_P, kind = _compiled_points(points)
    gram_PP, unchanged_P = np.zeros((count, count)), np.zeros(count, dtype=np.int64)
    with np.errstate(over="ignore", invalid="ignore"):
        compiled.gram(addresses_P, kind, points[0].size, reference, gram_PP, unchanged_P)
    upper_PP = np.triu(gram_PP)
    return upper_PP + np.triu(upper_PP, k=1).T, unchanged_P


def non_finite_counts(points: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Return how many elements of each point are NaN or infinite."""
    return tuple(point.size - int(np.count_nonzero(finite(point))) for point in points)


def replace_non_finite(values_E: np.ndarray, base_E: np.ndarray) -> np.ndarray:
    """Return `values_E` with every NaN and infinity replaced by the base's value (float64 then, else unchanged)."""
    finite_E = finite(values_E)
    if bool(finite_E.all()):
        return values_E
    return np.where(finite_E, widen(values_E, _DOUBLE), widen(base_E, _DOUBLE))


def _difference_blocks(points: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield float64 differences from the first point, of shape (P, K); the buffer is reused."""
    elements = points[0].size
    buffer_PK = np.empty((len(points), min(BLOCK_ELEMENTS, elements)))
    for start in range(0, elements, BLOCK_ELEMENTS):
        block_PK = buffer_PK[:, : min(BLOCK_ELEMENTS, elements - start)]
        for row_K, point in zip(block_PK, points, strict=True):
            row_K[:] = widen(point[start : start + BLOCK_ELEMENTS], _DOUBLE)
        block_PK -= block_PK[0].copy()
        yield block_PK


def _distances_from(
    gram_from: Callable[[int], tuple[np.ndarray, np.ndarray]], reference: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return squared distances by differences from one point, which of them are sound, and elements equal to its."""
    gram_PP, unchanged_P = gram_from(reference)
    diagonal_P = np.diagonal(gram_PP)
    # Infinite parameters are the caller's finding, not a warning of ours.
    with np.errstate(over="ignore", invalid="ignore"):
        distances_PP = diagonal_P[:, None] + diagonal_P[None, :] - (gram_PP + gram_PP.T)
    np.fill_diagonal(distances_PP, 0.0)
    # A comparison with NaN is false: what is not finite stays so from any reference.
    sound_PP = ~(distances_PP < CANCELLATION * np.maximum(diagonal_P[:, None], diagonal_P[None, :]))
    np.fill_diagonal(sound_PP, True)
    # From the point itself nothing cancels.
    sound_PP[reference, :] = sound_PP[:, reference] = True
    return distances_PP, sound_PP, unchanged_P


def _of_one_kind(points: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return contiguous points of one dtype that the compiled loops read.

    Points of several dtypes are widened to one that holds all their values exactly: float32, or float64 if one is.
    """
    dtypes = {point.dtype for point in points}
    dtype = points[0].dtype
    if len(dtypes) > 1 or dtype not in _COMPILED:
        dtype = _DOUBLE if _DOUBLE in dtypes else _SINGLE
    return [np.ascontiguousarray(widen(point, dtype)) for point in points]


def _compiled_points(points: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the addresses of the points' elements, and an empty array of their dtype."""
    addresses_P = np.array([point.ctypes.data for point in points], dtype=np.int64)
    return addresses_P, np.empty(0, dtype=points[0].dtype)
