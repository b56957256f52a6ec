"""What a worker does with the files of its shard: measure them, probe them, write them.

Owns the plain class that both executors run. Knows nothing of other workers, of threads of the driver, or of Ray.
Legend: P points, N models, I inputs, Q combinations.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from pipeline.checkpoints.writer import SafetensorsWriter
from pipeline.engine.chunk_math import as_cast, measure_chunk, non_finite_remedy, probe_chunk, write_chunk
from pipeline.engine.run_folder import ChunkRow, group_sums, load_rows, save_rows, square, write_json, written_path
from pipeline.engine.solutions import Solution, solve_group
from pipeline.engine.source import ChunkSource, Loaded
from pipeline.errors import CheckpointError, PipelineError, Problem, WorkerError
from pipeline.methods import registry
from pipeline.numerics.exact_sum import ExactSum, exact_column_sums
from pipeline.planning.grid import Chunk, chunks_of
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan
from pipeline.planning.traffic import probed_inputs, written_inputs
from pipeline.storage import open_store

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker needs to start: the same for all of them, and picklable."""

    plan: Plan
    output_url: str
    memory: Memory
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """One finished output file.

    Attributes:
        squared_distances: By group, P sums over this file of ‖written − point‖².
        squared_rounding: By group, the sum over this file of ‖written − exact‖².
        replaced: By point, how many values were not finite and taken from the base.
        solutions: The groups that were solved here (a fused file).
    """

    file: int
    name: str
    size_bytes: int
    sha256: str
    squared_distances: Mapping[int, tuple[float, ...]]
    squared_rounding: Mapping[int, float]
    replaced: tuple[int, ...]
    solutions: tuple[Solution, ...]


class ShardWorker:
    """Runs the passes over the output files it is given. Not thread-safe: one verb at a time.

    Args:
        job: What to do and with what.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._plan = job.plan
        self._device = torch.device(job.device)
        self._output = open_store(job.output_url)
        self._source = ChunkSource(job.plan, job.memory)
        self._pool = ThreadPoolExecutor(job.memory.window, thread_name_prefix="chunk")
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self.done_bytes = 0

    def measure(self, file: int) -> dict[int, np.ndarray]:
        """Read one file's chunks, save their statistics and return the groups' exact sums of distances, as limbs.

        Raises:
            CheckpointError: A model is not finite, integers disagree, a source changed.
        """
        tensors = self._plan.files[file].tensors
        self._source.check_versions(tensors)
        rows = tuple(self._measured(self._plan.chunks(file)))
        # Again, so that no file was replaced while it was read.
        self._source.check_versions(tensors)
        save_rows(self._output, self._plan.files[file].name, rows, self._plan.fingerprint)
        return group_sums(self._plan, rows)

    def probe(self, requests: Mapping[int, np.ndarray], files: Sequence[int]) -> dict[int, np.ndarray]:
        """Return exact partial sums of distances to given combinations, over some files.

        Args:
            requests: By group, coefficients (Q × N) of the combinations.
            files: The output files whose tensors are summed.

        Returns:
            By group, the limbs of Q·N squared distances followed by Q·Q products.
        """
        totals: dict[int, ExactSum] = {}
        inputs = probed_inputs(self._plan)
        for file in files:
            self._source.check_versions(self._plan.files[file].tensors)
            chunks = [c for c in self._plan.chunks(file) if self._plan.tensors[c.tensor].group in requests]

            def task(chunk: Chunk) -> tuple[int, np.ndarray]:
                group = self._plan.tensors[chunk.tensor].group
                with self._source.lease(chunk, inputs, keep=True) as loaded:
                    self._advance(loaded)
                    return group, probe_chunk(self._plan, loaded, requests[group], self._device)

            for group, sums in self._in_order(task, chunks):
                totals.setdefault(group, ExactSum(len(sums))).add(sums)
        return {group: total.to_limbs() for group, total in totals.items()}

    def write(self, file: int, solutions: Mapping[int, Solution]) -> WrittenFile:
        """Write one output file and its marker; a fused file is measured and solved first.

        Args:
            file: Its index.
            solutions: By group; those of a fused file are found here.

        Raises:
            VerificationError: Bytes differ from the first read, or a merged value overflows the output dtype.
        """
        plan = self._plan
        layout = plan.files[file]
        self._source.check_versions(layout.tensors)
        found = dict(solutions)
        fused = layout.fused and not all(
            plan.tensors[t].group in found for t in layout.tensors if plan.tensors[t].group >= 0
        )
        rows = {} if fused or not plan.settings.measured else self._saved_rows(file)
        partial: dict[int, list[tuple[float, ...]]] = {}
        all_rows: list[ChunkRow] = []
        header = [(plan.tensors[t].name, plan.tensors[t].dtype, plan.tensors[t].shape) for t in layout.tensors]
        writer = SafetensorsWriter(self._output.open_writer(layout.name), header, {"format": "pt"})
        try:
            for run in self._runs(layout.tensors):
                chunks = [c for t in run for c in chunks_of(t, plan.tensors[t].elements, plan.chunk_elements)]
                group = plan.tensors[run[0]].group
                if fused:
                    new = tuple(self._measured(chunks))
                    rows = {(row.tensor, row.start): row for row in new}
                    all_rows += new
                    if group >= 0:
                        found[group] = self._solve(group, new)
                for data, sums in self._merged(chunks, found.get(group), rows):
                    writer.write(data)
                    if group >= 0:
                        partial.setdefault(group, []).append(sums)
            self._source.check_versions(layout.tensors)
            written = writer.finish()
        except BaseException:
            writer.abort()
            raise
        if fused:
            save_rows(self._output, layout.name, all_rows, plan.fingerprint)
        points = len(plan.points)
        sums_of = {group: exact_column_sums(np.array(values)) for group, values in partial.items()}
        result = WrittenFile(
            file=file,
            name=layout.name,
            size_bytes=written.size_bytes,
            sha256=written.sha256,
            squared_distances={group: tuple(sums[:points].tolist()) for group, sums in sums_of.items()},
            squared_rounding={group: float(sums[points]) for group, sums in sums_of.items()},
            replaced=tuple(int(sum(sums[points + 1 + row] for sums in sums_of.values())) for row in range(points)),
            # Not only the groups in `sums_of`: one without elements has a solution too.
            solutions=tuple(found[group] for group in sorted(found) if group not in solutions) if fused else (),
        )
        write_json(self._output, written_path(layout.name), marker(result))
        return result

    def traffic(self) -> tuple[int, int]:
        """Return the input bytes fetched so far, and those taken from memory instead of a second fetch."""
        return self._source.read_bytes, self._source.reused_bytes

    def stop(self) -> None:
        """Make the verb in progress end at its next chunk; callable from another thread."""
        self._stopped.set()

    def close(self) -> None:
        """Release threads, buffers and files."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._source.close()
        self._output.close()

    def _measured(self, chunks: Sequence[Chunk]) -> Iterator[ChunkRow]:
        """Yield the statistics of chunks in order; raise after the last one if any model is not finite."""
        bad: dict[tuple[int, int], int] = {}

        def task(chunk: Chunk) -> tuple[ChunkRow, dict[int, int]]:
            copied = self._plan.tensors[chunk.tensor].group < 0
            inputs = range(len(self._plan.inputs)) if copied else self._plan.points
            with self._source.lease(chunk, inputs, keep=True) as loaded:
                self._source.check_copies(loaded)
                if copied:
                    self._source.check_agreement(loaded)
                row = measure_chunk(self._plan, loaded, self._device)
                self._advance(loaded)
                return row

        for row, counts in self._in_order(task, chunks):
            for index, count in counts.items():
                bad[row.tensor, index] = bad.get((row.tensor, index), 0) + count
            yield row
        if bad:
            raise non_finite_error(self._plan, bad)

    def _merged(
        self, chunks: Sequence[Chunk], solution: Solution | None, rows: Mapping[tuple[int, int], ChunkRow]
    ) -> Iterator[tuple[memoryview, tuple[float, ...]]]:
        """Yield the output bytes of chunks in order, with their P distances and rounding."""
        plan = self._plan

        def task(chunk: Chunk) -> tuple[memoryview, tuple[float, ...]]:
            merged = solution is not None
            inputs = written_inputs(plan) if merged else (plan.donor, *range(len(plan.inputs)))
            with self._source.lease(chunk, inputs, drop=True) as loaded:
                if plan.settings.measured:
                    self._source.check_sums(loaded, rows[chunk.tensor, chunk.start].checksums)
                else:
                    self._source.check_copies(loaded)
                if not merged:
                    self._source.check_agreement(loaded)
                self._advance(loaded)
                return write_chunk(plan, loaded, solution, self._device)

        yield from self._in_order(task, chunks)

    def _solve(self, group: int, rows: Sequence[ChunkRow]) -> Solution:
        method = registry()[self._plan.settings.method]
        points = len(self._plan.points)
        # Tensors without elements have no chunks: all their distances are 0.
        sums = exact_column_sums(np.array([row.distances for row in rows])).tolist() if rows else 0.0
        return solve_group(self._plan, method, group, square(sums, points))  # type: ignore[arg-type]

    def _saved_rows(self, file: int) -> dict[tuple[int, int], ChunkRow]:
        return {(row.tensor, row.start): row for row in load_rows(self._output, self._plan.files[file].name)}

    def _runs(self, tensors: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Yield consecutive tensors of one group."""
        run: list[int] = []
        for tensor in tensors:
            if run and self._plan.tensors[tensor].group != self._plan.tensors[run[0]].group:
                yield tuple(run)
                run = []
            run.append(tensor)
        if run:
            yield tuple(run)

    def _in_order(self, task: Callable[[Chunk], T], chunks: Sequence[Chunk]) -> Iterator[T]:
        """Yield the results of a task over chunks in order, a window of them in flight."""
        pending: deque[Future[T]] = deque()
        waiting = iter(chunks)
        try:
            while True:
                while len(pending) < self._job.memory.window and (chunk := next(waiting, None)) is not None:
                    pending.append(self._pool.submit(task, chunk))
                if not pending:
                    return
                if self._stopped.is_set():
                    raise WorkerError(Problem(what="stopped because another part of the merge failed"))
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            for future in pending:
                if not future.cancelled():
                    future.exception()

    def _advance(self, loaded: Loaded) -> None:
        with self._lock:
            self.done_bytes += sum(array.nbytes for array in loaded.raw.values())


def marker(result: WrittenFile) -> dict[str, object]:
    """Return the JSON form of a finished file."""
    return {
        "file": result.file,
        "name": result.name,
        "size_bytes": result.size_bytes,
        "sha256": result.sha256,
        "squared_distances": {str(group): list(values) for group, values in result.squared_distances.items()},
        "squared_rounding": {str(group): value for group, value in result.squared_rounding.items()},
        "replaced": list(result.replaced),
        "solutions": [solution.to_json() for solution in result.solutions],
    }


def non_finite_error(plan: Plan, bad: Mapping[tuple[int, int], int]) -> PipelineError:
    """Return the error that lists every model and tensor with values that are not finite.

    Args:
        plan: The plan.
        bad: Counts by (tensor index, input index).
    """
    return CheckpointError(
        *(
            Problem(
                what=f"{count} of {plan.tensors[tensor].elements} values are NaN or infinite{as_cast(plan)}",
                where=f"model {plan.inputs[index].name}, tensor {plan.tensors[tensor].name}",
                remedy=non_finite_remedy(plan, index),
            )
            for (tensor, index), count in sorted(bad.items())
        )
    )
