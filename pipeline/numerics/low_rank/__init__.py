"""Low-rank updates of one matrix: measured on their factors, combined into a dense matrix or into factors.

Owns the folder's division: `factors`, `distances` and `output` are torch and are imported by name, where an update is
at hand; what everybody may ask for, which is `sizes`, is here too.
"""

from pipeline.numerics.low_rank.sizes import low_rank_work_bytes, merged_factors_bytes, truncated_rank

__all__ = ["low_rank_work_bytes", "merged_factors_bytes", "truncated_rank"]
