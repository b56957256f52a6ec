"""What a worker does with the files of its shard: measure them, probe them, write them.

Owns the plain class that both executors run. Knows nothing of other workers, of threads of the driver, or of Ray.
Legend: P points, N models, I inputs, Q combinations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.checkpoints.writer import SafetensorsWriter
from pipeline.engine.chunk_math import MergedChunk, non_finite_error
from pipeline.engine.chunk_tasks import Checksums, ChunkTasks
from pipeline.engine.in_order import InOrder, Room
from pipeline.engine.moment_source import MomentSource
from pipeline.engine.process import load_torch
from pipeline.engine.read_ahead import Need
from pipeline.engine.run_folder import ChunkRow, GroupSums, RowsWriter, load_checksums, square, write_json, written_path
from pipeline.engine.solutions import Solution, solve_group
from pipeline.engine.source import ChunkSource
from pipeline.engine.updates import TensorCache
from pipeline.engine.written_file import Gathered, WrittenFile, marker
from pipeline.methods import registry
from pipeline.numerics.exact_sum import ExactSum
from pipeline.planning.grid import Chunk
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan
from pipeline.storage import open_store

if TYPE_CHECKING:
    from pipeline.engine.metric import MetricSource
    from pipeline.engine.systems import Systems

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker needs to start: the same for all of them, and picklable."""

    plan: Plan
    output_url: str
    memory: Memory
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _DoneRun:
    """Consecutive tensors of one group: their solution, and their chunks in order."""

    solution: Solution | None
    merged: Iterator[MergedChunk]


class ShardWorker:
    """Runs the passes over the output files it is given. Not thread-safe: one verb at a time.

    Args:
        job: What to do and with what.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._plan = job.plan
        solves = job.plan.settings.solver is not None
        if solves or job.plan.settings.metric is not None or any(tensor.updates for tensor in job.plan.tensors):
            # Here, and not by the first thread that needs it: the setting of its products is of the importing thread.
            load_torch()
        self._output = open_store(job.output_url, job.plan.storage.of(job.output_url))
        self._source = ChunkSource(job.plan, job.memory)
        self._moments = MomentSource(job.plan, job.memory.requests)
        self._tasks = ChunkTasks(job.plan, self._source, job.device, _metric_source(job, self._moments))
        self._pool = ThreadPoolExecutor(job.memory.window, thread_name_prefix="chunk")
        self._stopped = threading.Event()
        self._flow = InOrder(self._pool, job.memory.window, self._source, self._stopped)
        self._systems = self._make_systems() if solves else None

    @property
    def done_bytes(self) -> int:
        """The input bytes done so far, for progress."""
        return self._tasks.done_bytes

    def measure(self, file: int) -> dict[int, ExactSum]:
        """Read one file's chunks, save their statistics and return the groups' exact sums of distances.

        Raises:
            CheckpointError: A model is not finite, integers disagree, a source changed.
        """
        tensors = self._plan.files[file].tensors
        self._check_versions(tensors)
        sums = GroupSums(self._plan)
        with RowsWriter(self._output, self._plan.files[file].name, self._plan.fingerprint) as saved:
            for row in self.measured([c for t in tensors for c in self._plan.measured_chunks(t)]):
                sums.add(row)
                saved.add(row)
            # Again, so that no file was replaced while it was read.
            self._check_versions(tensors)
            saved.finish()
        return sums.totals()

    def probe(self, requests: Mapping[int, np.ndarray], files: Sequence[int]) -> dict[int, np.ndarray]:
        """Return exact partial sums of distances to given combinations, over some files.

        Args:
            requests: By group, coefficients (Q × N) of the combinations.
            files: The output files whose tensors are summed.

        Returns:
            By group, the limbs of Q·N squared distances followed by Q·Q products.
        """
        plan = self._plan
        totals: dict[int, ExactSum] = {}
        cache = TensorCache(self._tasks.read)
        for file in files:
            tensors = plan.files[file].tensors
            self._check_versions(tensors)
            chunks = [c for t in tensors if plan.tensors[t].group in requests for c in plan.measured_chunks(t)]

            def task(chunk: Chunk) -> tuple[int, np.ndarray]:
                group = plan.tensors[chunk.tensor].group
                with cache.lease(chunk.tensor) as prepared:
                    return group, self._tasks.probe(chunk, prepared, requests[group])

            for group, sums in self._in_order(task, chunks, self._tasks.needs_to_probe):
                totals.setdefault(group, ExactSum(len(sums))).add(sums)
        return {group: total.to_limbs() for group, total in totals.items()}

    def weigh(self, file: int) -> ExactSum | None:
        """Return the exact sums of the squares of the models' diagonals in one file; None where it has none.

        Raises:
            CheckpointError: A diagonal is unusable, or a source changed.
        """
        tensors = [tensor for tensor in self._plan.files[file].tensors if self._plan.tensors[tensor].system is not None]
        if self._systems is None or not tensors:
            return None
        chunks = [chunk for tensor in tensors for chunk in self._plan.written_chunks(tensor)]
        self._moments.check_versions(tensors)
        sums = [np.array(row) for row in self._in_order(self._systems.chunks.squares, chunks, lambda _: iter(()))]
        self._moments.check_versions(tensors)
        total = ExactSum(len(self._plan.models))
        total.add(sums)
        return total

    def write(self, file: int, solutions: Mapping[int, Solution], norms_N: Sequence[float] = ()) -> WrittenFile:
        """Write one output file and its marker; a fused file is measured and solved first.

        Args:
            file: Its index.
            solutions: By group; those of a fused file are found here.
            norms_N: What the models' diagonals are divided by; nothing where they are not.

        Raises:
            VerificationError: Bytes differ from the first read, or a merged value overflows the output dtype.
        """
        plan = self._plan
        layout = plan.files[file]
        self._check_versions(layout.tensors)
        found = dict(solutions)
        fused = layout.fused and not all(
            plan.tensors[t].group in found for t in layout.tensors if plan.tensors[t].group >= 0
        )
        gathered = Gathered(plan)
        saved = RowsWriter(self._output, layout.name, plan.fingerprint)
        header = [(e.name, plan.tensors[t].dtype, e.shape) for t in layout.tensors for e in plan.tensors[t].entries]
        writer = SafetensorsWriter(self._output.open_writer(layout.name), header, {"format": "pt"})
        chunks = iter(plan.chunks(file))
        try:
            runs = self._fused_runs(layout.tensors, found, saved) if fused else self._solved_runs(file, found, norms_N)
            for run in runs:
                if run.solution is not None:
                    found[run.solution.group] = run.solution
                for merged in run.merged:
                    writer.write(merged.data)
                    gathered.add(next(chunks).tensor, merged)
            self._check_versions(layout.tensors)
            written = writer.finish()
            if fused:
                saved.finish()
        except BaseException:
            writer.abort()
            saved.abort()
            raise
        # Not only the groups of merged chunks: one without elements has a solution too.
        solved = tuple(found[group] for group in sorted(found) if group not in solutions) if fused else ()
        result = gathered.written_file(file, written, solved)
        write_json(self._output, written_path(layout.name), marker(result, plan.fingerprint))
        if self._systems is not None:
            self._systems.states.forget(layout.tensors)
        return result

    def traffic(self) -> tuple[int, int]:
        """Return the input bytes fetched so far, and those taken from memory instead of a second fetch."""
        return self._source.read_bytes + self._moments.read_bytes, self._source.reused_bytes

    def stop(self) -> None:
        """Make the verb in progress end at its next chunk; callable from another thread."""
        self._stopped.set()

    def close(self) -> None:
        """Release threads, buffers and files."""
        self._stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._source.close()
        self._moments.close()
        self._output.close()

    def measured(self, chunks: Sequence[Chunk]) -> Iterator[ChunkRow]:
        """Yield the statistics of chunks in order; raise after the last one if any model is not finite."""
        bad: dict[tuple[int, int], int] = {}
        cache = TensorCache(self._tasks.read)

        def task(chunk: Chunk) -> tuple[ChunkRow, dict[int, int]]:
            with cache.lease(chunk.tensor) as prepared:
                return self._tasks.measure(chunk, prepared)

        for row, counts in self._in_order(task, chunks, self._tasks.needs_to_measure):
            for index, count in counts.items():
                bad[row.tensor, index] = bad.get((row.tensor, index), 0) + count
            yield row
        if bad:
            raise non_finite_error(self._plan, bad)

    def merged(self, chunks: Sequence[Chunk], solution: Solution | None, checksums: Checksums) -> Iterator[MergedChunk]:
        """Yield merged chunks in order."""
        cache = TensorCache(lambda tensor: self._tasks.read_again(tensor, solution, checksums))

        def task(chunk: Chunk) -> MergedChunk:
            with cache.lease(chunk.tensor) as prepared:
                return self._tasks.merge(chunk, solution, checksums, prepared)

        yield from self._in_order(task, chunks, self._tasks.needs_to_merge)

    def _check_versions(self, tensors: Sequence[int]) -> None:
        """Raise when a file that these tensors are read from is not the one that was planned for."""
        self._source.check_versions(tensors)
        self._moments.check_versions(tensors)

    def _solved_runs(self, file: int, found: Mapping[int, Solution], norms_N: Sequence[float]) -> Iterator[_DoneRun]:
        """Merge consecutive tensors of one group at a time; all groups are solved, and what is measured was saved."""
        plan = self._plan
        checksums: Checksums = {}
        if plan.settings.measured:
            checksums = load_checksums(self._output, plan.files[file].name, plan.fingerprint)
        for run in self._runs(plan.files[file].tensors):
            if self._systems is not None and plan.tensors[run[0]].system is not None:
                yield _DoneRun(solution=None, merged=self._systems.merged(run, norms_N, self._in_order))
                continue
            solution = found.get(plan.tensors[run[0]].group)
            chunks = [chunk for tensor in run for chunk in plan.written_chunks(tensor)]
            yield _DoneRun(solution=solution, merged=self.merged(chunks, solution, checksums))

    def _make_systems(self) -> Systems:
        """Return what solves systems; torch is imported with it."""
        from pipeline.engine.systems import Systems

        return Systems(
            plan=self._plan,
            memory=self._job.memory,
            source=self._source,
            moments=self._moments,
            tasks=self._tasks,
            output=self._output,
            device=self._job.device,
            check=self._flow.check,
        )

    def _fused_runs(
        self, tensors: Sequence[int], found: Mapping[int, Solution], saved: RowsWriter
    ) -> Iterator[_DoneRun]:
        """Measure, solve and merge consecutive tensors of one group at a time, and yield their chunks in order.

        Runs of one chunk are done whole by one thread, several at a time; in others the threads share the chunks.
        """
        plan = self._plan

        def alone(run: tuple[int, ...]) -> bool:
            return len(run) == 1 and plan.is_one_chunk(run[0])

        for single, runs in groupby(self._runs(tensors), alone):
            if single:
                alone_in = [run[0] for run in runs]
                done_whole = self._in_order(
                    lambda tensor: self._whole(tensor, found), alone_in, self._tasks.needs_of_all
                )
                for rows, done in done_whole:
                    for row in rows:
                        saved.add(row)
                    yield done
                continue
            for run in runs:
                sums, checksums = GroupSums(plan), {}
                for row in self.measured([chunk for tensor in run for chunk in plan.measured_chunks(tensor)]):
                    saved.add(row)
                    sums.add(row)
                    checksums[row.tensor, row.start] = row.checksums
                total = sums.totals().get(plan.tensors[run[0]].group)
                solution = self._solution(run[0], total.total() if total is not None else 0.0, found)
                chunks = [chunk for tensor in run for chunk in plan.written_chunks(tensor)]
                yield _DoneRun(solution=solution, merged=self.merged(chunks, solution, checksums))

    def _whole(self, tensor: int, found: Mapping[int, Solution]) -> tuple[list[ChunkRow], _DoneRun]:
        """Measure, solve and merge a tensor of one chunk that is a group by itself."""
        measured, written = self._plan.measured_chunks(tensor), self._plan.written_chunks(tensor)
        prepared = self._tasks.read(tensor, keep=False)
        if self._tasks.is_one_read(tensor):
            solved: list[Solution | None] = []

            def solve(row: ChunkRow) -> Solution | None:
                solved.append(self._solution(tensor, row.distances, found))
                return solved[0]

            row, merged = self._tasks.measure_and_merge(measured[0], prepared, solve)
            return [row], _DoneRun(solution=solved[0], merged=iter([merged]))
        # Of factors there is nothing to count as not finite: reading them refuses that.
        rows = [self._tasks.measure(chunk, prepared)[0] for chunk in measured]
        solution = self._solution(tensor, rows[0].distances if rows else 0.0, found)
        combined = self._tasks.combined(tensor, prepared, solution, reused=True)
        chunks = [self._tasks.merge(chunk, solution, {}, combined) for chunk in written]
        return rows, _DoneRun(solution=solution, merged=iter(chunks))

    def _solution(self, tensor: int, distances: np.ndarray | float, found: Mapping[int, Solution]) -> Solution | None:
        """Return the solution of a tensor's group; None for tensors that are copied.

        Args:
            tensor: Any of the group.
            distances: The group's, the upper triangle row by row; 0 where it has no elements.
            found: Groups that were solved before.
        """
        plan = self._plan
        group = plan.tensors[tensor].group
        if group < 0 or group in found:
            return found.get(group)
        method: Any = registry()[plan.settings.method]
        return solve_group(plan, method, group, square(distances, len(plan.points)))

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

    def _in_order(
        self,
        task: Callable[[S], T],
        items: Sequence[S],
        needs: Callable[[S], Iterator[Need]],
        room: Room[S] | None = None,
    ) -> Iterator[T]:
        """Yield the results of a task over chunks, or whole tensors, in order; see `InOrder.run`."""
        return self._flow.run(task, items, needs, room)


def _metric_source(job: Job, moments: MomentSource) -> MetricSource | None:
    """Return what distances are measured in; None for Euclidean ones, which need no torch."""
    if job.plan.settings.metric is None:
        return None
    from pipeline.engine.metric import MetricSource

    return MetricSource(job.plan, moments, job.device)
