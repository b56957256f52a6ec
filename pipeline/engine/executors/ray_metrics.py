"""Counters of a merge for whoever watches the cluster, at every Ray node's metrics endpoint.

Owns their names. All are kept in the driver, from what the actors report anyway: one that dies takes nothing along.
"""

from __future__ import annotations

from functools import cache

from ray.util.metrics import Counter, Gauge

from pipeline.storage import Counters

_WORKER = ("worker",)


@cache
def _counters() -> dict[str, Counter]:
    """One of each a process: a second of the same name would be another series of the same metric."""
    return {
        name: Counter(f"geomerge_{name}", description=text, tag_keys=_WORKER)
        for name, text in (
            ("read_bytes", "Bytes of objects that workers have read"),
            ("written_bytes", "Bytes of objects that workers have written"),
            ("requests", "Requests that workers have sent to storage, repetitions included"),
            ("retries", "Requests to storage that were repetitions"),
        )
    } | {
        "passes": Counter("geomerge_passes", description="Passes over the files that have begun"),
        "workers_lost": Counter("geomerge_workers_lost", description="Workers that died or gave no sign of life"),
    }


@cache
def _stragglers() -> Gauge:
    return Gauge("geomerge_stragglers", description="Workers that take far longer for a file than the others did")


def count_stored(worker: int, before: Counters, now: Counters) -> None:
    """Count what a worker has asked of storage between two reports."""
    steps = {
        "read_bytes": now.read_bytes - before.read_bytes,
        "written_bytes": now.written_bytes - before.written_bytes,
        "requests": now.requests - before.requests,
        "retries": now.retries - before.retries,
    }
    for name, step in steps.items():
        # Ray refuses an increment of nothing.
        if step > 0:
            _counters()[name].inc(step, tags={"worker": str(worker)})


def count_pass() -> None:
    """Count a pass."""
    _counters()["passes"].inc()


def count_loss() -> None:
    """Count a worker that was lost."""
    _counters()["workers_lost"].inc()


def show_stragglers(workers: int) -> None:
    """Show how many workers are far behind the others."""
    _stragglers().set(workers)
