"""Distances of low-rank updates ΔW = scale · left · right, on the factors: no update is materialised.

Owns inner products and pairwise distances of the updates of one matrix, in forms that hold for near-duplicates too;
must not know what is done with them. All arithmetic is float64 in an order that shapes alone fix.

Legend: P updates, M rows and K columns of the matrix, R rank columns, W rank columns of a panel, D either of M and K.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.numerics.kernels import CANCELLATION
from pipeline.numerics.low_rank.factors import LowRank, Stack, spans

# A symmetric product is made in this many stairs, which saves three eighths of it; more would be too narrow to be fast.
_STAIRS = 4


def pairwise_low_rank(updates: Sequence[LowRank | None]) -> np.ndarray:
    """Return all pairwise squared Frobenius distances of the updates of one matrix.

    ⟨ΔW_i, ΔW_j⟩ = s_i s_j Σ (U_iᵀU_j) ∘ (V_iV_jᵀ) for all pairs at once. Where D_ij = G_ii + G_jj − 2 G_ij, or the
    columns of one update among themselves, cancel more than a hundredfold, the pair is taken again on its own.

    Args:
        updates: P updates of one matrix, any ranks, scales and float dtypes; None is the zero update.

    Returns:
        (P, P) float64, symmetric, zero diagonal; not finite where an update is not.

    Raises:
        ValueError: The shapes do not belong to one matrix.
    """
    if all(update is None for update in updates):
        return np.zeros((len(updates), len(updates)))
    stack = Stack(updates)
    # Values that are not finite are the caller's finding, not a warning of ours.
    with np.errstate(over="ignore", invalid="ignore"):
        gram_PP, parallel_P = _gram(stack)
        squares_P = np.diagonal(gram_PP)
        distances_PP = squares_P[:, None] + squares_P[None, :] - (gram_PP + gram_PP.T)
        reach_P = np.maximum(squares_P, parallel_P)
        # A comparison with NaN is false: what is not finite stays so.
        unsound_PP = distances_PP < CANCELLATION * np.maximum(reach_P[:, None], reach_P[None, :])
    np.fill_diagonal(distances_PP, 0.0)
    for i, j in np.argwhere(np.triu(unsound_PP, k=1)).tolist():
        distances_PP[i, j] = distances_PP[j, i] = pair_distance(stack.updates[i], stack.updates[j])
    return np.asarray(distances_PP)


def distances_to(written: LowRank, updates: Sequence[LowRank | None]) -> np.ndarray:
    """Return the squared distance from one update to each of the others.

    Args:
        written: The update to measure from; its rank may be that of all others together.
        updates: P updates of the same matrix; None is the zero update.

    Returns:
        (P,) float64; not finite where an update is not.

    Raises:
        ValueError: The shapes do not belong to one matrix.
    """
    measured = Stack([written])
    present = [p for p, update in enumerate(updates) if update is not None]
    products_P, squares_P, parallel_P = np.zeros(len(updates)), np.zeros(len(updates)), np.zeros(len(updates))
    with np.errstate(over="ignore", invalid="ignore"):
        own_11, own_parallel_1 = _gram(measured)
        if present:
            others = Stack([updates[p] for p in present])
            products_P[present] = _cross(measured, others)[0]
        for p in present:
            square_11, parallel_1 = _gram(Stack([updates[p]]))
            squares_P[p], parallel_P[p] = square_11[0, 0], parallel_1[0]
        distances_P = own_11[0, 0] + squares_P - 2.0 * products_P
        reach_P = np.maximum(np.maximum(squares_P, parallel_P), max(own_11[0, 0], own_parallel_1[0]))
        unsound_P = distances_P < CANCELLATION * reach_P
    zero = Stack([written, None]).updates[1]
    for p in np.flatnonzero(unsound_P).tolist():
        distances_P[p] = pair_distance(written, updates[p] or zero)
    return np.asarray(distances_P)


def _gram(stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """Return ⟨ΔW_i, ΔW_j⟩, symmetric, and by update Σ_a ‖u_a‖²‖v_a‖², which the square is without cancellation."""
    count = len(stack.updates)
    gram_PP, parallel_P = np.zeros((count, count)), np.zeros(count)
    panels = list(stack.panels())
    for index, first in enumerate(panels):
        owners, starts = stack.owners(first)
        for second in panels[index:]:
            products_WW = _products(stack, stack, first, second)
            others, other_starts = stack.owners(second)
            sums = np.add.reduceat(np.add.reduceat(products_WW, starts, axis=0), other_starts, axis=1)
            gram_PP[np.ix_(owners, others)] += sums
            if second == first:
                parallel_P[owners] += np.add.reduceat(np.diagonal(products_WW), starts)
            else:
                gram_PP[np.ix_(others, owners)] += sums.T
    scales_P = stack.scales
    return gram_PP * np.outer(scales_P, scales_P), parallel_P * scales_P**2


def _cross(first: Stack, second: Stack) -> np.ndarray:
    """Return ⟨ΔW_i, ΔW_j⟩ for i of one stack and j of another."""
    cross_PP = np.zeros((len(first.updates), len(second.updates)))
    for ranks in first.panels():
        owners, starts = first.owners(ranks)
        for other_ranks in second.panels():
            products_WW = _products(first, second, ranks, other_ranks)
            others, other_starts = second.owners(other_ranks)
            sums = np.add.reduceat(np.add.reduceat(products_WW, starts, axis=0), other_starts, axis=1)
            cross_PP[np.ix_(owners, others)] += sums
    return cross_PP * np.outer(first.scales, second.scales)


def _products(first: Stack, second: Stack, ranks: slice, other_ranks: slice) -> np.ndarray:
    """Return (U_aᵀU_b)(V_aV_bᵀ) for the rank columns of two panels, unscaled, (W, W) float64."""
    same = first is second and ranks == other_ranks
    shape = (ranks.stop - ranks.start, other_ranks.stop - other_ranks.start)
    left_WW = torch.zeros(shape, dtype=torch.float64, device=first.device)
    right_WW = torch.zeros_like(left_WW)
    for rows in spans(first.rows):
        left_MW = first.left(ranks, rows)
        _add_product(left_WW, left_MW.T, None if same else second.left(other_ranks, rows).T)
    for columns in spans(first.columns):
        right_WK = first.right(ranks, columns)
        _add_product(right_WW, right_WK, None if same else second.right(other_ranks, columns))
    return np.asarray(left_WW.mul_(right_WW).cpu().numpy())


def _add_product(sum_WW: torch.Tensor, first_WD: torch.Tensor, second_WD: torch.Tensor | None) -> None:
    """Add first·secondᵀ to a sum; None stands for the first, whose product is symmetric to the last bit."""
    if second_WD is not None:
        sum_WW.addmm_(first_WD, second_WD.T)
        return
    for stair in spans(len(first_WD), max(64, -(-len(first_WD) // _STAIRS))):
        below = slice(stair.stop, None)
        sum_WW[stair, stair].addmm_(first_WD[stair], first_WD[stair].T)
        sum_WW[stair, below].addmm_(first_WD[stair], first_WD[below].T)
        sum_WW[below, stair] = sum_WW[stair, below].T


def pair_distance(first: LowRank, second: LowRank) -> float:
    """Return ‖ΔW_1 − ΔW_2‖² of two updates that may be near, exactly 0 for equal ones, by the better of two forms.

    [U_1 − U_2, U_2]·[V_1; V_1 − V_2] if the factors are near each other, [U_1, −U_2]·[V_1; V_2] if only the products
    are. The one with the smaller Σ_a ‖x_a‖‖y_a‖ rounds less. Columns that only one has are the same in both. The larger
    scale is factored out, so that equal scales do not round at all.
    """
    scale = max(abs(first.scale), abs(second.scale))
    if scale == 0.0:
        return 0.0
    left_1, right_1 = _widened(first, first.scale / scale)
    left_2, right_2 = _widened(second, second.scale / scale)
    shared, rest = slice(min(first.rank, second.rank)), slice(min(first.rank, second.rank), None)
    lefts = (left_1[:, shared] - left_2[:, shared], left_2[:, shared])
    rights = (right_1[shared], right_1[shared] - right_2[shared])
    apart = _reach(left_1[:, shared], right_1[shared]) + _reach(left_2[:, shared], right_2[shared])
    if _reach(lefts[0], rights[0]) + _reach(lefts[1], rights[1]) >= apart:
        lefts, rights = (left_1[:, shared], -left_2[:, shared]), (right_1[shared], right_2[shared])
    # A factor that both share leaves one of the two products zero, and half of the work undone.
    pairs = [(left, right) for left, right in zip(lefts, rights, strict=True) if left.any() and right.any()]
    pairs += [(left_1[:, rest], right_1[rest]), (-left_2[:, rest], right_2[rest])]
    left_MR, right_RK = torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs])
    return _squared_norm(left_MR, right_RK) * scale * scale


def _squared_norm(left_MR: torch.Tensor, right_RK: torch.Tensor) -> float:
    """Return ‖left · right‖² in float64, by the Gram matrices or, where these cancel, by ‖R_left R_rightᵀ‖²."""
    products_RR = (left_MR.T @ left_MR).mul_(right_RK @ right_RK.T)
    square = float(products_RR.sum())
    if square >= CANCELLATION * float(products_RR.diagonal().sum()):
        return square
    left_RR = torch.linalg.qr(left_MR, mode="r").R
    right_RR = torch.linalg.qr(right_RK.T, mode="r").R
    return float((left_RR @ right_RR.T).square().sum())


def _reach(left_MR: torch.Tensor, right_RK: torch.Tensor) -> float:
    """Return Σ_a ‖u_a‖‖v_a‖, what the rounding of left · right is relative to."""
    return float(left_MR.square().sum(dim=0).sqrt() @ right_RK.square().sum(dim=1).sqrt())


def _widened(update: LowRank, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factor · left and right in float64."""
    return update.left_MR.to(torch.float64) * factor, update.right_RK.to(torch.float64)
