"""What a cluster may lose while it works: processes that die or hang, nodes that go, room that is gone."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine.executors import ray_nodes
from pipeline.engine.executors.local import LocalExecutor
from pipeline.engine.executors.ray import RayExecutor
from pipeline.engine.executors.ray_life import Patience
from pipeline.engine.executors.ray_nodes import Ask
from pipeline.engine.output import prepare
from pipeline.engine.worker import Job
from pipeline.errors import WorkerError
from pipeline.events import Event, Note
from pipeline.merging import Resources, load_recipe, plan_merge
from pipeline.planning.assignment import assign
from pipeline.storage import open_store
from tests.engine.executor_contract import ignore_progress
from tests.support.families import Family, make_family

WORKERS = 3
REQUESTS = {0: np.array([[0.25, 0.25, 0.25, 0.25], [0.0, 1.5, -0.5, 0.0]])}
# More than any machine has, and less than what Ray's own numbers hold: no room for whoever asks for it.
NO_ROOM = Ask(memory_bytes=1 << 45, gpus=0)


class Log:
    """The notes of an executor."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.texts.append(event.text)

    def about(self, words: str) -> list[str]:
        return [text for text in self.texts if words in text]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 4, dtype=torch.bfloat16, loud=2)


@pytest.fixture
def job(family: Family, tmp_path: Path) -> Job:
    recipe = load_recipe(str(family.recipe(pipeline={"file_size": "6KB"})))[0]
    output = open_store(str(tmp_path / "out"))
    planned = plan_merge(recipe, output, Resources(workers=WORKERS), probe=False)
    prepare(planned.plan, output, overwrite=False)
    return Job(plan=planned.plan, output_url=output.url, memory=planned.memory, device="cpu")


@pytest.fixture(scope="module")
def log() -> Log:
    return Log()


@pytest.fixture(scope="module")
def executor(ray_cluster: str, log: Log) -> Iterator[RayExecutor]:
    executor = RayExecutor(listener=log, patience=Patience(begin_s=300, silence_s=6, tell_s=1, look_s=0))
    yield executor
    executor.close()


@pytest.fixture
def started(executor: RayExecutor, job: Job, log: Log) -> RayExecutor:
    executor.start(job, assign(job.plan, WORKERS))
    log.texts.clear()
    return executor


def files(job: Job) -> dict[int, tuple[()]]:
    return dict.fromkeys(range(len(job.plan.files)), ())


def limbs_without_losses(job: Job) -> np.ndarray:
    alone = LocalExecutor()
    try:
        alone.start(job, assign(job.plan, 1))
        return alone.all_reduce(REQUESTS, ignore_progress)[0]
    finally:
        alone.close()


def sums_without_losses(job: Job) -> list[list[float]]:
    alone = LocalExecutor()
    try:
        alone.start(job, assign(job.plan, 1))
        return totals(dict(alone.map("measure", files(job), ignore_progress)))
    finally:
        alone.close()


def totals(results: dict[int, Any]) -> list[list[float]]:
    return [results[file][0].total().tolist() for file in sorted(results)]


STRIKE = """
import os
for mark in marks:
    try:
        os.mkdir(mark)
    except FileExistsError:
        continue
    os._exit(9)
"""


class Deadly:
    """Arguments that end the process they arrive in, the first so many times; then they are what they stand for."""

    def __init__(self, marks: Path, value: object, *, times: int) -> None:
        marks.mkdir()
        self._marks, self._value, self._times = marks, value, times

    def __reduce__(self) -> tuple[Any, ...]:
        # Builtins only: the actor's process need not know this module. Several may decode it at once: whoever can make
        # a mark ends.
        marks = [str(self._marks / str(number)) for number in range(self._times)]
        return eval, ("(exec(strike), value)[1]", {"strike": STRIKE, "marks": marks, "value": self._value})

    @property
    def struck(self) -> int:
        return len(list(self._marks.iterdir()))


def test_a_worker_that_dies_while_it_measures_is_replaced(started: RayExecutor, job: Job, log: Log) -> None:
    before = started.processes()
    for number in (0, 2):
        os.kill(before[number][1], signal.SIGKILL)
    results = dict(started.map("measure", files(job), ignore_progress))
    assert totals(results) == sums_without_losses(job)
    assert len(log.about("started again")) == 2
    assert started.processes().get(1) == before[1]
    assert metric("workers_lost_total", above=1) >= 2
    # Both are there for the next pass, wherever the files were run.
    assert started.all_reduce(REQUESTS, ignore_progress)[0].tolist() == limbs_without_losses(job).tolist()


def metric(name: str, *, above: float) -> float:
    """Return what the node's metrics endpoint shows, over all workers, once it is more than that."""
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    while True:
        with urllib.request.urlopen(url, timeout=30) as response:
            lines = response.read().decode().splitlines()
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"ray_geomerge_{name}{{")]
        if found and sum(found) > above:
            return sum(found)
        time.sleep(0.5)


def test_counters_are_at_the_nodes_metrics_endpoint(started: RayExecutor, job: Job) -> None:
    dict(started.map("measure", files(job), ignore_progress))
    used = started.usage()
    assert metric("read_bytes_total", above=used.read_bytes - 1) >= used.read_bytes
    assert metric("written_bytes_total", above=0) > 0
    assert metric("requests_total", above=0) >= len(job.plan.files)
    assert metric("passes_total", above=0) >= 1
    assert metric("stragglers", above=-1) == 0


def test_a_job_that_no_node_has_room_for_says_so(ray_cluster: str, job: Job) -> None:
    executor = RayExecutor(patience=Patience(start_s=1, tell_s=0.1))
    large = dataclasses.replace(job, memory=dataclasses.replace(job.memory, terms={"chunks": NO_ROOM.memory_bytes}))
    try:
        with pytest.raises(WorkerError) as caught:
            executor.start(large, assign(job.plan, 2))
    finally:
        executor.close()
    text = str(caught.value)
    assert re.search(r"no worker is left; each asks for 1 CPU, 35\.2 TB memory", text)
    assert re.search(r"Ray cluster of 1 node with 5 CPU, .* memory, 0 GPU; free: ", text)
    assert "add nodes" in text


def test_a_job_begins_with_the_workers_that_are_up(ray_cluster: str, job: Job) -> None:
    log = Log()
    executor = RayExecutor(listener=log, patience=Patience(begin_s=0, tell_s=0.1))
    try:
        # More than there are CPUs: without this the merge would wait for some to be free.
        executor.start(job, assign(job.plan, 7))
        up = len(executor.processes())
        assert 1 <= up < 7
        assert "begun without" in log.texts[-1]
        assert totals(dict(executor.map("measure", files(job), ignore_progress))) == sums_without_losses(job)
        assert np.array_equal(executor.all_reduce(REQUESTS, ignore_progress)[0], limbs_without_losses(job))
        assert "not up for" in executor.waiting()
    finally:
        executor.close()


def test_a_worker_that_dies_with_a_file_in_hand_loses_only_that(started: RayExecutor, job: Job, tmp_path: Path) -> None:
    deadly = Deadly(tmp_path / "marks", (), times=2)
    items = {**files(job), 1: deadly, 4: deadly}
    assert totals(dict(started.map("measure", items, ignore_progress))) == sums_without_losses(job)  # type: ignore[arg-type]
    assert deadly.struck == 2


def test_what_a_lost_worker_had_probed_is_probed_again(
    started: RayExecutor, job: Job, log: Log, tmp_path: Path
) -> None:
    wanted = limbs_without_losses(job)
    to_kill = [started.processes()[1][1]]

    def tick(done_bytes: int) -> None:
        # In the middle of the pass: what this one has probed is in its memory alone.
        if to_kill and started._schedule.left <= len(job.plan.files) // 2:
            os.kill(to_kill.pop(), signal.SIGKILL)

    assert np.array_equal(started.all_reduce(REQUESTS, tick)[0], wanted)
    assert np.array_equal(started.all_reduce(REQUESTS, ignore_progress)[0], wanted)
    assert log.about("worker 1 on")
    # And with a file in hand, whoever has it.
    deadly: Any = {0: Deadly(tmp_path / "marks", REQUESTS[0], times=1)}
    assert np.array_equal(started.all_reduce(deadly, ignore_progress)[0], wanted)
    assert deadly[0].struck == 1


def test_a_worker_that_dies_in_the_exchange_costs_its_own_files_only(
    started: RayExecutor, job: Job, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = limbs_without_losses(job)
    started.all_reduce(REQUESTS, ignore_progress)
    probed = []
    original = started._meeting.total

    def total(crew: Any, ranks: Any, held: Any, *arguments: Any) -> Any:
        probed.append({number: sorted(held[number]) for number in held})
        if len(probed) == 1:
            os.kill(started.processes()[ranks[-1].number][1], signal.SIGKILL)
        return original(crew, ranks, held, *arguments)

    monkeypatch.setattr(started._meeting, "total", total)
    assert np.array_equal(started.all_reduce(REQUESTS, ignore_progress)[0], wanted)
    first, second = probed[0], probed[-1]
    assert len(probed) >= 2
    lost = max(first)
    for number in first:
        if number != lost:
            assert set(first[number]) <= set(second[number])
    assert sorted(file for part in second.values() for file in part) == list(files(job))


def test_a_worker_that_hangs_is_named_and_replaced(started: RayExecutor, job: Job, log: Log) -> None:
    number = 1
    process = started.processes()[number][1]
    texts = []

    def tick(done_bytes: int) -> None:
        texts.append(started.waiting())

    os.kill(process, signal.SIGSTOP)
    try:
        results = dict(started.map("measure", files(job), tick))
    finally:
        with_continue(process)
    assert totals(results) == sums_without_losses(job)
    assert any("worker 1 on" in text and "no sign of life for" in text for text in texts)
    assert len(log.about("no sign of life for")) == 1
    assert started.processes().get(number, ("", 0))[1] != process


def with_continue(process: int) -> None:
    """Let a stopped process go on, if it was not killed."""
    try:
        os.kill(process, signal.SIGCONT)
    except ProcessLookupError:
        return


def test_a_rank_that_hangs_in_the_exchange_is_named_and_replaced(
    started: RayExecutor, job: Job, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = limbs_without_losses(job)
    started.all_reduce(REQUESTS, ignore_progress)
    before = started.processes()
    original = started._meeting.total

    def total(crew: Any, ranks: Any, *arguments: Any) -> Any:
        if not log.texts:
            os.kill(before[1][1], signal.SIGSTOP)
        return original(crew, ranks, *arguments)

    monkeypatch.setattr(started._meeting, "total", total)
    # Found by the exchange's own deadline, not by its silence.
    monkeypatch.setattr(started._meeting, "_patience", Patience(reduce_s=1, grace_s=3))
    monkeypatch.setattr(started._watch, "_patience", Patience())
    try:
        assert np.array_equal(started.all_reduce(REQUESTS, ignore_progress)[0], wanted)
    finally:
        with_continue(before[1][1])
    assert len(log.about("did not add up its sums with the others within")) == 1
    assert log.texts[0].startswith(f"worker 1 on {before[1][0]}: ")
    # The others only waited for it.
    after = started.processes()
    assert [after[number] for number in (0, 2)] == [before[number] for number in (0, 2)]


def test_without_room_the_merge_goes_on_with_fewer_down_to_one(ray_cluster: str, job: Job) -> None:
    log = Log()
    executor = RayExecutor(listener=log, patience=Patience(begin_s=300, replace_s=0.5, tell_s=1))
    wanted = limbs_without_losses(job)
    try:
        executor.start(job, assign(job.plan, 2))
        assert np.array_equal(executor.all_reduce(REQUESTS, ignore_progress)[0], wanted)
        ask, executor._crew.ask = executor._crew.ask, NO_ROOM
        os.kill(executor.processes()[0][1], signal.SIGKILL)
        assert np.array_equal(executor.all_reduce(REQUESTS, ignore_progress)[0], wanted)
        while "handed over its files" not in executor.waiting():  # a pass may end before the patience does
            assert np.array_equal(executor.all_reduce(REQUESTS, ignore_progress)[0], wanted)
        retired = log.about("its files go to the others")
        assert len(retired) == 1
        assert "worker 0" in retired[0]
        assert "asks for 1 CPU" in retired[0]
        # One is left, and owns everything: no group is needed for its sums.
        assert np.array_equal(executor.all_reduce(REQUESTS, ignore_progress)[0], wanted)
        assert totals(dict(executor.map("measure", files(job), ignore_progress))) == sums_without_losses(job)
        os.kill(executor.processes()[1][1], signal.SIGKILL)
        with pytest.raises(WorkerError, match="no worker is left") as caught:
            list(executor.map("measure", files(job), ignore_progress))
        assert "the same command resumes" in caught.value.problems[0].remedy
        assert "worker 0" in str(caught.value)
        assert "worker 1" in str(caught.value)
        # Another merge of a batch finds room again.
        executor._crew.ask = ask
        executor.start(job, assign(job.plan, 1))
        assert np.array_equal(executor.all_reduce(REQUESTS, ignore_progress)[0], wanted)
    finally:
        executor.close()


def test_a_retired_worker_that_finds_room_after_all_is_welcome(
    started: RayExecutor, job: Job, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(started._crew, "_patience", Patience(replace_s=0))
    os.kill(started.processes()[2][1], signal.SIGKILL)
    wanted = sums_without_losses(job)
    while not log.about("runs again"):
        assert totals(dict(started.map("measure", files(job), ignore_progress))) == wanted
    assert len(log.about("its files go to the others")) == 1
    assert len(log.about("runs again")) == 1
    assert sorted(started.processes()) == [0, 1, 2]


def test_a_drained_node_is_left_and_its_sums_are_not(
    started: RayExecutor, job: Job, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The one node there is drained and, by the other seam, has room elsewhere: workers move, within it.
    wanted = limbs_without_losses(job)
    before = started.processes()
    node = started._crew.members[0].life.facts
    assert node is not None
    monkeypatch.setattr(ray_nodes, "draining_nodes", lambda: frozenset({node.node}))
    monkeypatch.setattr(ray_nodes, "has_other_host", lambda ask, draining: True)
    seen: set[int] = set()
    while not seen:
        assert np.array_equal(started.all_reduce(REQUESTS, ignore_progress)[0], wanted)
        seen |= {number for number, place in started.processes().items() if place != before[number]}
    assert log.about("its node is being drained; it takes no new file and moves to another")
    assert log.about("moved to")
    assert not log.about("started again")


def test_if_all_nodes_are_drained_the_merge_goes_on_where_it_is(
    started: RayExecutor, job: Job, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = started.processes()
    nodes = frozenset(facts.node for member in started._crew.members if (facts := member.life.facts))
    monkeypatch.setattr(ray_nodes, "draining_nodes", lambda: nodes)
    assert totals(dict(started.map("measure", files(job), ignore_progress))) == sums_without_losses(job)
    assert started.processes() == before
    assert log.texts == []


def test_ray_tells_which_nodes_are_drained(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.state import state

    assert ray_nodes.draining_nodes() == frozenset()
    monkeypatch.setattr(state, "get_draining_nodes", lambda: {"b1": 0, "a2": 12}, raising=True)
    assert ray_nodes.draining_nodes() == {"a2", "b1"}
    monkeypatch.delattr(type(state), "get_draining_nodes")
    monkeypatch.delattr(state, "get_draining_nodes", raising=False)
    assert ray_nodes.draining_nodes() == frozenset()


def test_a_file_that_kills_whoever_runs_it_is_an_error(started: RayExecutor, job: Job, tmp_path: Path) -> None:
    deadly: Any = Deadly(tmp_path / "marks", (), times=5)
    with pytest.raises(WorkerError, match="lost its worker 3 times") as caught:
        list(started.map("measure", {**files(job), 1: deadly}, ignore_progress))
    assert deadly.struck == 3
    text = str(caught.value)
    assert job.plan.files[1].name in text
    assert text.count("worker ") >= 3
