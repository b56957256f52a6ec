"""One run at a time writes into an output folder, whatever dies, hangs or starts at the same moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.engine import runs
from pipeline.engine.claim import Claim
from pipeline.engine.process_identity import host_name, machine_name, process_lives, process_start
from pipeline.engine.run_folder import PLAN
from pipeline.engine.runs import RUNS, newest_run, run_path
from pipeline.engine.status import status
from pipeline.errors import ClaimedError, OutputError, Problem, StorageError
from pipeline.events import Event, FileWritten, Note
from pipeline.merging import merge
from pipeline.storage import Store, open_store
from pipeline.storage.local import LocalStore
from tests.support.cases import tiny_family
from tests.support.families import make_family
from tests.support.reference import digests

# Seconds between signs of life in tests: four of them are soon over.
QUICK_S = 0.05

HOLDER = """
import sys, time
from pipeline.engine.claim import Claim
from pipeline.storage import open_store
with Claim.take(open_store(sys.argv[1]), interval_s=0.05):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the claim."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.send_signal(signal.SIGCONT)
        process.kill()


def elsewhere(store: Store, number: int = 1, **facts: object) -> None:
    """Leave the run file of another machine."""
    document = {
        "state": "running", "host": "far-away", "pid": 77, "machine": "far-away/boot/pid", "process_start": 1,
        "started": "2001-01-01T00:00:00Z", "time": "2001-01-01T00:00:00Z", "counter": 3, "interval_s": QUICK_S,
        "token": "0123",
    }  # fmt: skip
    store.write(run_path(number), json.dumps({**document, **facts}).encode())


def test_a_claim_says_who_holds_it_and_leaves_nothing(store: Store) -> None:
    with Claim.take(store, describe=lambda: {"phase": "measure"}):
        run = newest_run(store)
        assert run is not None
        assert run.number == 1
        assert run.lives_here()
        assert run.facts["host"] == host_name()
        assert run.facts["pid"] == os.getpid()
        assert run.facts["progress"] == {"phase": "measure"}
    assert newest_run(store) is None
    assert store.list() == ()


def test_signs_of_life_are_given_with_the_progress(store: Store) -> None:
    told = threading.Event()
    phases = iter("abc")

    def describe() -> dict[str, str]:
        phase = next(phases, "end")
        if phase == "end":
            told.set()
        return {"phase": phase}

    with Claim.take(store, interval_s=0.01, describe=describe) as claim:
        assert told.wait(30)
        claim.check()
        run = newest_run(store)
        assert run is not None
        assert run.facts["progress"] == {"phase": "end"}
        assert run.facts["counter"] >= 4


def test_a_live_run_is_not_disturbed_and_named(store: Store, holder: subprocess.Popen[str]) -> None:
    before = store.list()
    with pytest.raises(ClaimedError, match="is being written by another run") as caught:
        Claim.take(store)
    text = str(caught.value)
    assert f"process {holder.pid} on {host_name()}" in text
    assert "last sign of life" in text
    assert store.list() == before
    # One that is stopped is not dead: it may go on at any moment.
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(OutputError, match=str(holder.pid)):
        Claim.take(store)


def test_a_killed_run_of_this_machine_is_followed_at_once(
    store: Store, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.kill()
    # Dead before anybody has waited for it, as under a shell that is busy.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    monkeypatch.setattr(runs, "moves", lambda *_, **__: pytest.fail("nobody needs to watch it"))
    said: list[Event] = []
    with Claim.take(store, listener=said.append):
        run = newest_run(store)
        assert run is not None
        assert run.number == 2
        assert store.list(RUNS) == (run_path(2),)
    assert [event for event in said if isinstance(event, Note) and f"process {holder.pid}" in event.text]


@pytest.mark.parametrize("clock", ["1970-01-01T00:00:00Z", "2999-01-01T00:00:00Z", "?"])
def test_a_silent_run_of_another_machine_is_dead_whatever_its_clock_says(store: Store, clock: str) -> None:
    elsewhere(store, number=7, time=clock, started=clock)
    said: list[Event] = []
    with Claim.take(store, listener=said.append):
        assert store.list(RUNS) == (run_path(8),)
    texts = [event.text for event in said if isinstance(event, Note)]
    assert "waiting up to 0 s" in texts[0]
    assert "process 77 on far-away" in texts[1]


@pytest.mark.parametrize("clock", ["1970-01-01T00:00:00Z", "2999-01-01T00:00:00Z"])
def test_a_run_of_another_machine_that_gives_signs_of_life_is_alive(store: Store, clock: str) -> None:
    stop = threading.Event()

    def beat() -> None:
        counter = 0
        while not stop.wait(QUICK_S):
            counter += 1
            # Slow, but never silent for four intervals.
            elsewhere(store, counter=counter, time=clock, interval_s=5.0)

    elsewhere(store, time=clock, interval_s=5.0)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(OutputError, match="process 77 on far-away"):
            Claim.take(store)
    finally:
        stop.set()
        thread.join()


def test_a_run_of_another_machine_that_ends_while_it_is_watched_makes_room(store: Store) -> None:
    for end in (lambda: store.delete(run_path(1)), lambda: elsewhere(store, state="failed")):
        elsewhere(store, interval_s=5.0)
        timer = threading.Timer(0.2, end)
        timer.start()
        with Claim.take(store):
            timer.join()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"interval_s": "x"}'])
def test_a_damaged_run_file_is_watched_like_any_other(
    store: Store, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "INTERVAL_S", QUICK_S)
    store.write(run_path(3), data)
    store.write(f"{RUNS}/notes.txt", b"no run file")
    with Claim.take(store):
        assert store.list(RUNS) == (run_path(4), f"{RUNS}/notes.txt")


def test_a_number_that_another_process_got_is_no_sign_of_life(store: Store) -> None:
    here = {"machine": machine_name(), "host": host_name()}
    elsewhere(store, pid=os.getpid(), process_start=(process_start(os.getpid()) or 0) - 1, **here)
    with Claim.take(store):
        pass
    elsewhere(store, pid=os.getpid(), process_start=process_start(os.getpid()), **here)
    # This very process, but a claim that it no longer holds.
    with Claim.take(store):
        pass


def test_processes_are_told_apart_by_their_start() -> None:
    start = process_start(os.getpid())
    assert start is not None
    assert process_lives(os.getpid(), start)
    assert not process_lives(os.getpid(), start + 1)
    assert process_lives(os.getpid(), None)
    assert not process_lives(None, None)
    assert not process_lives(0, 5)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pid = process.pid
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert process_start(pid) is None
    assert not process_lives(pid, None)


def test_a_run_that_was_taken_for_dead_notices_and_stops(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Claim.take(store, interval_s=600)
    monkeypatch.setattr(runs, "machine_name", lambda: "another")
    monkeypatch.setattr(runs, "MISSED_INTERVALS", 4)
    monkeypatch.setattr(runs, "_LONGEST_INTERVAL_S", QUICK_S)
    second = Claim.take(store)
    with pytest.raises(ClaimedError, match="was taken over by another run"):
        first.check()
    with pytest.raises(OutputError, match=f"process {os.getpid()}"):
        first.guard()
    first.release()
    second.check()
    assert store.list(RUNS) == (run_path(2),)
    second.release()
    assert store.list() == ()


def test_a_run_whose_successor_is_over_already_notices(store: Store) -> None:
    store.write(PLAN, b"{}")
    with Claim.take(store, interval_s=600) as first:
        store.delete(run_path(1))
        with pytest.raises(ClaimedError, match="by another run, which is over already") as caught:
            first.check()
        assert "goes on" not in str(caught.value)
        assert store.list() == (PLAN,)
    with Claim.take(store, interval_s=600) as first:
        elsewhere(store)
        with pytest.raises(ClaimedError, match="taken over"):
            first.check()


def test_a_folder_that_was_removed_under_a_run_was_taken_over_by_nobody(store: Store) -> None:
    with Claim.take(store, interval_s=600) as first:
        store.write(PLAN, b"{}")
        for path in store.list():
            store.delete(path)
        with pytest.raises(OutputError, match="was removed during the merge") as caught:
            first.check()
        assert not isinstance(caught.value, ClaimedError)
        assert store.list() == ()


@pytest.mark.parametrize(("kind", "number"), [("FileMeasured", 1), ("PassStarted", 2), ("FileWritten", 1)])
def test_a_merge_whose_output_is_removed_says_so(tmp_path: Path, kind: str, number: int) -> None:
    """Whichever file is missed first: a worker's, the driver's, or one of the commit."""
    family, out = tiny_family(tmp_path), tmp_path / "out"
    heard: list[str] = []

    def listen(event: Event) -> None:
        heard.append(type(event).__name__)
        if type(event).__name__ == kind and heard.count(kind) == number:
            # At once, while workers write.
            out.rename(tmp_path / "gone")

    with pytest.raises(OutputError, match="was removed during the merge") as caught:
        merge(str(family.recipe(pipeline={"file_size": "200"})), str(out), listener=listen)
    assert caught.value.problems[0].where == f"output {out}"
    assert not (out / "model.safetensors.index.json").exists()


def test_a_failed_run_leaves_its_error_and_makes_room(store: Store) -> None:
    for error, state, text in (
        (OSError("disk on fire"), "failed", "OSError: disk on fire"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ):
        with pytest.raises(type(error)), Claim.take(store):
            raise error
        run = newest_run(store)
        assert run is not None
        assert (run.facts["state"], run.facts["error"]) == (state, text)
        assert run.lives_here() is False
    said: list[Event] = []
    with Claim.take(store, listener=said.append):
        assert said == []
    assert store.list() == ()


def test_a_disk_that_is_full_at_the_end_does_not_keep_the_claim(store: Store) -> None:
    def full(*_: object) -> None:
        raise StorageError(Problem(what="No space left on device"))

    claim = Claim.take(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store), "write", full)
        claim.release(ZeroDivisionError())
    assert store.list() == ()


def test_a_creation_whose_answer_was_lost_is_ours(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LocalStore.create

    def create(self: LocalStore, path: str, data: bytes) -> bool:
        assert original(self, path, data)
        return original(self, path, data)

    monkeypatch.setattr(LocalStore, "create", create)
    with Claim.take(store) as claim:
        claim.check()


def test_what_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"cannot be written.*choose a folder"):
        Claim.take(open_store(str(tmp_path / "file" / "out")))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    threads=st.integers(2, 8),
    left=st.lists(st.sampled_from(["ended", "dead", "damaged"]), max_size=3),
    folder=st.uuids(),
)
def test_of_many_at_once_one_gets_it(tmp_path: Path, threads: int, left: list[str], folder: object) -> None:
    url = str(tmp_path / str(folder))
    place = open_store(url)
    for number, kind in enumerate(left, start=3):
        gone = {"state": "failed"} if kind == "ended" else {"machine": machine_name(), "pid": 2**22 + 1}
        elsewhere(place, number, **gone)
        if kind == "damaged" and number < len(left) + 2:
            place.write(run_path(number), b"{")
    barrier, results = threading.Barrier(threads), queue.SimpleQueue[Any]()

    def body() -> None:
        barrier.wait()
        try:
            results.put(Claim.take(open_store(url)))
        except OutputError as error:
            results.put(error)

    workers = [threading.Thread(target=body) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = [results.get() for _ in workers]
    (winner,) = (result for result in found if isinstance(result, Claim))
    assert len(place.list(RUNS)) == 1
    winner.check()
    assert all("is being written by another run" in str(result) for result in found if result is not winner)
    winner.release()
    assert place.list() == ()


def _merge_at_once(recipe: str, out: str, barrier: Any, results: Any) -> None:
    notes: list[str] = []
    barrier.wait()
    try:
        merge(recipe, out, listener=lambda event: notes.append(getattr(event, "text", "")))
        done = any("already merged" in note for note in notes)
        results.put(("found" if done else "merged", os.getpid(), ""))
    except OutputError as error:
        results.put((error.exit_code, os.getpid(), str(error)))


def test_of_six_processes_that_start_the_same_merge_one_merges(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3)
    recipe, out = family.recipe(pipeline={"file_size": "4KB"}), tmp_path / "out"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.merging", "tests.engine.test_claim"])
    barrier, results = context.Barrier(6), context.Queue()
    processes = [
        context.Process(target=_merge_at_once, args=(str(recipe), str(out), barrier, results)) for _ in range(6)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    (merged,) = (pid for outcome, pid, _ in found if outcome == "merged")
    for outcome, _, text in found:
        if outcome not in ("merged", "found"):
            assert outcome == 9
            assert f"process {merged} on {host_name()}" in text
    merge(str(recipe), str(tmp_path / "alone"))
    assert digests(out) == digests(tmp_path / "alone")
    assert not list((out / RUNS).glob("*"))


def test_another_recipe_is_refused_while_a_claim_lives_also_with_overwrite(
    tmp_path: Path, store: Store, holder: subprocess.Popen[str]
) -> None:
    family = tiny_family(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=str(holder.pid)):
            merge(str(family.recipe("linear")), store.url, overwrite=overwrite)
    assert store.list() == (run_path(1),)


def test_a_finished_merge_needs_no_writable_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = tiny_family(tmp_path).recipe(), tmp_path / "out"
    first = merge(str(recipe), str(out))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("the folder is read-only")

    kind = type(open_store(str(out)))
    for verb in ("write", "create", "open_writer", "delete", "probe_writable", "sweep"):
        monkeypatch.setattr(kind, verb, refuse)
    assert merge(str(recipe), str(out)) == first


def test_a_merge_that_was_taken_over_commits_nothing(tmp_path: Path) -> None:
    recipe, out = tiny_family(tmp_path).recipe(), tmp_path / "out"
    place = open_store(str(out))

    def overtake(event: Event) -> None:
        if type(event).__name__ == "FileWritten":
            elsewhere(place, number=2)

    with pytest.raises(OutputError, match="process 77 on far-away"):
        merge(str(recipe), str(out), listener=overtake)
    assert not (out / "model.safetensors.index.json").exists()
    assert not (out / "config.json").exists()
    assert place.list(RUNS) == (run_path(2),)


def test_on_an_object_store(s3_url: str, tmp_path: Path) -> None:
    """Exclusive creation, taking over and the status from the URL alone, by a server's own rules."""
    url = f"{s3_url}/claims"
    place = open_store(url)
    with Claim.take(place) as claim:
        claim.check()
        with pytest.raises(OutputError, match=f"process {os.getpid()} on {host_name()}"):
            Claim.take(open_store(url))
        assert not place.create(run_path(1), b"mine")
    assert place.list() == ()
    elsewhere(place)
    recipe = tiny_family(tmp_path).recipe(pipeline={"file_size": "200"})
    found: list[dict[str, Any]] = []

    def look(event: Event) -> None:
        if isinstance(event, FileWritten):
            found.append(status(open_store(url)))

    merge(str(recipe), url, listener=look)
    assert found[0]["state"] == "writing"
    assert found[0]["run"]["alive"]
    assert status(place)["state"] == "committed"
    assert place.list(RUNS) == ()


@pytest.mark.parametrize("lasting", [False, True])
def test_an_own_file_that_is_read_in_part_is_no_successor(
    store: Store, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    original, torn = LocalStore.read, [0]

    def read(self: LocalStore, path: str, *given: int) -> bytes:
        data = original(self, path, *given)
        if torn[0] and path.startswith(RUNS):
            torn[0] -= 1
            return data[:40]
        return data

    with Claim.take(store, interval_s=600) as claim:
        monkeypatch.setattr(LocalStore, "read", read)
        torn[0] = 100 if lasting else 1
        claim.check()
        torn[0] = 1
        run = newest_run(store)
        assert run is not None
        assert run.facts["counter"] == 1, "whoever else looks asks again, too"


def test_the_own_file_is_not_looked_at_while_it_is_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read, busy, overlaps = LocalStore.write, LocalStore.read, threading.Event(), [0]

    def slow_write(self: LocalStore, path: str, data: bytes) -> None:
        busy.set()
        threading.Event().wait(0.01)
        write(self, path, data)
        busy.clear()

    def watched_read(self: LocalStore, path: str, *given: int) -> bytes:
        overlaps[0] += busy.is_set()
        return read(self, path, *given)

    monkeypatch.setattr(LocalStore, "write", slow_write)
    monkeypatch.setattr(LocalStore, "read", watched_read)
    with Claim.take(store, interval_s=0.005) as claim:
        for _ in range(20):
            claim.check()
    assert overlaps == [0]


def test_a_progress_that_cannot_be_told_ends_no_sign_of_life(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    told, calls = threading.Event(), [0]

    def describe() -> dict[str, object]:
        calls[0] += 1
        if calls[0] == 4:
            told.set()
        if calls[0] % 2:
            raise ZeroDivisionError
        return {"phase": object()}

    with Claim.take(store, interval_s=0.01, describe=describe) as claim:
        assert told.wait(30)
        claim.check()
        run = newest_run(store)
        assert run is not None
        assert run.facts["progress"] == {}
        assert run.facts["counter"] >= 3
    assert caplog.text.count("signs of life go without the progress") == 1


def test_a_run_whose_signs_of_life_have_ended_does_not_go_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Claim, "_beat_on", lambda self: None)
    with Claim.take(store) as claim:
        claim._thread.join()
        with pytest.raises(OutputError, match="no signs of life of this run"):
            claim.guard()


def test_a_failing_run_leaves_its_error_to_nobody_who_took_over(store: Store) -> None:
    claim = Claim.take(store, interval_s=600)
    elsewhere(store, number=2)
    claim.release(ZeroDivisionError())
    assert store.list(RUNS) == (run_path(2),)


def test_a_run_that_cannot_begin_leaves_no_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(store, state="failed")
    original = LocalStore.delete

    def delete(self: LocalStore, path: str) -> None:
        if path == run_path(1):
            raise StorageError(Problem(what="not today"))
        original(self, path)

    monkeypatch.setattr(LocalStore, "delete", delete)
    with pytest.raises(StorageError, match="not today"):
        Claim.take(store)
    assert store.list(RUNS) == (run_path(1),)


def test_a_sign_of_life_that_comes_too_late_is_taken_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process was stopped between looking and writing, and another run took over meanwhile."""
    original, late = LocalStore.write, [True]

    def write(self: LocalStore, path: str, data: bytes) -> None:
        if late[0]:
            late[0] = False
            self.delete(run_path(1))
            elsewhere(store, number=2)
        original(self, path, data)

    with Claim.take(store, interval_s=600) as claim:
        monkeypatch.setattr(LocalStore, "write", write)
        with pytest.raises(ClaimedError, match="process 77 on far-away"):
            claim.check()
        assert store.list(RUNS) == (run_path(2),)
