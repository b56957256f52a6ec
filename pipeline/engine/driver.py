"""The driver of a merge: measure, solve, write, each only as far as it is not done already.

Owns the order of the phases, what is resumed, and the last check of what was written against what was solved. Legend:
P points, N models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.engine.executors.base import Executor, Usage
from pipeline.engine.output import written_markers
from pipeline.engine.reductions import Reductions, Requests, Totals, forget_reductions
from pipeline.engine.run_folder import (
    MEASURED,
    NORMS,
    SOLUTIONS,
    WRITTEN,
    at_once,
    finished,
    group_sums,
    is_measured,
    read_json,
    read_rows,
    square,
    write_json,
)
from pipeline.engine.solutions import (
    Solution,
    fixed_solution,
    predicted_distances,
    refuse_far,
    solution_from_json,
    solve_group,
    with_median,
)
from pipeline.engine.streaming import stream_groups
from pipeline.engine.system_records import refuse_zero_norms
from pipeline.engine.worker import Job
from pipeline.engine.written_file import WrittenFile, from_marker
from pipeline.errors import Problem, VerificationError
from pipeline.events import FileMeasured, FileWritten, GroupSolved, Listener, Note, PassEnded, PassProgress, PassStarted
from pipeline.methods import registry
from pipeline.numerics.exact_sum import ExactSum, exact_column_sums
from pipeline.planning.assignment import assign
from pipeline.planning.plan import Plan
from pipeline.planning.traffic import (
    dense_inputs,
    factor_bytes,
    input_bytes,
    measured_bytes,
    merged_bytes,
    probed_points,
    statistics_bytes,
    written_points,
)
from pipeline.storage import Store

# Squared distances follow from the table by sums of products of its entries with the factors; this is their error
# relative to the largest such product.
_TABLE_PRECISION = 1e-12


@dataclass(kw_only=True)
class Outcome:
    """What a merge did, for the report.

    Attributes:
        solutions: One a group.
        written: One a file, in the plan's order.
        usage: What this run read and held; nothing when all was done before.
        stream_passes: Iterations that measured the parameters again.
        resumed: Files found measured or written by an earlier run.
    """

    solutions: tuple[Solution, ...] = ()
    written: tuple[WrittenFile, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    usage: Usage = field(default_factory=lambda: Usage(peak_memory_bytes={}, read_bytes=0, reused_bytes=0))
    stream_passes: int = 0
    resumed: int = 0
    workers: int = 0
    executor: str = ""


class Driver:
    """Leads one merge.

    Args:
        plan: The plan, saved in the output already.
        output: The output folder.
        executor: It is started, for this job, only if there is work, and closed by its owner.
        job: What workers need.
        workers: How many.
        listener: Told what happens.
        guard: Raises when this run may no longer write; called now and then, so it must be quick.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        output: Store,
        executor: Executor,
        job: Job,
        workers: int,
        listener: Listener,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._plan = plan
        self._output = output
        self._executor = executor
        self._job = job
        self._workers = workers
        self._listen = listener
        self._guard = guard
        self._started = False
        # Files that are measured, solved and written in one go.
        self._alone: frozenset[int] = frozenset()
        self._base_bytes = 0
        self._sums: dict[int, ExactSum] = {}
        self._outcome = Outcome(workers=workers, executor=executor.name)

    def run(self) -> Outcome:
        """Do what is not done yet and return everything; the executor is left open.

        Raises:
            PipelineError: The first failure of any phase.
        """
        try:
            return self._run()
        except BaseException:
            # Before the claim is let go of: nobody of ours may write after that.
            self._executor.halt()
            raise

    def _run(self) -> Outcome:
        outcome, plan = self._outcome, self._plan
        solutions: dict[int, Solution] = {}
        if plan.settings.measured:
            self._measure()
            solutions = self._solve()
        for group, planned in enumerate(plan.groups):
            if planned.coefficients is not None:
                solutions[group] = fixed_solution(plan, group)
        written = self._write(solutions)
        for record in written.values():
            solutions.update({solution.group: solution for solution in record.solutions})
        outcome.solutions = tuple(solutions[group] for group in range(len(plan.groups)))
        outcome.written = tuple(written[file] for file in range(len(plan.files)))
        self._check_distances()
        if self._started:
            outcome.usage = self._executor.usage()
        return outcome

    def _start(self) -> Executor:
        if not self._started:
            self._executor.start(self._job, assign(self._plan, self._workers))
            self._started = True
        return self._executor

    def _measure(self) -> None:
        """Measure the files that nobody has measured; fused ones wait for the writing pass."""
        plan = self._plan
        saved = self._saved_solutions()
        if saved is not None:
            solved = {int(entry["group"]) for entry in saved["solutions"]}
            self._alone = frozenset(
                file for file, layout in enumerate(plan.files) if layout.fused and self._open_groups(file) - solved
            )
            return
        marked = finished(self._output, MEASURED, ".parquet")
        names = [layout.name for layout in plan.files if layout.name in marked]
        ours = at_once(self._output, lambda name: is_measured(self._output, name, plan.fingerprint), names)
        done = {name for name, own in zip(names, ours, strict=True) if own}
        # A fused file that is measured before it is written had its distances taken from another merge.
        wanted = [file for file, layout in enumerate(plan.files) if not layout.fused or layout.name in done]
        self._alone = frozenset(range(len(plan.files))) - frozenset(wanted)
        missing = [file for file in wanted if plan.files[file].name not in done]
        for file in wanted:
            if file not in missing:
                self._add(group_sums(plan, read_rows(self._output, plan.files[file].name, plan.fingerprint)))
        self._note_resumed("measured", len(wanted) - len(missing))
        if not missing:
            return
        total = sum(self._measured_bytes(file) for file in missing)
        with self._pass("measure", total, len(missing)) as tick:
            for file, partial in self._start().map("measure", dict.fromkeys(missing, ()), tick):
                self._add(partial)
                self._listen(FileMeasured(file=plan.files[file].name))

    def _solve(self) -> dict[int, Solution]:
        """Return the solutions of all groups that span files, from the run folder if they are there."""
        plan = self._plan
        alone = set().union(*(self._open_groups(file) for file in self._alone))
        wanted = [g for g, group in enumerate(plan.groups) if g not in alone and group.coefficients is None]
        saved = self._saved_solutions()
        if saved is not None:
            return {int(entry["group"]): solution_from_json(entry) for entry in saved["solutions"]}
        if not wanted:
            return {}
        started = time.perf_counter()
        tables = self._tables(wanted)
        method: Any = registry()[plan.settings.method]
        if plan.settings.distances == "stream":
            for group in wanted:
                refuse_far(plan, group, tables[group])
            solutions = self._stream(wanted, tables)
        else:
            solutions = {group: solve_group(plan, method, group, tables[group]) for group in wanted}
        self._tell_solved(solutions.values())
        found = [solution.to_json() for solution in solutions.values()]
        write_json(self._output, SOLUTIONS, {"fingerprint": plan.fingerprint, "solutions": found})
        forget_reductions(self._output)
        self._outcome.seconds["solve"] = time.perf_counter() - started
        return solutions

    def _saved_solutions(self) -> dict[str, Any] | None:
        """Return what an earlier run of this plan has solved, or None."""
        saved = read_json(self._output, SOLUTIONS)
        return saved if saved is not None and saved.get("fingerprint") == self._plan.fingerprint else None

    def _stream(self, wanted: Sequence[int], tables: Mapping[int, np.ndarray]) -> dict[int, Solution]:
        """Return solutions whose coefficients come from iterations over the parameters."""
        plan = self._plan
        total = sum(
            input_bytes(tensor, dense_inputs(plan, index, probed_points(plan)) if tensor.shared is None else ())
            + factor_bytes(tensor)
            for index, tensor in enumerate(plan.tensors)
            if tensor.group in wanted
        )

        def measure(number: int, requests: Requests) -> Totals:
            if reductions.replayed == number - 1 > 0:
                self._listen(Note(text=f"resumed: {number - 1} iterations over the parameters were done before"))
            self._outcome.stream_passes += 1
            with self._pass(f"iteration {number}", total, len(plan.files)) as tick:
                limbs = self._start().all_reduce(requests, tick)
            return {group: ExactSum.from_limbs(values).total() for group, values in limbs.items()}

        reductions = Reductions(self._output, plan.fingerprint, measure)
        medians = stream_groups(plan, wanted, reductions)
        return {group: with_median(plan, group, tables[group], median) for group, median in medians.items()}

    def _tables(self, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """Return the groups' P × P tables of squared distances: exactly rounded sums over all chunks, in any order."""
        points = len(self._plan.points)
        return {
            group: square(self._sums[group].total(), points) if group in self._sums else np.zeros((points, points))
            for group in wanted
        }

    def _add(self, partial: Mapping[int, ExactSum]) -> None:
        """Add one file's sums of distances."""
        for group, sums in partial.items():
            self._sums.setdefault(group, ExactSum(len(sums))).merge(sums)

    def _write(self, solutions: Mapping[int, Solution]) -> dict[int, WrittenFile]:
        """Write the files that no earlier run has finished."""
        plan = self._plan
        done = finished(self._output, WRITTEN, ".json")
        names = [layout.name for layout in plan.files if layout.name in done]
        markers = written_markers(self._output, names, plan.fingerprint)
        written = {
            file: from_marker(markers[layout.name]) for file, layout in enumerate(plan.files) if layout.name in markers
        }
        self._note_resumed("written", len(written))
        missing = [file for file in range(len(plan.files)) if file not in written]
        if not missing:
            return written
        norms_N = self._norms()
        items: dict[int, tuple[Any, ...]] = {}
        for file in missing:
            groups = {plan.tensors[tensor].group for tensor in plan.files[file].tensors}
            own = {group: solutions[group] for group in groups if group in solutions}
            items[file] = (own, norms_N) if norms_N else (own,)
        total = sum(
            sum(merged_bytes(plan, tensor) for tensor in plan.files[file].tensors)
            + (self._measured_bytes(file) if file in self._alone else 0)
            for file in missing
        )
        with self._pass("write", total, len(missing)) as tick:
            for file, record in self._start().map("write", items, tick):
                written[file] = record
                self._tell_solved(record.solutions)
                self._listen(FileWritten(file=record.name, size_bytes=record.size_bytes))
        return written

    def _norms(self) -> tuple[float, ...]:
        """Return the global norms (N) of the models' diagonals; nothing where the method does not divide by them."""
        plan = self._plan
        if plan.settings.solver is None or not plan.settings.solver.normalize:
            return ()
        saved = read_json(self._output, NORMS)
        if saved is not None and saved.get("fingerprint") == plan.fingerprint:
            return tuple(saved["norms"])
        total = ExactSum(len(plan.models))
        files = range(len(plan.files))
        with self._pass("weigh", sum(map(statistics_bytes, plan.tensors)), len(files)) as tick:
            for _, sums in self._start().map("weigh", dict.fromkeys(files, ()), tick):
                if sums is not None:
                    total.merge(sums)
        norms_N = tuple(math.sqrt(square) for square in total.total().tolist())
        refuse_zero_norms(plan, norms_N)
        write_json(self._output, NORMS, {"fingerprint": plan.fingerprint, "norms": norms_N})
        return norms_N

    def _tell_solved(self, solutions: Iterable[Solution]) -> None:
        """Emit an event for every group that was solved just now, here or by a worker."""
        for solution in solutions:
            if solution.median is not None:
                group = self._plan.groups[solution.group].name
                median = solution.median
                self._listen(GroupSolved(group=group, iterations=median.iterations, relative_gap=median.relative_gap))

    def _check_distances(self) -> None:
        """Raise when what was written does not lie where the solution says, up to its own rounding.

        The distance measured from the written values and the one that follows from the table can differ by no more
        than the distance between written and exact values (triangle inequality).
        """
        plan = self._plan
        for solution in self._outcome.solutions:
            if not solution.distances.size:
                continue
            measured_P, rounding = written_distances(self._outcome.written, solution.group, len(plan.points))
            predicted_P = predicted_distances(solution)
            reach = math.fsum(abs(factor) for factor in solution.factors)
            slack = rounding * (1 + 1e-6) + reach * math.sqrt(_TABLE_PRECISION * float(np.max(solution.distances)))
            rows = range(len(plan.points) - len(written_points(plan)), len(plan.points))
            worst = max(rows, key=lambda row: abs(measured_P[row] - predicted_P[row]))
            if abs(measured_P[worst] - predicted_P[worst]) > slack:
                raise VerificationError(
                    Problem(
                        what=f"what was written lies {measured_P[worst]:.9g} from model"
                        f" {plan.inputs[plan.points[worst]].name}, but the solution says {predicted_P[worst]:.9g}",
                        where=f"group {plan.groups[solution.group].name}",
                        remedy="a bit was lost in memory or on the way; start again with --overwrite",
                    )
                )

    def _open_groups(self, file: int) -> set[int]:
        """Return the groups of an output file that distances have a say in."""
        plan = self._plan
        groups = {plan.tensors[tensor].group for tensor in plan.files[file].tensors}
        return {group for group in groups if group >= 0 and plan.groups[group].coefficients is None}

    def _measured_bytes(self, file: int) -> int:
        """Return the input bytes that measuring one output file's tensors reads."""
        return sum(measured_bytes(self._plan, tensor) for tensor in self._plan.files[file].tensors)

    @contextmanager
    def _pass(self, name: str, total_bytes: int, files: int) -> Iterator[Callable[[int], None]]:
        started = time.perf_counter()
        self._guard()
        self._listen(PassStarted(name=name, total_bytes=total_bytes, files=files))
        last = self._base_bytes

        def tick(done_bytes: int) -> None:
            nonlocal last
            self._guard()
            last = max(last, done_bytes)
            self._listen(PassProgress(name=name, done_bytes=last - self._base_bytes))

        yield tick
        self._base_bytes = last
        seconds = time.perf_counter() - started
        if not name.startswith("iteration"):
            self._outcome.seconds[name] = seconds
        self._listen(PassEnded(name=name, seconds=seconds))

    def _note_resumed(self, verb: str, files: int) -> None:
        if files:
            self._outcome.resumed += files
            self._listen(Note(text=f"resumed: {files} of {len(self._plan.files)} files were {verb} before"))


def written_distances(written: Sequence[WrittenFile], group: int, points: int) -> tuple[np.ndarray, float]:
    """Return the distances (P) from what was written to the points, and from its exact values, over all files."""
    rows = [record.squared_distances[group] for record in written if group in record.squared_distances]
    if not rows:
        return np.zeros(points), 0.0
    rounding = math.fsum(record.squared_rounding[group] for record in written if group in record.squared_rounding)
    return np.sqrt(exact_column_sums(np.array(rows))), math.sqrt(rounding)
