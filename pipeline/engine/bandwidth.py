"""How fast this machine reads, reduces, combines and writes: a short trial on chunks of the real inputs.

Owns the measurement behind the plan's projected seconds. Runs only when a plan is sound and no bandwidth is given.
What it writes is a file without a name on the output's disk, which is gone when it ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.engine.chunk_math import MergedChunk
from pipeline.engine.process import cores, single_threaded_products
from pipeline.engine.run_folder import ChunkRow
from pipeline.engine.solutions import Solution
from pipeline.engine.worker import Job, ShardWorker
from pipeline.planning.cost import Rates
from pipeline.planning.grid import Chunk
from pipeline.planning.memory import Memory
from pipeline.planning.places import chunk_range
from pipeline.planning.plan import Plan
from pipeline.planning.system_memory import largest_matrix
from pipeline.planning.traffic import measured_inputs, merged_inputs, one_read_bytes
from pipeline.storage import Store, open_store
from pipeline.storage.page_cache import cached_share, page_cache_bytes
from pipeline.storage.scratch import ScratchFile, open_scratch

T = TypeVar("T")

# Seconds that a pass is tried for: longer than a disk's first answers, short enough to wait for.
_TRIAL_S = 0.7
# Side of the matrices that products are tried on, and seconds: a trial that fills a core's caches as large ones do.
_PRODUCT_SIZE, _PRODUCT_S = 512, 0.15
# Consecutive chunks that are tried together, and how many such runs at most. What the system reads ahead of each file
# beyond a run, megabytes, is lost in a trial and must be a small part of it.
_RUN_CHUNKS, _MOST_RUNS = 32, 64
# Shares of a run's bytes in memory from which on it counts as cached, and up to which it counts as not.
_WARM, _COLD = 0.9, 0.1
# Of a trial with the wait for its disk to the trial without, above which the disk is what a merge waits for.
_BEHIND = 1.25
# A program that has run for longer has work of its own: its start is none of the merge's.
_LONGEST_START_S = 60.0
# Spreads the runs over the model whatever their number, however many of them are tried.
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """Input bytes a second of a pass, and how long its first chunk took beyond that."""

    rate: float
    first_s: float


def measure_rates(plan: Plan, memory: Memory, *, workers: int, output: Store | None = None) -> Rates | None:
    """Return the rates of both passes on this machine, all workers together; None when there is nothing to try.

    The trial runs a worker in as many threads as this machine has cores, or as the merge would use if that is fewer, on
    chunks from everywhere in the model. Where a part of the inputs is cached, both parts are tried.

    Args:
        plan: The plan.
        memory: What one worker may hold.
        workers: How many there are.
        output: Where the result would go; its disk is tried if it is one of this machine.
    """
    start_s = _age_s()
    runs = _runs(plan)
    if not runs:
        return None
    threads = min(cores(), memory.threads * workers)
    trial = dataclasses.replace(
        memory, threads=threads, window=min(threads + 1, memory.window * workers), retained_bytes=0
    )
    shares = [_cached(plan, run[0]) for run in runs]
    worker = ShardWorker(Job(plan=plan, output_url=".", memory=trial, device="cpu"))
    with ExitStack() as opened:
        opened.callback(worker.close)
        opened.enter_context(single_threaded_products())
        scratch = open_scratch(output.location()) if output is not None and output.is_local else None
        if scratch is not None:
            opened.enter_context(scratch)
        tried = _Passes(plan, worker, scratch)
        rates = tried.rates(runs, shares, start_s)
        if largest_matrix(plan):
            rates = dataclasses.replace(rates, operations=threads * _product_rate())
        return rates


def _product_rate() -> float:
    """Return the floating-point operations a second of one thread in matrix products of float32."""
    import torch

    matrix = torch.ones((_PRODUCT_SIZE, _PRODUCT_SIZE))
    product, begun_s, count = torch.mm(matrix, matrix), time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - begun_s) < _PRODUCT_S:
        torch.mm(matrix, matrix, out=product)
        count += 1
    return float(2 * _PRODUCT_SIZE**3 * max(1, count) / elapsed_s)


def given_rates(bytes_per_second: int) -> Rates:
    """Return the rates that the recipe's `bandwidth` states, for both passes."""
    return Rates(measure=float(bytes_per_second), write=float(bytes_per_second), source="given")


class _Passes:
    """Tries both passes of a plan.

    Args:
        plan: The plan.
        worker: Who does the chunks.
        scratch: Where merged chunks are written to, if anywhere.
    """

    def __init__(self, plan: Plan, worker: ShardWorker, scratch: ScratchFile | None) -> None:
        self._plan = plan
        self._worker = worker
        self._scratch = scratch
        self._checksums: dict[tuple[int, int], np.ndarray] = {}
        share = 1.0 / len(plan.models)
        self._even = Solution(
            group=0,
            factors=(0.0,) * plan.offset + (share,) * len(plan.models),
            coefficients=(share,) * len(plan.models),
            scale=1.0,
            median=None,
            distances=np.zeros((0, 0)),
        )

    def rates(self, runs: Sequence[Sequence[Chunk]], shares: Sequence[float], start_s: float) -> Rates:
        """Return what a merge would reach, if so much of its inputs is in memory as of these runs.

        Args:
            runs: Chunks that are neighbours.
            shares: Which part of each run's bytes is in memory.
            start_s: Seconds gone by so far.
        """
        first = self._measure if self._plan.settings.measured else self._merge
        cached = sum(shares) / len(shares)
        warm = [run for run, share in zip(runs, shares, strict=True) if share >= _WARM]
        cold = [run for run, share in zip(runs, shares, strict=True) if share <= _COLD]
        tried = [first(part) for part in (warm, cold) if part] or [first(runs)]
        found = [trial for trial in tried if trial is not None]
        rate = 1.0 / (cached / found[0].rate + (1.0 - cached) / found[-1].rate) if found else 0.0
        if not self._plan.settings.measured:
            start_s += found[0].first_s if found else 0.0
            return Rates(measure=max(1.0, rate), write=max(1.0, rate), source="measured", start_s=start_s)
        again = self._merge(self._measured_runs(runs))
        second = again.rate if again is not None else rate
        if cold and found and one_read_bytes(self._plan) > page_cache_bytes():
            # What was read by then has made room for what came after it.
            second = min(second, found[-1].rate)
        start_s += sum(trial.first_s for trial in (*found[:1], again) if trial is not None)
        return Rates(measure=max(1.0, rate or second), write=max(1.0, second), source="measured", start_s=start_s)

    def _measure(self, runs: Sequence[Sequence[Chunk]]) -> _Trial | None:
        """Try the measuring pass; the checksums are kept for the other."""

        def take(row: ChunkRow) -> None:
            self._checksums[row.tensor, row.start] = row.checksums

        chunks: dict[Chunk, None] = {}
        for chunk in (chunk for run in runs for chunk in run):
            measured = self._plan.measured_chunks(chunk.tensor)
            # Of a tensor whose distances follow from factors all is measured at once.
            chunks.update(dict.fromkeys((chunk,) if chunk in measured else measured[:1]))
        return self._trial(self._worker.measured, list(chunks), take, lambda: None)

    def _merge(self, runs: Sequence[Sequence[Chunk]]) -> _Trial | None:
        """Try the writing pass."""
        digest = hashlib.sha256()

        def take(merged: MergedChunk) -> None:
            digest.update(merged.data)
            if self._scratch is not None:
                self._scratch.write(merged.data)

        def end() -> None:
            if self._scratch is not None:
                self._scratch.sync()

        return self._trial(
            lambda some: self._worker.merged(some, self._even, self._checksums),
            [chunk for run in runs for chunk in run],
            take,
            end,
        )

    def _measured_runs(self, runs: Sequence[Sequence[Chunk]]) -> list[list[Chunk]]:
        """Return the chunks that can be merged: their first read is done, or there is none."""
        tensors = self._plan.tensors

        def done(chunk: Chunk) -> bool:
            tensor = tensors[chunk.tensor]
            start = 0 if tensor.factored else chunk.start
            known = tensor.unchanged or not self._plan.is_weighed(chunk.tensor)
            return known or (chunk.tensor, start) in self._checksums

        return [[chunk for chunk in run if done(chunk)] for run in runs]

    def _trial(
        self,
        run: Callable[[list[Chunk]], Iterator[T]],
        chunks: list[Chunk],
        take: Callable[[T], None],
        end: Callable[[], None],
    ) -> _Trial | None:
        """Return how fast a pass goes through some chunks, the first left aside; None without any.

        Args:
            run: Yields their results.
            chunks: More than there is time for.
            take: Called with each result, in time.
            end: Called after the last.
        """
        if not chunks:
            return None
        begun, begun_s = self._worker.done_bytes, time.perf_counter()
        for result in run(chunks[:1]):
            take(result)
        before, started_s = self._worker.done_bytes, time.perf_counter()
        for result in run(chunks[1:] or chunks):
            take(result)
            if time.perf_counter() > started_s + _TRIAL_S:
                break
        worked_s = time.perf_counter() - started_s
        end()
        whole_s = time.perf_counter() - started_s
        # A merge has the end once; only a disk that falls behind has it all the time.
        seconds = whole_s if whole_s > _BEHIND * worked_s else worked_s
        rate = max(1, self._worker.done_bytes - before) / max(1e-9, seconds)
        return _Trial(rate=rate, first_s=max(0.0, started_s - begun_s - (before - begun) / rate))


def _runs(plan: Plan) -> list[list[Chunk]]:
    """Return runs of neighbouring chunks from everywhere in what is merged, in an order that spreads them."""
    merged = [index for index, tensor in enumerate(plan.tensors) if tensor.group >= 0 and tensor.elements]
    # Tensors that nothing touches are copied at the speed of the others' base; what is to be tried is the rest.
    tried = [index for index in merged if not plan.tensors[index].unchanged] or merged
    chunks = [chunk for index in tried for chunk in plan.written_chunks(index)]
    begins = sorted(range(0, len(chunks), _RUN_CHUNKS), key=lambda begin: begin // _RUN_CHUNKS * _GOLDEN % 1.0)
    return [chunks[begin : begin + _RUN_CHUNKS] for begin in begins[:_MOST_RUNS]]


def _cached(plan: Plan, chunk: Chunk) -> float:
    """Return which share of a chunk's inputs is in memory; remote ones are all alike and count as if they were."""
    read = dict.fromkeys((*measured_inputs(plan, chunk.tensor), *merged_inputs(plan, chunk.tensor)))
    shares = []
    for index in read:
        place = chunk_range(plan, chunk, index)
        store = open_store(plan.inputs[index].url, plan.storage.of(plan.inputs[index].url))
        if store.is_local and place.size_bytes:
            shares.append(cached_share(store.location(place.path), [(place.start, place.start + place.size_bytes)]))
        store.close()
    return sum(shares) / len(shares) if shares else 1.0


def _age_s() -> float:
    """Return how long this process has been starting: imports and planning; 0 where that is not known, or no start."""
    age_s = 0.0
    with suppress(OSError, ValueError, IndexError, AttributeError):
        # The 22nd field, the program's name, which may hold anything, being the second.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return age_s if age_s < _LONGEST_START_S else 0.0
