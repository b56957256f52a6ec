"""Killed at any point and started again: the same bits, and nothing done twice."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.engine.output import commit
from pipeline.engine.reductions import Reductions, forget_reductions
from pipeline.engine.run_folder import INDEX, MEASURED, REDUCTIONS, WRITTEN, finished
from pipeline.engine.runs import RUNS
from pipeline.engine.verify import verify
from pipeline.events import Event, FileWritten, Listener, Note, PassEnded, PassStarted
from pipeline.merging import Resources, merge
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from tests.support.families import Family, make_family
from tests.support.reference import digests

# Kills its own process, as `kill -9` would, when the counted event of a class happens.
SCRIPT = """
import os, signal, sys
from pipeline import events
from pipeline.merging import Resources, merge

kind, number = getattr(events, sys.argv[3]), int(sys.argv[4])
seen = 0

def listener(event):
    global seen
    if isinstance(event, kind):
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

merge(sys.argv[1], sys.argv[2], resources=Resources(workers=2), listener=listener)
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 5, dtype=torch.bfloat16, loud=1)


@pytest.fixture(scope="module")
def recipe(family: Family) -> Path:
    return family.recipe(pipeline={"file_size": "12KB"})


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed")
    merge(str(recipe), str(out / "out"))
    return digests(out / "out")


def kill_at(recipe: Path, out: Path, event: str, number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(recipe), str(out), event, str(number)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / INDEX).exists()
    assert not (out / "geomerge_report.json").exists()


@pytest.mark.parametrize(
    ("event", "number"),
    [
        ("PassStarted", 1),
        ("FileMeasured", 1),
        ("FileMeasured", 3),
        ("GroupSolved", 1),
        ("PassStarted", 2),
        ("FileWritten", 1),
        ("FileWritten", 4),
        ("FileWritten", 5),
    ],
)
def test_killed_and_resumed(recipe: Path, undisturbed: dict[str, str], tmp_path: Path, event: str, number: int) -> None:
    out = tmp_path / "out"
    kill_at(recipe, out, event, number)
    store = open_store(str(out))
    measured = finished(store, MEASURED, ".parquet")
    written = finished(store, WRITTEN, ".json")
    stamps = {name: (out / name).stat().st_mtime_ns for name in written}
    report = merge(str(recipe), str(out), resources=Resources(workers=3))
    assert digests(out) == undisturbed
    assert {name: (out / name).stat().st_mtime_ns for name in written} == stamps
    if event == "FileMeasured":
        assert len(measured) >= number
        assert report["resumed_files"] >= len(measured)
    if event == "FileWritten":
        assert len(written) >= number
        assert report["resumed_files"] >= len(written)
        # What is measured and written already is not read again.
        plan = json.loads((out / "_geomerge/plan.json").read_text())
        left = [file for file in plan["files"] if file["name"] not in written]
        models = sum(plan["tensors"][t]["elements"] * 2 * 5 for file in left for t in file["tensors"])
        assert report["bytes_read"] == models


def test_a_finished_merge_is_not_done_again(recipe: Path, tmp_path: Path) -> None:
    first = merge(str(recipe), str(tmp_path / "out"))
    stamp = (tmp_path / "out" / INDEX).stat().st_mtime_ns
    assert merge(str(recipe), str(tmp_path / "out")) == first
    assert (tmp_path / "out" / INDEX).stat().st_mtime_ns == stamp


def test_a_marked_file_that_was_damaged_is_not_taken_for_finished(
    recipe: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kill_at(recipe, out, "FileWritten", 3)
    name = sorted(finished(open_store(str(out)), WRITTEN, ".json"))[0]
    (out / name).write_bytes((out / name).read_bytes()[:-7])
    merge(str(recipe), str(out))
    assert digests(out) == undisturbed


def test_stream_resumes_from_its_solution(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe(pipeline={"file_size": "12KB", "distances": "stream"}, name="stream.yaml")
    merge(str(recipe), str(tmp_path / "undisturbed"))
    kill_at(recipe, tmp_path / "out", "FileWritten", 1)
    report = merge(str(recipe), str(tmp_path / "out"))
    assert report["iterations_over_parameters"] == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


class Interruption(KeyboardInterrupt):
    """Ends a merge from inside a listener."""


def at(kind: type[Event], name: str, action: Callable[[], object]) -> Listener:
    """Return a listener that acts at the events of a class and name."""

    def listen(event: Event) -> None:
        if isinstance(event, kind) and getattr(event, "name", None) == name:
            action()

    return listen


def interrupt() -> None:
    raise Interruption


def streamed(family: Family, **settings: object) -> Path:
    """A recipe whose groups take different numbers of iterations over the parameters."""
    return family.recipe(
        pipeline={"file_size": "12KB", "distances": "stream", **settings}, name=f"stream-{len(settings)}.yaml"
    )


@pytest.mark.parametrize("settings", [{}, {"scope": "block"}])
def test_iterations_are_not_done_again(family: Family, tmp_path: Path, settings: dict[str, object]) -> None:
    """Interrupted in every iteration, before it begins and when its sums are there but not saved."""
    recipe = streamed(family, **settings)
    wanted = merge(str(recipe), str(tmp_path / "undisturbed"))
    count = wanted["iterations_over_parameters"]
    assert count > 3
    for done in (1, 2, count // 2, count - 1):
        for kind in (PassStarted, PassEnded):
            out = tmp_path / f"{kind.__name__}-{done}"
            with pytest.raises(Interruption):
                merge(str(recipe), str(out), listener=at(kind, f"iteration {done + 1}", interrupt))
            assert len(open_store(str(out)).list(REDUCTIONS)) == done
            passes: list[str] = []
            notes: list[str] = []

            def listen(event: Event, passes: list[str] = passes, notes: list[str] = notes) -> None:
                passes += [event.name] if isinstance(event, PassStarted) else []
                notes += [event.text] if isinstance(event, Note) else []

            report = merge(str(recipe), str(out), resources=Resources(workers=2), listener=listen)
            assert [name for name in passes if name.startswith("iteration")] == [
                f"iteration {number}" for number in range(done + 1, count + 1)
            ]
            assert report["iterations_over_parameters"] == count - done
            assert f"resumed: {done} iterations over the parameters were done before" in notes
            assert digests(out) == digests(tmp_path / "undisturbed")
            assert report["groups"] == wanted["groups"]
            assert open_store(str(out)).list(REDUCTIONS) == ()


@pytest.mark.parametrize("damage", ["cut", "bit", "question", "plan", "gone", "list"])
def test_iterations_that_are_damaged_or_of_another_kind_are_done_again(
    family: Family, tmp_path: Path, damage: str
) -> None:
    recipe, out = streamed(family), tmp_path / "out"
    merge(str(recipe), str(tmp_path / "undisturbed"))
    with pytest.raises(Interruption):
        merge(str(recipe), str(out), listener=at(PassStarted, "iteration 5", interrupt))
    path = sorted((out / REDUCTIONS).iterdir())[2]
    text = path.read_text()
    document = json.loads(text)
    if damage == "cut":
        path.write_text(text[:-40])
    elif damage == "bit":
        answer = document["answers"]["0"]
        answer["float64_little_endian_base64"] = "A" + answer["float64_little_endian_base64"][1:]
        path.write_text(json.dumps(document))
    elif damage == "gone":
        path.unlink()
    elif damage == "list":
        path.write_text("[]")
    else:
        body = {key: value for key, value in document.items() if key != "sha256"}
        if damage == "plan":
            body["fingerprint"] = "0" * 64
        else:
            body["questions"]["0"]["shape"].reverse()
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**body, "sha256": digest}))
    passes: list[str] = []
    merge(str(recipe), str(out), listener=lambda e: passes.append(e.name) if isinstance(e, PassStarted) else None)
    assert passes[0] == "iteration 3"
    assert digests(out) == digests(tmp_path / "undisturbed")


@given(
    st.dictionaries(st.integers(0, 5), st.lists(st.floats(width=64), min_size=1, max_size=6), min_size=1, max_size=3)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_answers_come_back_bit_for_bit(tmp_path: Path, answers: dict[int, list[float]]) -> None:
    """NaN, infinities and zeros of either sign included."""
    output = open_store(str(tmp_path))
    requests = {group: np.array([values]) for group, values in answers.items()}
    totals = {group: np.array(values) for group, values in answers.items()}
    forget_reductions(output)
    assert Reductions(output, "f", lambda number, asked: totals)(requests) is totals
    again = Reductions(output, "f", lambda number, asked: pytest.fail("it was measured before"))
    found = again(requests)
    assert again.replayed == 1
    assert {group: values.tobytes() for group, values in found.items()} == {
        group: values.tobytes() for group, values in totals.items()
    }


def test_a_driver_that_dies_while_it_commits_resumes(
    recipe: Path, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every single write from the first side file to the commit, and before each."""
    original, in_commit, written = LocalStore.write, [False], [0]
    stop_at = [0]

    def write(self: LocalStore, path: str, data: bytes) -> None:
        if path.startswith(RUNS) or not in_commit[0]:
            original(self, path, data)
            return
        written[0] += 1
        if written[0] == stop_at[0]:
            raise Interruption
        original(self, path, data)
        if written[0] == -stop_at[0]:
            raise Interruption

    def committing(*given: Any, **named: Any) -> None:
        in_commit[0], written[0] = True, 0
        try:
            commit(*given, **named)
        finally:
            in_commit[0] = False

    monkeypatch.setattr(LocalStore, "write", write)
    monkeypatch.setattr("pipeline.merging.commit", committing)
    merge(str(recipe), str(tmp_path / "counted"))
    count = written[0]
    assert count > 5
    for place in range(1, count + 1):
        for sign in (1, -1):
            out = tmp_path / f"out{place * sign}"
            stop_at[0] = place * sign
            with pytest.raises(Interruption):
                merge(str(recipe), str(out))
            assert (out / INDEX).exists() == (place * sign == -count)
            stop_at[0] = 0
            merge(str(recipe), str(out))
            assert digests(out) == undisturbed
            assert verify(open_store(str(out)))["files"] > 1


def test_an_overwriting_merge_that_is_killed_is_gone_on_with(recipe: Path, tmp_path: Path) -> None:
    """As by a scheduler that starts the same command line again and again."""
    out = tmp_path / "out"

    def after(count: int, error: type[BaseException]) -> Listener:
        left = [count]

        def listen(event: Event) -> None:
            left[0] -= isinstance(event, FileWritten)
            if left[0] == 0:
                raise error

        return listen

    def resumed(**named: Any) -> int:
        return int(merge(str(recipe), str(out), overwrite=True, **named)["resumed_files"])

    with pytest.raises(Interruption):
        merge(str(recipe), str(out), listener=after(2, Interruption))
    assert resumed() == 0, "what was begun without --overwrite is made anew"
    assert resumed() == 0, "and so is what is committed"
    with pytest.raises(Interruption):
        resumed(listener=after(2, Interruption))
    # Another attempt that gets nowhere.
    with pytest.raises(Interruption):
        resumed(listener=at(PassStarted, "write", interrupt))
    report = merge(str(recipe), str(out), overwrite=True)
    assert report["resumed_files"] >= 2
    assert report["bytes_read"] > 0
    verify(open_store(str(out)))
    with pytest.raises(ZeroDivisionError):
        resumed(listener=after(2, ZeroDivisionError))
    assert resumed() == 0, "an error may lie in what was done"


def test_an_overwriting_merge_killed_before_it_has_cleared_takes_nothing_over(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interruption):
        merge(str(recipe), str(out), listener=at(PassStarted, "write", interrupt))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.engine.output._clear", lambda *_: interrupt())
        with pytest.raises(Interruption):
            merge(str(recipe), str(out), overwrite=True)
    assert merge(str(recipe), str(out), overwrite=True)["resumed_files"] == 0
