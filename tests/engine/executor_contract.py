"""What every executor must do, as a class of tests; a new executor inherits it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.engine.executors.base import Executor
from pipeline.engine.executors.local import LocalExecutor
from pipeline.engine.output import prepare
from pipeline.engine.run_folder import read_rows
from pipeline.engine.solutions import with_median
from pipeline.engine.worker import Job
from pipeline.errors import CheckpointError
from pipeline.merging import Resources, load_recipe, plan_merge
from pipeline.methods import registry
from pipeline.numerics.exact_sum import ExactSum
from pipeline.planning.assignment import assign
from pipeline.planning.plan import Plan
from pipeline.storage import open_store
from tests.support.families import Family, make_family
from tests.support.reference import flatten

WORKERS = 3


def ignore_progress(done_bytes: int) -> None:
    """Take no notice."""


class ExecutorContract:
    """Subclasses give `executor`, which may have served other tests, and `fresh`, which has not."""

    @pytest.fixture
    def executor(self) -> Executor:
        raise RuntimeError("a subclass must give the executor")

    @pytest.fixture
    def fresh(self) -> Iterator[Executor]:
        raise RuntimeError("a subclass must give another one")

    @pytest.fixture
    def family(self, tmp_path: Path) -> Family:
        return make_family(tmp_path, 4, dtype=torch.bfloat16, loud=2)

    @pytest.fixture
    def job(self, family: Family, tmp_path: Path) -> Job:
        recipe = load_recipe(str(family.recipe(pipeline={"file_size": "10KB"})))[0]
        output = open_store(str(tmp_path / "out"))
        planned = plan_merge(recipe, output, Resources(workers=WORKERS), probe=False)
        prepare(planned.plan, output, overwrite=False)
        return Job(plan=planned.plan, output_url=output.url, memory=planned.memory, device="cpu")

    @pytest.fixture
    def started(self, executor: Executor, job: Job) -> Executor:
        executor.start(job, assign(job.plan, WORKERS))
        return executor

    def test_every_file_comes_back_once(self, started: Executor, job: Job) -> None:
        files = range(len(job.plan.files))
        seen = []
        results = dict(started.map("measure", dict.fromkeys(files, ()), seen.append))
        assert sorted(results) == list(files)
        assert len(files) > WORKERS
        assert seen
        assert seen == sorted(seen)
        size = sum(tensor.elements * 2 for tensor in job.plan.tensors)
        assert 0 < seen[-1] <= len(job.plan.inputs) * size

    def test_only_the_asked_files_are_run(self, started: Executor, job: Job) -> None:
        results = dict(started.map("measure", {1: (), 2: ()}, ignore_progress))
        assert sorted(results) == [1, 2]
        output = open_store(job.output_url)
        assert tuple(read_rows(output, job.plan.files[1].name))
        assert not output.exists("_geomerge/measured/" + job.plan.files[0].name + ".parquet")

    def test_sums_are_those_of_the_parameters(self, started: Executor, job: Job, family: Family) -> None:
        totals: dict[int, ExactSum] = {}
        for _, partial in started.map("measure", dict.fromkeys(range(len(job.plan.files)), ()), ignore_progress):
            for group, sums in partial.items():
                totals.setdefault(group, ExactSum(len(sums))).merge(sums)
        points = self.points(family)
        wanted = [((points[i] - points[j]) ** 2).sum() for i in range(len(points)) for j in range(i + 1, len(points))]
        np.testing.assert_allclose(totals[0].total(), wanted, rtol=1e-13)

    def test_reduction_adds_up_all_shards(self, started: Executor, job: Job, family: Family) -> None:
        coefficients = np.array([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
        points = self.points(family)[1:]
        combinations = coefficients @ points
        wanted = ((combinations[:, None, :] - points[None, :, :]) ** 2).sum(axis=2)
        step = combinations[1] - combinations[0]
        for _ in range(3):
            limbs = started.all_reduce({0: coefficients}, ignore_progress)
            values = ExactSum.from_limbs(limbs[0]).total()
            np.testing.assert_allclose(values[:8].reshape(2, 4), wanted, rtol=1e-12, atol=1e-20)
            np.testing.assert_allclose(values[8:], [0, 0, 0, step @ step], rtol=1e-12, atol=1e-20)

    def test_limbs_do_not_depend_on_who_adds_what(self, executor: Executor, job: Job) -> None:
        alone = LocalExecutor()
        requests = {0: np.array([[0.1, 0.2, 0.3, 0.4], [1.5, -0.5, 0.0, 0.0]])}
        try:
            alone.start(job, [range(len(job.plan.files))])
            wanted = alone.all_reduce(requests, ignore_progress)
        finally:
            alone.close()
        for workers in (WORKERS, 2):
            executor.start(job, assign(job.plan, workers))
            limbs = executor.all_reduce(requests, ignore_progress)
            assert limbs[0].dtype == wanted[0].dtype == np.int64
            assert np.array_equal(limbs[0], wanted[0])

    def test_a_started_executor_takes_another_job(self, started: Executor, job: Job, tmp_path: Path) -> None:
        files = range(len(job.plan.files))
        before = dict(started.map("measure", dict.fromkeys(files, ()), ignore_progress))
        used = started.usage().read_bytes
        output = open_store(str(tmp_path / "second"))
        prepare(job.plan, output, overwrite=False)
        for workers in (2, WORKERS):
            started.start(dataclasses.replace(job, output_url=output.url), assign(job.plan, workers))
            seen: list[int] = []
            after = dict(started.map("measure", dict.fromkeys(files, ()), seen.append))
            assert {file: sums[0].total().tolist() for file, sums in after.items()} == {
                file: sums[0].total().tolist() for file, sums in before.items()
            }
            # Usage and progress begin at zero, for one job as for the other.
            assert started.usage().read_bytes == used
            assert seen == sorted(seen)
            assert seen[-1] <= used
        assert output.exists("_geomerge/measured/" + job.plan.files[0].name + ".parquet")

    def test_nothing_is_waited_for_while_all_run(self, started: Executor) -> None:
        assert started.waiting() == ""

    def test_files_are_written_and_marked(self, started: Executor, job: Job) -> None:
        files = range(len(job.plan.files))
        for _ in started.map("measure", dict.fromkeys(files, ()), ignore_progress):
            pass
        solutions = {0: self.even(job.plan)}
        records = dict(started.map("write", dict.fromkeys(files, (solutions,)), ignore_progress))
        output = open_store(job.output_url)
        for file, record in records.items():
            assert output.stat(record.name).size_bytes == record.size_bytes
            assert output.exists(f"_geomerge/written/{record.name}.json")
            assert record.file == file
        usage = started.usage()
        assert usage.read_bytes > 0
        assert all(peak > 50_000_000 for peak in usage.peak_memory_bytes.values())

    def test_a_workers_error_arrives_unchanged(self, started: Executor, job: Job, family: Family) -> None:
        path = family.models[1] / "model.safetensors"
        path.write_bytes(path.read_bytes())
        with pytest.raises(CheckpointError, match="changed since the merge was planned") as caught:
            list(started.map("measure", dict.fromkeys(range(len(job.plan.files)), ()), ignore_progress))
        assert str(family.models[1]) in caught.value.problems[0].where

    def test_a_failed_verb_leaves_an_executor_that_can_be_started_again(
        self, started: Executor, job: Job, family: Family
    ) -> None:
        files = dict.fromkeys(range(len(job.plan.files)), ())
        path = family.models[2] / "model.safetensors"
        data, stat = path.read_bytes(), path.stat()
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            list(started.map("measure", files, ignore_progress))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        started.start(job, assign(job.plan, WORKERS))
        assert sorted(dict(started.map("measure", files, ignore_progress))) == list(files)

    def test_close_may_be_called_twice_and_early(self, fresh: Executor, job: Job) -> None:
        fresh.close()
        fresh.start(job, assign(job.plan, 1))
        fresh.close()
        fresh.close()

    def points(self, family: Family) -> np.ndarray:
        names = list(family.base_values)
        return np.stack([flatten(values, names) for values in (family.base_values, *family.values)])

    def even(self, plan: Plan) -> object:
        method = registry()[plan.settings.method]
        median = method.solve(np.ones((4, 4)) - np.eye(4), plan.weights, tolerance=1e-10)  # type: ignore[attr-defined]
        return with_median(plan, 0, np.zeros((5, 5)), median)
