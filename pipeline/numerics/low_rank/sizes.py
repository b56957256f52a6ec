"""What working on low-rank updates of one matrix takes: the panels' sizes, and bounds of the memory.

Owns numbers alone, so that planning needs nothing else of this folder. Legend: M rows and K columns of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

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
