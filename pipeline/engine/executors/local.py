"""The local executor: one thread a worker in this process.

Owns threads and queues. The embedded default: no cluster, one debugger, results in seconds.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from pipeline.engine.executors.base import Tick, Usage
from pipeline.engine.executors.limbs import add_limbs, pack, unpack
from pipeline.engine.process import peak_memory_bytes, pick_device, single_threaded_products
from pipeline.engine.worker import Job, ShardWorker

# Seconds between two looks at the workers' progress: smooth on a terminal, no load.
_TICK_S = 0.2


class LocalExecutor:
    """Runs every worker in a thread of its own."""

    name = "local"

    def __init__(self) -> None:
        self._workers: list[ShardWorker] = []
        self._shards: list[tuple[int, ...]] = []
        self._threads: list[threading.Thread] = []
        self._bracket = ExitStack()

    def reach(self, *, workers: int, memory_bytes: int) -> None:
        """Do nothing: this process is there."""

    def start(self, job: Job, shards: Sequence[Sequence[int]]) -> None:
        """Start one worker a shard, instead of those of an earlier job."""
        self.close()
        self._bracket.enter_context(single_threaded_products())
        for rank, shard in enumerate(shards):
            self._workers.append(ShardWorker(dataclasses.replace(job, device=pick_device(job.device, rank))))
            self._shards.append(tuple(shard))

    def map(self, verb: str, items: Mapping[int, tuple[Any, ...]], tick: Tick) -> Iterator[tuple[int, Any]]:
        """Run a verb on files, each on the worker that owns it."""

        def task(worker: ShardWorker, shard: Sequence[int], put: queue.SimpleQueue[Any]) -> None:
            for file in shard:
                if file in items:
                    put.put((file, getattr(worker, verb)(file, *items[file])))

        yield from self._run(task, tick)

    def all_reduce(self, requests: Mapping[int, np.ndarray], tick: Tick) -> dict[int, np.ndarray]:
        """Sum the workers' exact partial sums."""

        def task(worker: ShardWorker, shard: Sequence[int], put: queue.SimpleQueue[Any]) -> None:
            put.put(worker.probe(requests, shard))

        totals: dict[int, np.ndarray] = {}
        for partial in self._run(task, tick):
            add_limbs(totals, partial)
        return unpack(requests, pack(requests, totals))

    def usage(self) -> Usage:
        """Return what the workers have used; they share this process's memory."""
        return Usage(
            peak_memory_bytes={"process": peak_memory_bytes()},
            read_bytes=sum(worker.traffic()[0] for worker in self._workers),
            reused_bytes=sum(worker.traffic()[1] for worker in self._workers),
        )

    def waiting(self) -> str:
        """Return nothing: threads of this process are there or not."""
        return ""

    def halt(self) -> None:
        """Make the workers end what they run."""
        for worker in self._workers:
            worker.stop()
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """End all workers."""
        self.halt()
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        self._shards.clear()
        self._bracket.close()

    def _run(self, task: Any, tick: Tick) -> Iterator[Any]:
        """Run a task in one thread a worker; yield what they put, raise what they raise."""
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def body(worker: ShardWorker, shard: Sequence[int]) -> None:
            try:
                task(worker, shard, results)
                results.put(_Ended(None))
            except BaseException as error:  # handed to the driver's thread, which raises it
                results.put(_Ended(error))

        threads = [
            threading.Thread(target=body, args=pair, name=f"worker-{rank}", daemon=True)
            for rank, pair in enumerate(zip(self._workers, self._shards, strict=True))
        ]
        self._threads = threads
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                try:
                    result = results.get(timeout=_TICK_S)
                except queue.Empty:
                    tick(sum(worker.done_bytes for worker in self._workers))
                    continue
                if not isinstance(result, _Ended):
                    yield result
                    continue
                if result.error is not None:
                    raise result.error
                running -= 1
            tick(sum(worker.done_bytes for worker in self._workers))
        finally:
            if running:
                self.halt()
            for thread in threads:
                thread.join()


class _Ended:
    """A worker's thread is through, with an error or without."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
