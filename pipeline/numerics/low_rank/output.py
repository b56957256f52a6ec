"""What is written of low-rank updates: a dense matrix panel by panel, or factors of their combination.

Owns the combination base + Σ a_p ΔW_p, rounded once and measured as it is written, and the exact or truncated factors
of Σ a_p ΔW_p; knows nothing of adapters, files or plans. All arithmetic is float64 in an order that shapes alone fix.

Legend: P updates, M rows and K columns of the matrix, E = M·K elements, R rank columns, W rank columns of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.numerics.kernels import CANCELLATION, Combined, total_factor
from pipeline.numerics.low_rank.distances import distances_to, pair_distance
from pipeline.numerics.low_rank.factors import LowRank, Stack, dense_rows, spans
from pipeline.numerics.low_rank.sizes import part_rows, truncated_rank
from pipeline.numerics.torch_dtypes import round_once

# The square of float64's unit roundoff.
_ROUNDED_SQUARE = 2.0**-106
# The square of so many right factors, 8 MiB in float64, is made in one piece.
_SHARED_RANKS = 1 << 10


class LowRankCombination:
    """base + Σ a_p ΔW_p of one matrix, made a panel of whole rows at a time, in any order and from any threads.

    Args:
        updates: P updates, None for zero; at least one is given.
        factors_P: a_p.

    Raises:
        ValueError: No update is given, or the shapes do not belong to one matrix.
    """

    __slots__ = ("_right_squares", "_stack", "_total", "_weights_R")

    def __init__(self, updates: Sequence[LowRank | None], factors_P: Sequence[float]) -> None:
        self._stack = Stack(updates)
        self._total = total_factor(factors_P)
        weights_P = np.array(factors_P, dtype=np.float64) * self._stack.scales
        weights_R = np.repeat(weights_P, np.diff(self._stack.edges))
        self._weights_R = torch.from_numpy(weights_R).to(self._stack.device)
        self._right_squares = tuple(_right_square(update) for update in self._stack.updates)

    def panel(self, base_E: torch.Tensor, rows: slice, dtype: torch.dtype) -> Combined:
        """Return the combination over some whole rows, rounded once, with its distance from every base + ΔW_p.

        Where the combination is the base to the last bit, so is what is written. Distances that the inner products
        would leave with few digits are taken from the update's rows themselves.

        Args:
            base_E: (rows · K,) the base's elements there, any float dtype, on the factors' device.
            rows: Which rows.
            dtype: Output float type.

        Returns:
            Values of shape (rows · K,), and their sums over these rows.
        """
        base_MK = base_E.view(-1, self._stack.columns)
        begin = rows.indices(self._stack.rows)[0]
        values_MK = torch.empty_like(base_MK, dtype=dtype)
        dots_R = torch.zeros_like(self._weights_R)
        square = torch.zeros((), dtype=torch.float64, device=base_E.device)
        rounding = torch.zeros_like(square)
        for part in self._parts(len(base_MK)):
            shift_MK = self._shift(slice(begin + part.start, begin + part.stop))
            wide_MK = base_MK[part].to(torch.float64)
            # x + (-0.0) is x, whereas -0.0 + 0.0 would lose the sign of a zero of the base.
            exact_MK = torch.where(shift_MK == 0, -0.0, shift_MK).add_(wide_MK, alpha=self._total)
            values_MK[part] = round_once(exact_MK.view(-1), dtype).view(exact_MK.shape)
            written_MK = values_MK[part].to(torch.float64)
            if dtype == torch.float64:
                # What is called exact here is rounded itself, to the type of the output.
                rounding += exact_MK[shift_MK != 0].square().sum() * _ROUNDED_SQUARE
            rounding += exact_MK.sub_(written_MK).square_().sum()
            moved_MK = torch.sub(written_MK, wide_MK, out=shift_MK)
            square += moved_MK.square().sum()
            self._add_dots(dots_R, moved_MK, begin + part.start)
        squared_P = self._distances(float(square), dots_R.cpu().numpy(), base_MK, values_MK, begin)
        return Combined(values_E=values_MK.view(-1), squared_distances_P=squared_P, squared_rounding=float(rounding))

    def _parts(self, count: int) -> Iterator[slice]:
        return spans(count, part_rows(self._stack.columns))

    def _shift(self, rows: slice) -> torch.Tensor:
        """Return Σ a_p ΔW_p over some rows, (rows, K) float64."""
        stack = self._stack
        shift_MK = torch.zeros((rows.stop - rows.start, stack.columns), dtype=torch.float64, device=stack.device)
        for ranks in stack.panels():
            left_MW = stack.left(ranks, rows).mul_(self._weights_R[ranks])
            for columns in spans(stack.columns):
                shift_MK[:, columns].addmm_(left_MW, stack.right(ranks, columns))
        return shift_MK

    def _add_dots(self, dots_R: torch.Tensor, moved_MK: torch.Tensor, begin: int) -> None:
        """Add, by rank column, ⟨moved, u_a v_aᵀ⟩ over the rows from `begin` on."""
        for ranks in self._stack.panels():
            left_MW = self._stack.left(ranks, slice(begin, begin + len(moved_MK)))
            for columns in spans(self._stack.columns):
                moved_WK = left_MW.T @ moved_MK[:, columns]
                dots_R[ranks] += moved_WK.mul_(self._stack.right(ranks, columns)).sum(dim=1)

    def _distances(
        self, square: float, dots_R: np.ndarray, base_MK: torch.Tensor, values_MK: torch.Tensor, begin: int
    ) -> np.ndarray:
        """Return ‖moved − ΔW_p‖² over a panel from ‖moved‖² and the inner products, or directly where they cancel."""
        stack = self._stack
        rows = slice(begin, begin + len(base_MK))
        pairs = [
            _left_square(update, right_RR, rows)
            for update, right_RR in zip(stack.updates, self._right_squares, strict=True)
        ]
        squares_P, parallel_P = np.array(pairs, dtype=np.float64).T
        # Values that are not finite are the caller's finding, not a warning of ours.
        with np.errstate(over="ignore", invalid="ignore"):
            squared_P = square + squares_P - 2.0 * stack.scales * stack.sum_by_update(dots_R)
            unsound_P = squared_P < CANCELLATION * np.maximum(np.maximum(squares_P, parallel_P), square)
        for p in np.flatnonzero(unsound_P).tolist():
            squared_P[p] = 0.0
            for part in self._parts(len(base_MK)):
                gap_MK = values_MK[part].to(torch.float64) - base_MK[part].to(torch.float64)
                gap_MK -= dense_rows(stack.updates[p], begin + part.start, begin + part.stop)
                squared_P[p] += float(gap_MK.square_().sum())
        return np.asarray(squared_P)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedFactors:
    """Σ a_p ΔW_p as one pair of factors of scale one.

    Attributes:
        left_MR: float64.
        right_RK: float64.
        singular_values: The R that are kept, in falling order; None if the factors are exact.
        discarded_square: Σ σ² of those that are not kept: the squared error of the product.
        square: Σ σ² of all: the squared norm of the exact product; 0 of exact factors, where it is not asked for.
    """

    left_MR: torch.Tensor
    right_RK: torch.Tensor
    singular_values: tuple[float, ...] | None
    discarded_square: float
    square: float


def merged_factors(updates: Sequence[LowRank | None], factors_P: Sequence[float], *, rank: int | None) -> MergedFactors:
    """Return factors of Σ a_p ΔW_p: exact of rank Σ r_p, or the nearest of a given rank.

    Exact factors are [a_1 s_1 U_1, …] and [V_1; …]: the right ones are copies, and a factor a_p of zero keeps its
    columns. Truncated ones are U√σ and √σVᵀ, each singular pair with the sign that makes the largest entry of its left
    vector positive.

    Args:
        updates: P updates of one matrix, None for zero; at least one is given.
        factors_P: a_p.
        rank: None for exact factors, otherwise the result has `truncated_rank` columns.

    Raises:
        ValueError: No update is given, the shapes do not belong to one matrix, or a truncated one is not finite.

    Source: Eckart & Young 1936, "The approximation of one matrix by another of lower rank".
    """
    stack = Stack(updates)
    everything = slice(0, int(stack.edges[-1]))
    weights_P = np.array(factors_P, dtype=np.float64) * stack.scales
    weights_R = torch.from_numpy(np.repeat(weights_P, np.diff(stack.edges))).to(stack.device)
    left_MR = stack.left(everything, slice(0, stack.rows)) * weights_R
    right_RK = stack.right(everything, slice(0, stack.columns))
    if rank is None:
        return MergedFactors(left_MR=left_MR, right_RK=right_RK, singular_values=None, discarded_square=0.0, square=0.0)
    left_basis, left_core = _reduced(left_MR)
    right_basis, right_core = _reduced(right_RK.T)
    core = left_core @ right_core.T
    if not bool(torch.isfinite(core).all()):
        raise ValueError("an update that is not finite has no singular values")
    left_vectors, values, right_vectors = torch.linalg.svd(core, full_matrices=False)
    kept = truncated_rank(stack.rows, stack.columns, [update.rank for update in stack.updates], rank)
    left_vectors, right_vectors = left_vectors[:, :kept], right_vectors[:kept]
    if left_basis is not None:
        left_vectors = left_basis @ left_vectors
    if right_basis is not None:
        right_vectors = right_vectors @ right_basis.T
    roots_R = values[:kept].sqrt()
    signed_R = roots_R * _signs(left_vectors)
    return MergedFactors(
        left_MR=left_vectors * signed_R,
        right_RK=right_vectors * signed_R[:, None],
        singular_values=tuple(values[:kept].tolist()),
        discarded_square=float(values[kept:].square().sum()),
        square=float(values.square().sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WrittenFactors:
    """How factors lie that were rounded to be stored.

    Attributes:
        squared_distances_P: From their product to each update.
        squared_rounding: From their product to Σ a_p ΔW_p.
    """

    squared_distances_P: np.ndarray
    squared_rounding: float


def measured_factors(written: LowRank, exact: MergedFactors, updates: Sequence[LowRank | None]) -> WrittenFactors:
    """Return the distances of stored factors from the updates, and from the combination that they stand for.

    Where the stored right factor is that of all updates to the bit, all distances follow from one product with VVᵀ.

    Args:
        written: What is stored: rounded factors of Σ a_p ΔW_p.
        exact: The exact ones.
        updates: P updates, None for zero; at least one is given.
    """
    target = LowRank(left_MR=exact.left_MR, right_RK=exact.right_RK, scale=1.0)
    wide_RK = written.right_RK.to(torch.float64)
    if written.rank > _SHARED_RANKS or not torch.equal(wide_RK, exact.right_RK):
        return WrittenFactors(
            squared_distances_P=distances_to(written, updates), squared_rounding=pair_distance(written, target)
        )
    stack = Stack(updates)
    square_RR = _right_square(target)
    left_MR = written.left_MR.to(torch.float64) * written.scale
    moved_MR = left_MR @ square_RR
    lefts_MR = stack.left(slice(0, written.rank), slice(0, stack.rows))
    own = float(moved_MR.mul(left_MR).sum())
    products_P = stack.sum_by_update((moved_MR.mul_(lefts_MR)).sum(dim=0).cpu().numpy()) * stack.scales
    edges = stack.edges.tolist()
    squares = [
        _left_square(update, square_RR[begin:end, begin:end], slice(0, stack.rows))
        for update, begin, end in zip(stack.updates, edges, edges[1:], strict=False)
    ]
    squares_P, parallel_P = np.array(squares, dtype=np.float64).T
    parallel = float(left_MR.square().sum(dim=0) @ square_RR.diagonal())
    with np.errstate(over="ignore", invalid="ignore"):
        squared_P = own + squares_P - 2.0 * products_P
        unsound_P = squared_P < CANCELLATION * np.maximum(np.maximum(squares_P, parallel_P), max(own, parallel))
    for p in np.flatnonzero(unsound_P).tolist():
        squared_P[p] = pair_distance(written, stack.updates[p])
    gap_MR = left_MR.sub_(exact.left_MR)
    gap = float((gap_MR @ square_RR).mul_(gap_MR).sum())
    sound = gap >= CANCELLATION * float(gap_MR.square().sum(dim=0) @ square_RR.diagonal())
    return WrittenFactors(
        squared_distances_P=squared_P, squared_rounding=gap if sound else pair_distance(written, target)
    )


def _right_square(update: LowRank) -> torch.Tensor:
    """Return V Vᵀ, (R, R) float64."""
    square_RR = torch.zeros((update.rank, update.rank), dtype=torch.float64, device=update.right_RK.device)
    for columns in spans(update.right_RK.shape[1]):
        right_RK = update.right_RK[:, columns].to(torch.float64)
        square_RR.addmm_(right_RK, right_RK.T)
    return square_RR


def _left_square(update: LowRank, right_RR: torch.Tensor, rows: slice) -> tuple[float, float]:
    """Return ‖ΔW[rows]‖² and Σ_a ‖u_a‖²‖v_a‖², which it is without cancellation."""
    left_MR = update.left_MR[rows].to(torch.float64)
    products_RR = (left_MR.T @ left_MR).mul_(right_RR)
    scale = update.scale * update.scale
    return scale * float(products_RR.sum()), scale * float(products_RR.diagonal().sum())


def _reduced(tall_DR: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return an orthonormal basis and coordinates in it, of which there are at most R; a wide matrix stays as it is."""
    if tall_DR.shape[0] <= tall_DR.shape[1]:
        return None, tall_DR
    basis, core = torch.linalg.qr(tall_DR)
    return basis, core


def _signs(vectors_MR: torch.Tensor) -> torch.Tensor:
    """Return by column the sign of its entry of largest magnitude, the first of equal ones; of no entry, one."""
    largest_R = vectors_MR.abs().argmax(dim=0, keepdim=True)
    return torch.where(vectors_MR.gather(0, largest_R)[0] < 0, -1.0, 1.0).to(torch.float64)
