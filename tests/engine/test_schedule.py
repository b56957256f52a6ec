"""Files by worker: own first, then the longest queue; nothing is lost with a worker."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.engine.executors.schedule import ATTEMPTS, Schedule
from pipeline.errors import WorkerError


def drain(schedule: Schedule, worker: int) -> list[int]:
    taken = []
    while (file := schedule.take(worker)) is not None:
        taken.append(file)
        schedule.done(file)
    return taken


def test_a_worker_runs_its_own_files_first_and_in_order() -> None:
    schedule = Schedule([(0, 2, 4), (1, 3)])
    schedule.begin([4, 3, 2, 0])
    assert [schedule.take(0), schedule.take(0), schedule.take(1)] == [0, 2, 3]


def test_an_idle_worker_takes_the_last_file_of_the_longest_queue() -> None:
    schedule = Schedule([(0,), (1, 2), (3, 4, 5, 6)])
    schedule.begin(range(7))
    assert drain(schedule, 0) == [0, 6, 5, 2, 4, 1, 3]
    assert schedule.left == 0


def test_a_file_stays_with_the_worker_that_took_it() -> None:
    schedule = Schedule([(), (0, 1, 2)])
    schedule.begin(range(3))
    assert schedule.take(0) == 2
    assert [schedule.owned(0), schedule.owned(1)] == [(2,), (0, 1)]
    schedule.begin(range(3))
    assert schedule.take(0) == 2


def test_only_the_asked_files_are_run() -> None:
    schedule = Schedule([(0, 1), (2, 3)])
    schedule.begin([1, 2])
    assert sorted(drain(schedule, 1)) == [1, 2]


def test_a_retired_workers_files_go_to_the_shortest_queues() -> None:
    schedule = Schedule([(0, 1, 2, 3), (4,), (5, 6)])
    schedule.begin(range(7))
    schedule.retire(0)
    assert schedule.workers == (1, 2)
    assert [len(schedule.owned(worker)) for worker in (1, 2)] == [4, 3]
    assert sorted(drain(schedule, 1)) == list(range(7))


def test_a_later_pass_covers_files_whose_owner_is_gone() -> None:
    schedule = Schedule([(0, 1), (2,)])
    schedule.begin([])
    schedule.retire(0)
    schedule.begin(range(3))
    assert sorted(drain(schedule, 1)) == [0, 1, 2]


def test_files_wait_while_there_is_no_worker() -> None:
    schedule = Schedule([(0, 1)])
    schedule.begin([0, 1])
    schedule.retire(0)
    assert schedule.left == 2
    schedule.restore(0)
    assert drain(schedule, 0) == [0, 1]


def test_a_lost_file_is_run_next_and_fails_at_the_third_loss() -> None:
    schedule = Schedule([(0, 1, 2)])
    schedule.begin(range(3))
    for attempt in range(ATTEMPTS - 1):
        assert schedule.take(0) == 0
        schedule.lost(0, "model-1.safetensors", f"worker 0 on node {attempt}")
    assert schedule.take(0) == 0
    with pytest.raises(WorkerError, match=r"model-1\.safetensors: lost its worker 3 times: .*node 0, .*node 1, .*n 9"):
        schedule.lost(0, "model-1.safetensors", "worker 0 on n 9")


def test_losses_are_counted_by_pass() -> None:
    schedule = Schedule([(0,)])
    for _ in range(2 * ATTEMPTS):
        schedule.begin([0])
        assert schedule.take(0) == 0
        schedule.lost(0, "file", "place")


def test_files_done_in_vain_come_back() -> None:
    schedule = Schedule([(0, 1, 2), (3,)])
    schedule.begin(range(4))
    assert drain(schedule, 1)[0] == 3
    assert schedule.left == 0
    schedule.put_back([1, 2])
    assert schedule.left == 2
    assert drain(schedule, 1) == [1, 2]


class Cluster(RuleBasedStateMachine):
    """Workers come, go and lose files in any order; every file is in one place, and none is forgotten."""

    @initialize(workers=st.integers(1, 5), files=st.integers(0, 12), seed=st.randoms(use_true_random=False))
    def start(self, workers: int, files: int, seed: object) -> None:
        shards: list[list[int]] = [[] for _ in range(workers)]
        for file in range(files):
            shards[seed.randrange(workers)].append(file)  # type: ignore[attr-defined]
        self.schedule = Schedule(shards)
        self.workers = set(range(workers))
        self.living = set(self.workers)
        self.in_hand: dict[int, int] = {}
        self.done: dict[int, int] = {}
        self.files = files
        self.schedule.begin(range(files))

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        idle = sorted(self.living - set(self.in_hand))
        if idle:
            worker = data.draw(st.sampled_from(idle))
            own = [file for file in self.schedule.owned(worker) if file not in self.in_hand.values()]
            queued = [file for file in own if file not in self.done]
            file = self.schedule.take(worker)
            if file is None:
                assert len(self.done) + len(self.in_hand) == self.files
            else:
                assert file not in self.done
                assert file not in self.in_hand.values()
                assert not queued or file in queued
                self.in_hand[worker] = file

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.in_hand)))
        file = self.in_hand.pop(worker)
        self.schedule.done(file)
        self.done[file] = worker

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data(), gone=st.booleans(), in_vain=st.booleans())
    def lose(self, data: st.DataObject, gone: bool, in_vain: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.in_hand)))
        self.schedule.put_back([self.in_hand.pop(worker)])
        if in_vain:
            lost = [file for file, by in self.done.items() if by == worker]
            for file in lost:
                del self.done[file]
            self.schedule.put_back(lost)
        if gone:
            self.living.discard(worker)
            self.schedule.retire(worker)

    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        gone = sorted(self.workers - self.living)
        if gone:
            worker = data.draw(st.sampled_from(gone))
            self.living.add(worker)
            self.schedule.restore(worker)

    @invariant()
    def nothing_is_forgotten(self) -> None:
        if hasattr(self, "schedule"):
            assert self.schedule.left == self.files - len(self.done)
            assert set(self.schedule.workers) == self.living

    def teardown(self) -> None:
        if not hasattr(self, "schedule"):
            return
        for worker in sorted(self.in_hand):
            self.schedule.done(self.in_hand[worker])
            self.done[self.in_hand[worker]] = worker
        if not self.living:
            self.schedule.restore(0)
            self.living.add(0)
        rest = drain(self.schedule, min(self.living))
        assert len(rest) == len(set(rest))
        assert sorted([*rest, *self.done]) == list(range(self.files))


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
