"""The arithmetic on one chunk: all pairwise distances, weighted combination, distances to given combinations.

Owns the element loops; knows nothing of files, plans or workers. Legend: P points (base included where there is one),
E elements of the chunk, K elements of a block, Q combinations. Points are one-dimensional tensors of any float dtype on
one device. Every kernel takes differences first, in float64, and accumulates in float64 in an order fixed by E alone,
so that its result does not depend on who computes it. On the CPU the loops of `compiled` do the work; the same
arithmetic in torch serves other devices and output types, and is what the compiled loops are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.numerics import compiled
from pipeline.numerics.dtypes import round_once

# Elements of one block: P x K float64 differences of ten models stay inside a core's second-level cache.
BLOCK_ELEMENTS = 1 << 14
# G_ii + G_jj - 2 G_ij is wrong by some 5e-15 of the larger diagonal entry: a squared distance below this share of it
# would have fewer than twelve digits.
CANCELLATION = 1e-2


# Normalised weights of any number of models sum to 1 far better than this.
_SUM_PRECISION = 1e-9
# What the compiled loops read and write, and the NumPy dtype that stands for it; bfloat16 is its bits.
_COMPILED = {torch.bfloat16: np.uint16, torch.float32: np.float32, torch.float64: np.float64}


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
        values_E: The combination in the output dtype, rounded once.
        squared_distances_P: From the rounded values to each point, float64.
        squared_rounding: Squared distance between the rounded values and the float64 combination.
    """

    values_E: torch.Tensor
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


def pairwise_distances(points: Sequence[torch.Tensor]) -> ChunkDistances:
    """Return all pairwise squared distances of a chunk.

    The differences from the first point are formed in float64 (exact for 16-bit inputs of like magnitude), one
    symmetric product a block gives G, and D_ij = G_ii + G_jj − 2 G_ij. Pairs much closer to each other than to the
    first point are taken again from one of themselves, which serves all that lie around it.

    Args:
        points: P tensors of shape (E,); the first is the reference (the base where there is one).
    """
    distances_PP, sound_PP, unchanged_P = _distances_from(points, 0)
    while not sound_PP.all():
        reference = int(np.argmin(sound_PP.sum(axis=0)))
        again_PP, sound_again_PP, _ = _distances_from(points, reference)
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


def combine(points: Sequence[torch.Tensor], coefficients_P: Sequence[float], dtype: torch.dtype) -> Combined:
    """Return Σ c_p x_p rounded once to `dtype`, with its distance from every point.

    Written as x_r + Σ c_p (x_p − x_r) around the point r of the largest coefficient: a combination that is one of the
    points is that point bit for bit, and so is one of equal points. The coefficients must sum to 1 unless the sum is
    not meant to be affine (`linear` without normalisation), in which case the missing part is added to x_r's share.

    Args:
        points: P tensors of shape (E,).
        coefficients_P: One factor a point.
        dtype: Output float type.
    """
    factors = np.array(coefficients_P, dtype=np.float64)
    anchor = int(np.abs(factors).argmax())
    anchor_factor = total_factor(coefficients_P)
    if points[0].device.type == "cpu" and dtype in _COMPILED:
        return _combine_compiled(points, factors, anchor, anchor_factor, dtype)
    return _combine_torch(points, factors, anchor, anchor_factor, dtype)


def _combine_compiled(
    points: Sequence[torch.Tensor], factors: np.ndarray, anchor: int, anchor_factor: float, dtype: torch.dtype
) -> Combined:
    addresses_P, kind, _alive = _compiled_points(points)
    values_E = torch.empty(points[0].numel(), dtype=dtype)
    squared_P = np.zeros(len(points))
    rounding = compiled.combine(addresses_P, kind, factors, anchor, anchor_factor, _as_array(values_E), squared_P)
    return Combined(values_E=values_E, squared_distances_P=squared_P, squared_rounding=float(rounding))


def _combine_torch(
    points: Sequence[torch.Tensor], factors: np.ndarray, anchor: int, anchor_factor: float, dtype: torch.dtype
) -> Combined:
    device = points[0].device
    factors_P = torch.from_numpy(factors).to(device)
    values_E = torch.empty_like(points[0], dtype=dtype)
    squared_P = torch.zeros(len(points), dtype=torch.float64, device=device)
    rounding = torch.zeros((), dtype=torch.float64, device=device)
    for start, differences_PK in _difference_blocks(points, anchor):
        block = slice(start, start + differences_PK.shape[1])
        anchor_K = points[anchor][block].to(torch.float64)
        shift_K = factors_P @ differences_PK
        # x + (-0.0) is x, whereas -0.0 + 0.0 would lose the sign of a zero that the points share.
        exact_K = anchor_factor * anchor_K + torch.where(shift_K == 0, -0.0, shift_K)
        rounded_K = round_once(exact_K, dtype)
        values_E[block] = rounded_K
        written_K = rounded_K.to(torch.float64)
        rounding += (written_K - exact_K).square().sum()
        squared_P += differences_PK.sub_(written_K - anchor_K).square_().sum(dim=1)
    return Combined(
        values_E=values_E, squared_distances_P=squared_P.cpu().numpy(), squared_rounding=float(rounding.cpu())
    )


def probe(points: Sequence[torch.Tensor], coefficients_QP: np.ndarray) -> ChunkProbe:
    """Return the distances from given affine combinations to all points, taken from the parameters themselves.

    Args:
        points: P tensors of shape (E,).
        coefficients_QP: float64; each row sums to 1.
    """
    device = points[0].device
    factors_QP = torch.from_numpy(np.ascontiguousarray(coefficients_QP)).to(device)
    squared_QP = torch.zeros(factors_QP.shape, dtype=torch.float64, device=device)
    products_QQ = torch.zeros((len(factors_QP), len(factors_QP)), dtype=torch.float64, device=device)
    for _, differences_PK in _difference_blocks(points, 0):
        combinations_QK = factors_QP @ differences_PK
        for row, combination_K in enumerate(combinations_QK):
            squared_QP[row] += (differences_PK - combination_K).square_().sum(dim=1)
        steps_QK = combinations_QK - combinations_QK[0]
        products_QQ += steps_QK @ steps_QK.T
    return ChunkProbe(squared_distances_QP=squared_QP.cpu().numpy(), products_QQ=products_QQ.cpu().numpy())


def non_finite_counts(points: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return how many elements of each point are NaN or infinite."""
    return tuple(int((~_finite(point)).sum()) for point in points)


def replace_non_finite(values_E: torch.Tensor, base_E: torch.Tensor) -> torch.Tensor:
    """Return `values_E` with every NaN and infinity replaced by the base's value (float64 then, else unchanged)."""
    finite_E = _finite(values_E)
    if bool(finite_E.all()):
        return values_E
    return torch.where(finite_E, values_E.to(torch.float64), base_E.to(torch.float64))


def _finite(values_E: torch.Tensor) -> torch.Tensor:
    """Return a mask of the finite elements; torch has no such test for the eight-bit floats."""
    return torch.isfinite(values_E.to(torch.float32) if values_E.element_size() == 1 else values_E)


def _difference_blocks(points: Sequence[torch.Tensor], reference: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (start, float64 differences from points[reference] of shape (P, K)); the buffer is reused."""
    elements = points[0].numel()
    size = min(BLOCK_ELEMENTS, elements)
    buffer = torch.empty((len(points), size), dtype=torch.float64, device=points[0].device)
    for start in range(0, elements, BLOCK_ELEMENTS):
        stop = min(start + BLOCK_ELEMENTS, elements)
        # A short last block gets a buffer of its own: a strided view would take another path through the product.
        block_PK = buffer if stop - start == size else torch.empty_like(buffer[:, : stop - start])
        for row, point in zip(block_PK, points, strict=True):
            row.copy_(point[start:stop])
        block_PK -= block_PK[reference].clone()
        yield start, block_PK


def _distances_from(points: Sequence[torch.Tensor], reference: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return squared distances by differences from one point, which of them are sound, and elements equal to its."""
    on_cpu = points[0].device.type == "cpu"
    gram_PP, unchanged_P = (_gram_compiled if on_cpu else _gram_torch)(points, reference)
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


def _gram_compiled(points: Sequence[torch.Tensor], reference: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the products of the differences from one point, symmetric, and the counts of elements equal to its."""
    count = len(points)
    addresses_P, kind, _alive = _compiled_points(points)
    gram_PP, unchanged_P = np.zeros((count, count)), np.zeros(count, dtype=np.int64)
    compiled.gram(addresses_P, kind, points[0].numel(), reference, gram_PP, unchanged_P)
    upper_PP = np.triu(gram_PP)
    return upper_PP + np.triu(upper_PP, k=1).T, unchanged_P


def _gram_torch(points: Sequence[torch.Tensor], reference: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what `_gram_compiled` does, computed by torch on the points' device."""
    count = len(points)
    gram_PP = torch.zeros((count, count), dtype=torch.float64, device=points[0].device)
    unchanged_P = torch.zeros(count, dtype=torch.int64, device=points[0].device)
    for _, differences_PK in _difference_blocks(points, reference):
        gram_PP += differences_PK @ differences_PK.T
        unchanged_P += (differences_PK == 0).sum(dim=1)
    return gram_PP.cpu().numpy(), unchanged_P.cpu().numpy()


def _compiled_points(points: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
    """Return the addresses of the points' elements, an empty array of their dtype, and what must stay alive meanwhile.

    Points of several dtypes are widened to one that holds all their values exactly: float32, or float64 if one is.
    """
    dtypes = {point.dtype for point in points}
    dtype = points[0].dtype
    if len(dtypes) > 1 or dtype not in _COMPILED:
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    alive = [point.to(dtype).contiguous() for point in points]
    addresses_P = np.array([point.data_ptr() for point in alive], dtype=np.int64)
    return addresses_P, np.empty(0, dtype=_COMPILED[dtype]), alive


def _as_array(values_E: torch.Tensor) -> np.ndarray:
    """Return a tensor's memory as an array; bfloat16, which NumPy lacks, as its bits."""
    if values_E.dtype == torch.bfloat16:
        return values_E.view(torch.int16).numpy().view(np.uint16)
    return values_E.numpy()
