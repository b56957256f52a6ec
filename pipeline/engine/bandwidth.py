"""How fast this machine reads, reduces and combines: a short trial on the first chunks of the real inputs.

Owns the measurement behind the plan's projected seconds. Runs only when a plan is sound and no bandwidth is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.engine.chunk_math import measure_chunk, write_chunk
from pipeline.engine.process import cores, single_threaded_products
from pipeline.engine.solutions import Solution
from pipeline.engine.source import ChunkSource
from pipeline.planning.cost import Rates
from pipeline.planning.grid import Chunk
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan
from pipeline.planning.traffic import input_bytes, written_inputs

# Seconds each of the two passes is tried for: longer than the first chunk's warm-up, short enough to wait for.
_TRIAL_S = 0.8
# Chunks tried at most; a small model is over before the time is.
_TRIAL_CHUNKS = 64


def measure_rates(plan: Plan, memory: Memory, *, workers: int) -> Rates | None:
    """Return the rates of both passes on this machine, all workers together; None when all tensors are empty.

    The trial runs as many threads as this machine has cores, or as the merge would use if that is fewer.
    """
    threads = min(cores(), memory.threads * workers)
    merged = [index for index, tensor in enumerate(plan.tensors) if tensor.group >= 0 and tensor.elements]
    if not merged:
        return None
    source = ChunkSource(plan, Memory(terms={}, threads=threads, window=threads, retained_bytes=0))
    largest = sorted(merged, key=lambda index: -plan.tensors[index].elements)[:_TRIAL_CHUNKS]
    chunks = [Chunk(tensor=t, start=0, stop=min(plan.chunk_elements, plan.tensors[t].elements)) for t in largest]
    share = 1.0 / len(plan.models)
    even = Solution(
        group=0,
        factors=(0.0,) * plan.offset + (share,) * len(plan.models),
        coefficients=(share,) * len(plan.models),
        scale=1.0,
        median=None,
        distances=(),
    )
    device = torch.device("cpu")

    def measure(chunk: Chunk) -> None:
        with source.lease(chunk, plan.points) as loaded:
            measure_chunk(plan, loaded, device)

    def write(chunk: Chunk) -> None:
        with source.lease(chunk, written_inputs(plan)) as loaded:
            for index in loaded.raw:
                loaded.checksum(index)
            write_chunk(plan, loaded, even, device)

    try:
        with single_threaded_products():
            first = _rate(plan, measure, chunks, plan.points, threads)
            second = _rate(plan, write, chunks, written_inputs(plan), threads)
    finally:
        source.close()
    return Rates(measure=first, write=second, source="measured")


def given_rates(bytes_per_second: int) -> Rates:
    """Return the rates that the recipe's `bandwidth` states, for both passes."""
    return Rates(measure=float(bytes_per_second), write=float(bytes_per_second), source="given")


def _rate(
    plan: Plan, task: Callable[[Chunk], None], chunks: list[Chunk], inputs: tuple[int, ...], threads: int
) -> float:
    """Return input bytes a second of a task over chunks, in as many threads."""
    done = np.zeros(threads)

    def body(rank: int) -> None:
        end = time.perf_counter() + _TRIAL_S
        for chunk in chunks[rank::threads]:
            task(chunk)
            tensor = plan.tensors[chunk.tensor]
            done[rank] += input_bytes(tensor, inputs) * chunk.elements / tensor.elements
            if time.perf_counter() > end:
                return

    task(chunks[0])
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(body, range(threads)))
    return float(done.sum()) / max(1e-9, time.perf_counter() - started)
