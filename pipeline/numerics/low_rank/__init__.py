"""Low-rank updates of one matrix: measured on their factors, combined into a dense matrix or into factors.

Owns the names that others use; the parts are `factors`, `distances` and `output`.
"""

from pipeline.numerics.low_rank.distances import distances_to, pair_distance, pairwise_low_rank
from pipeline.numerics.low_rank.factors import (
    LowRank,
    dense_rows,
    low_rank_work_bytes,
    merged_factors_bytes,
    truncated_rank,
)
from pipeline.numerics.low_rank.output import (
    LowRankCombination,
    MergedFactors,
    WrittenFactors,
    measured_factors,
    merged_factors,
)

__all__ = [
    "LowRank",
    "LowRankCombination",
    "MergedFactors",
    "WrittenFactors",
    "dense_rows",
    "distances_to",
    "low_rank_work_bytes",
    "measured_factors",
    "merged_factors",
    "merged_factors_bytes",
    "pair_distance",
    "pairwise_low_rank",
    "truncated_rank",
]
