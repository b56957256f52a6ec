"""Low-rank updates ΔW = scale · left · right of one matrix: the factors, side by side, and what working on them takes.

Owns the representation, the panels in which factors are widened to float64, and the bounds of the memory this takes;
knows nothing of adapters, files or plans. Panel boundaries depend on shapes alone, so that the bits of what is
accumulated over them do not depend on who computes it.

Legend: P updates, M rows and K columns of the matrix, R rank columns (of one update, or of all side by side), W rank
columns of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Rank columns taken at a time: enough for full speed of a product, few enough for a panel of them to be small.
PANEL_RANKS = 512
# Rows (or columns) of the matrix taken at a time: a float64 panel is then 16 MiB at most, whatever the matrix.
PANEL_LENGTH = 1 << 12
# Elements of the rows that are made dense at a time: 4 MiB in float64, so that some fit into a processor's cache.
_PART_ELEMENTS = 1 << 19
# But so many rows at least that reading the right factors costs little beside multiplying by them.
_PART_ROWS = 64
# float64 arrays of such a part that live at once: combination, base, difference, and what rounding once takes.
_PART_ARRAYS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """One update of one matrix, ΔW = scale · left · right.

    Attributes:
        left_MR: Any float dtype and strides, on any device.
        right_RK: The same device.
        scale: Any finite number.
    """

    left_MR: torch.Tensor
    right_RK: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Return R, the number of columns of the left factor."""
        return self.left_MR.shape[1]


class Stack:
    """The factors of several updates side by side, widened to float64 one panel at a time.

    Args:
        updates: P updates of one matrix, None for zero; at least one is given.

    Raises:
        ValueError: None is given, or the shapes do not belong to one matrix.
    """

    __slots__ = ("columns", "edges", "rows", "updates")

    def __init__(self, updates: Sequence[LowRank | None]) -> None:
        first = next((update for update in updates if update is not None), None)
        if first is None:
            raise ValueError("updates that are all zero have no shape")
        self.rows, self.columns = first.left_MR.shape[0], first.right_RK.shape[1]
        zero = LowRank(left_MR=first.left_MR[:, :0], right_RK=first.right_RK[:0], scale=0.0)
        self.updates = tuple(zero if update is None else update for update in updates)
        for update in self.updates:
            shapes = (tuple(update.left_MR.shape), tuple(update.right_RK.shape))
            if shapes != ((self.rows, update.rank), (update.rank, self.columns)):
                raise ValueError(f"factors of shape {shapes} do not fit a {self.rows} × {self.columns} matrix")
        self.edges = np.cumsum([0, *(update.rank for update in self.updates)])

    @property
    def scales(self) -> np.ndarray:
        """Return the scales, (P,) float64."""
        return np.array([update.scale for update in self.updates], dtype=np.float64)

    @property
    def device(self) -> torch.device:
        """Return where the factors lie."""
        return self.updates[0].left_MR.device

    def panels(self) -> Iterator[slice]:
        """Yield the ranges of rank columns that are taken at a time."""
        total = int(self.edges[-1])
        for start in range(0, total, PANEL_RANKS):
            yield slice(start, min(start + PANEL_RANKS, total))

    def left(self, ranks: slice, rows: slice) -> torch.Tensor:
        """Return unscaled left factors side by side: (rows, W) float64, contiguous."""
        parts = [update.left_MR[rows, part] for update, part in self._parts(ranks)]
        return torch.cat(parts, dim=1).to(torch.float64)

    def right(self, ranks: slice, columns: slice) -> torch.Tensor:
        """Return right factors on top of each other: (W, columns) float64, contiguous."""
        parts = [update.right_RK[part, columns] for update, part in self._parts(ranks)]
        return torch.cat(parts, dim=0).to(torch.float64)

    def owners(self, ranks: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the updates that a panel has columns of, and where each begins in it."""
        first = int(np.searchsorted(self.edges, ranks.start, side="right")) - 1
        last = int(np.searchsorted(self.edges, ranks.stop, side="left"))
        owners = np.arange(first, last)
        # An update of rank zero owns no column.
        owners = owners[np.diff(self.edges[first : last + 1]) > 0]
        return owners, np.maximum(self.edges[owners] - ranks.start, 0)

    def sum_by_update(self, values_R: np.ndarray) -> np.ndarray:
        """Return the sums of a value a rank column over each update, (P,) float64."""
        sums_P = np.zeros(len(self.updates))
        if values_R.size:
            owners, starts = self.owners(slice(0, values_R.size))
            sums_P[owners] = np.add.reduceat(values_R, starts)
        return sums_P

    def _parts(self, ranks: slice) -> Iterator[tuple[LowRank, slice]]:
        for owner in self.owners(ranks)[0]:
            begin = int(self.edges[owner])
            yield (
                self.updates[owner],
                slice(max(ranks.start - begin, 0), min(ranks.stop, int(self.edges[owner + 1])) - begin),
            )


def spans(length: int, step: int = PANEL_LENGTH) -> Iterator[slice]:
    """Yield consecutive ranges of at most `step` that cover `length`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def dense_rows(update: LowRank, start: int, stop: int) -> torch.Tensor:
    """Return some rows of ΔW.

    Args:
        update: The update.
        start: First row.
        stop: Row after the last.

    Returns:
        (stop − start, K) float64, on the factors' device.
    """
    return (update.left_MR[start:stop].to(torch.float64) @ update.right_RK.to(torch.float64)).mul_(update.scale)


def part_rows(columns: int) -> int:
    """Return how many rows of a matrix of so many columns are made dense at a time."""
    return max(_PART_ROWS, _PART_ELEMENTS // columns)


def truncated_rank(rows: int, columns: int, ranks: Sequence[int], rank: int) -> int:
    """Return the rank of truncated factors of a combination: the wanted one, or all that it can have.

    Args:
        rows: M.
        columns: K.
        ranks: Of the updates.
        rank: The wanted one.
    """
    return min(rank, rows, columns, sum(ranks))


def low_rank_work_bytes(rows: int, columns: int, ranks: Sequence[int]) -> int:
    """Return an upper bound of the working memory of measuring or combining such updates, in bytes.

    Factors, results and a panel's base elements are not in it. Making factors takes `merged_factors_bytes`.

    Args:
        rows: M, or those of a panel where only panels are made.
        columns: K.
        ranks: Of the updates.
    """
    width, highest, count = min(sum(ranks), PANEL_RANKS), max(ranks, default=0), len(ranks)
    length, height = min(max(rows, columns), PANEL_LENGTH), min(rows, part_rows(columns))
    # Two panels, as read and widened; four square products; the tables of all pairs.
    gram = 4 * width * length + 4 * width**2 + 8 * count**2
    # A pair taken on its own: widened, subtracted, stacked, and copied by a factorisation; its products.
    both = sum(sorted(ranks)[-2:])
    pair = 4 * (rows + columns) * both + 3 * both**2
    # Left panels as read, widened and weighted, right ones as read, widened and multiplied; or one update alone.
    panels = max(3 * width * (height + length), highest * (2 * rows + 2 * columns + 3 * highest))
    combined = _PART_ARRAYS * height * columns + panels + sum(rank**2 for rank in ranks) + 8 * count
    return 8 * max(gram, pair, combined)


def merged_factors_bytes(rows: int, columns: int, ranks: Sequence[int], rank: int | None) -> int:
    """Return an upper bound of the memory of making factors of a combination and measuring from them, in bytes.

    The result is in it, the updates' factors are not.

    Args:
        rows: M.
        columns: K.
        ranks: Of the updates.
        rank: The wanted one; None for exact factors.
    """
    total = sum(ranks)
    written = total if rank is None else truncated_rank(rows, columns, ranks, rank)
    # As read, widened and weighted; truncated, the bases and what a factorisation copies as well.
    made = (3 if rank is None else 6) * (rows + columns) * total
    if rank is not None:
        # The core, its singular vectors and the workspace of that factorisation.
        made += 2 * min(rows, total) * min(columns, total) + 10 * min(rows, columns, total) ** 2
    return max(8 * made, 8 * (rows + columns) * written + low_rank_work_bytes(rows, columns, [*ranks, written]))
