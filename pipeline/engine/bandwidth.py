"""How fast this machine reads, reduces and combines: a short trial on the first chunks of the real inputs.

Owns the measurement behind the plan's projected seconds. Runs only when a plan is sound and no bandwidth is given.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from pipeline.engine.process import cores, single_threaded_products
from pipeline.engine.run_folder import ChunkRow
from pipeline.engine.solutions import Solution
from pipeline.engine.worker import Job, ShardWorker
from pipeline.planning.cost import Rates
from pipeline.planning.grid import Chunk
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan

T = TypeVar("T")

# Seconds each of the two passes is tried for: longer than the first chunk's warm-up, short enough to wait for.
_TRIAL_S = 0.8
# Tensors tried at most; a small model is over before the time is.
_TRIAL_TENSORS = 64


def measure_rates(plan: Plan, memory: Memory, *, workers: int) -> Rates | None:
    """Return the rates of both passes on this machine, all workers together; None when there is nothing to try.

    The trial runs a worker on the first chunks of the largest tensors, in as many threads as this machine has cores, or
    as the merge would use if that is fewer.
    """
    threads = min(cores(), memory.threads * workers)
    merged = [index for index, tensor in enumerate(plan.tensors) if tensor.group >= 0 and tensor.elements]
    # Tensors that nothing touches are copied at the speed of the others' base; what is to be tried is the rest.
    tried = [index for index in merged if not plan.tensors[index].unchanged] or merged
    largest = sorted(tried, key=lambda index: -plan.tensors[index].elements)[:_TRIAL_TENSORS]
    if not largest:
        return None
    share = 1.0 / len(plan.models)
    even = Solution(
        group=0,
        factors=(0.0,) * plan.offset + (share,) * len(plan.models),
        coefficients=(share,) * len(plan.models),
        scale=1.0,
        median=None,
        distances=np.zeros((0, 0)),
    )
    trial = dataclasses.replace(memory, threads=threads, window=threads, retained_bytes=0)
    worker = ShardWorker(Job(plan=plan, output_url=".", memory=trial, device="cpu"))
    checksums: dict[tuple[int, int], np.ndarray] = {}
    first = 0.0
    try:
        with single_threaded_products():
            if plan.settings.measured:
                chunks = _first([plan.measured_chunks(index) for index in largest])
                found: list[ChunkRow] = []
                first = 0.0 if not chunks else _rate(worker, worker.measured, chunks, found)
                checksums = {(row.tensor, row.start): row.checksums for row in found}
                largest = [index for index in largest if plan.tensors[index].unchanged or (index, 0) in checksums]
            chunks = _first([plan.written_chunks(index) for index in largest])
            second = _rate(worker, lambda some: worker.merged(some, even, checksums), chunks, [])
    finally:
        worker.close()
    return Rates(measure=first or second, write=second, source="measured")


def given_rates(bytes_per_second: int) -> Rates:
    """Return the rates that the recipe's `bandwidth` states, for both passes."""
    return Rates(measure=float(bytes_per_second), write=float(bytes_per_second), source="given")


def _first(chunks: list[tuple[Chunk, ...]]) -> list[Chunk]:
    return [members[0] for members in chunks if members]


def _rate(
    worker: ShardWorker, run: Callable[[list[Chunk]], Iterator[T]], chunks: list[Chunk], results: list[T]
) -> float:
    """Return the input bytes a second of a pass over some chunks, the first left aside; results are appended."""
    results += run(chunks[:1])
    begun, started = worker.done_bytes, time.perf_counter()
    for result in run(chunks[1:] or chunks):
        results.append(result)
        if time.perf_counter() > started + _TRIAL_S:
            break
    return max(1, worker.done_bytes - begun) / max(1e-9, time.perf_counter() - started)
