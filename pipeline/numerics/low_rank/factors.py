"""Low-rank updates ΔW = scale · left · right of one matrix: the factors, side by side.

Owns the representation and the panels in which factors are widened to float64; knows nothing of adapters, files or
plans. Panel boundaries depend on shapes alone, so that the bits of what is accumulated over them do not depend on who
computes it.

Legend: P updates, M rows and K columns of the matrix, R rank columns (of one update, or of all side by side), W rank
columns of a panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.numerics.low_rank.sizes import PANEL_LENGTH, PANEL_RANKS


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
