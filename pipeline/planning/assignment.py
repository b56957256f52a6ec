"""Which worker owns which output files.

Owns the split. It balances bytes and is the same for the same plan and worker count; the bits of the output do not
depend on it.
"""

from __future__ import annotations

from pipeline.planning.plan import Plan


def assign(plan: Plan, workers: int) -> tuple[tuple[int, ...], ...]:
    """Return the shard of every worker: file indices, largest files spread first.

    Args:
        plan: The plan.
        workers: At least 1; workers beyond the number of files get nothing.
    """
    shards: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for index in sorted(range(len(plan.files)), key=lambda i: (-plan.files[i].size_bytes, i)):
        lightest = loads.index(min(loads))
        shards[lightest].append(index)
        loads[lightest] += plan.files[index].size_bytes
    return tuple(tuple(sorted(shard)) for shard in shards)
