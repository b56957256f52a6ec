"""Which worker owns which output files.

Owns the split. It balances bytes and arithmetic and is the same for the same plan and worker count; the bits of the
output do not depend on it.
"""

from __future__ import annotations

from pipeline.planning.plan import Plan
from pipeline.planning.system_work import file_load


def assign(plan: Plan, workers: int) -> tuple[tuple[int, ...], ...]:
    """Return the shard of every worker: file indices, the costliest files spread first.

    Args:
        plan: The plan.
        workers: At least 1; workers beyond the number of files get nothing.
    """
    shards: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    costs = [file_load(plan, index) for index in range(len(plan.files))]
    for index in sorted(range(len(plan.files)), key=lambda i: (-costs[i], i)):
        lightest = loads.index(min(loads))
        shards[lightest].append(index)
        loads[lightest] += costs[index]
    return tuple(tuple(sorted(shard)) for shard in shards)
