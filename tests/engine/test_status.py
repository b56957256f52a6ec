"""What an output folder says of its merge: before, during, after, and from far away."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine import runs
from pipeline.engine.process_identity import host_name, machine_name
from pipeline.engine.run_folder import PLAN, SUMMARY, WRITTEN
from pipeline.engine.runs import newest_run, run_path
from pipeline.engine.status import status
from pipeline.errors import CheckpointError, OutputError
from pipeline.events import Event
from pipeline.merging import Resources, merge
from pipeline.reporting.text_view import status_view
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from tests.support.cases import edit, tiny_family
from tests.support.families import Family
from tests.support.reference import digests

# What was there before runs left files.
LASTING = {
    "output", "state", "method", "fingerprint", "files", "files_measured", "files_written", "bytes", "bytes_written",
}  # fmt: skip
RUNNING = {
    "error", "run", "last_sign_of_life", "phase", "iteration", "done_bytes", "total_bytes", "files_done",
    "files_total", "rate", "seconds_left", "waiting_for",
}  # fmt: skip


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return tiny_family(tmp_path)


def at(kind: str, number: int, action: Callable[[], object]) -> Callable[[Event], None]:
    """Return a listener that acts at the counted event of a class."""
    seen = Counter[str]()

    def listen(event: Event) -> None:
        seen[type(event).__name__] += 1
        if type(event).__name__ == kind and seen[kind] == number:
            action()

    return listen


def test_no_merge(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no merge"):
        status(open_store(str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("kind", "number", "state", "phase", "files"),
    [
        ("PassStarted", 1, "planned", "measure", (0, 0)),
        ("FileMeasured", 2, "measuring", "measure", (2, 0)),
        ("PassStarted", 2, "solved", "write", (3, 0)),
        ("FileWritten", 2, "writing", "write", (3, 2)),
    ],
)
def test_while_it_runs(
    family: Family, tmp_path: Path, kind: str, number: int, state: str, phase: str, files: tuple[int, int]
) -> None:
    recipe, out = family.recipe(pipeline={"file_size": "200"}), tmp_path / "out"
    found: list[dict[str, Any]] = []

    def look() -> None:
        found.append(status(open_store(str(out))))

    merge(str(recipe), str(out), listener=at(kind, number, look))
    (seen,) = found
    assert seen.keys() == LASTING | RUNNING
    assert seen["state"] == state
    assert seen["phase"] in (phase, "start"), "as the last sign of life said"
    # Files are handed over one at a time, so one more may be done already.
    assert seen["files"] == 3
    assert files[0] <= seen["files_measured"] <= 3
    assert files[1] <= seen["files_written"] <= 3
    assert seen["run"]["alive"] is True
    assert seen["run"]["host"] == host_name()
    assert seen["last_sign_of_life"] >= seen["run"]["started"]
    after = status(open_store(str(out)))
    assert after["state"] == "committed"
    assert after["bytes_written"] == after["bytes"] > 0
    assert {after[key] for key in RUNNING} == {None}


def test_streaming_tells_the_iteration(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = family.recipe(pipeline={"file_size": "200", "distances": "stream"}), tmp_path / "out"
    monkeypatch.setattr("pipeline.engine.claim.INTERVAL_S", 0.01)
    found: list[dict[str, Any]] = []

    def look() -> None:
        # The next sign of life may have been made up before the iteration began.
        for _ in range(2):
            before = newest_run(open_store(str(out)))
            assert before is not None
            assert runs.moves(open_store(str(out)), before, seconds=30)
        found.append(status(open_store(str(out))))

    merge(str(recipe), str(out), listener=at("PassStarted", 4, look))
    assert (found[0]["phase"], found[0]["iteration"]) == ("solve", 3)
    assert found[0]["total_bytes"] > 0


def test_a_killed_run_is_interrupted(family: Family, tmp_path: Path) -> None:
    recipe, out = family.recipe(pipeline={"file_size": "200"}), tmp_path / "out"
    script = """
import os, signal, sys
from pipeline.events import FileWritten
from pipeline.merging import merge
merge(sys.argv[1], sys.argv[2], listener=lambda e: isinstance(e, FileWritten) and os.kill(os.getpid(), signal.SIGKILL))
"""
    done = subprocess.run([sys.executable, "-c", script, str(recipe), str(out)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    seen = status(open_store(str(out)))
    assert seen["state"] == "interrupted"
    assert seen["run"]["alive"] is False
    assert seen["files_written"] >= 1
    assert (seen["rate"], seen["seconds_left"], seen["waiting_for"]) == (None, None, None)
    merge(str(recipe), str(out))
    assert status(open_store(str(out)))["state"] == "committed"


def test_a_refused_run_says_why(family: Family, tmp_path: Path) -> None:
    edit(family.models[1], lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError):
        merge(str(family.recipe()), str(tmp_path / "out"))
    seen = status(open_store(str(tmp_path / "out")))
    assert seen["state"] == "failed"
    assert "lm_head.weight" in seen["error"]


def test_from_another_machine_signs_of_life_tell(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = family.recipe(pipeline={"file_size": "200"}), tmp_path / "out"
    monkeypatch.setattr("pipeline.engine.claim.INTERVAL_S", 0.2)
    found: list[dict[str, Any]] = []

    def look() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "machine_name", lambda: "another")
            found.append(status(open_store(str(out))))
            found.append(status(open_store(str(out)), watch=False))

    merge(str(recipe), str(out), listener=at("FileWritten", 1, look))
    assert [seen["run"]["alive"] for seen in found] == [True, None]
    assert [seen["state"] for seen in found] == ["writing", "writing"]
    (out / "model.safetensors.index.json").unlink()
    place = open_store(str(out))
    place.write(run_path(5), json.dumps({"state": "running", "host": "x", "interval_s": 0.01}).encode())
    dead = status(place)
    assert (dead["state"], dead["run"]["alive"], dead["phase"]) == ("interrupted", False, None)


def test_it_reads_little_however_large_the_plan_and_asks_little(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = family.recipe(pipeline={"file_size": "200"}), tmp_path / "out"
    merge(str(recipe), str(out))
    asked = Counter[str]()
    read: list[str] = []
    for verb in ("read", "stat", "list", "exists", "write", "delete"):
        original = getattr(LocalStore, verb)

        def counted(self: LocalStore, *given: Any, _verb: str = verb, _original: Any = original, **named: Any) -> Any:
            asked[_verb] += 1
            if _verb == "read":
                read.append(given[0])
            return _original(self, *given, **named)

        monkeypatch.setattr(LocalStore, verb, counted)
    files = status(open_store(str(out)))["files"]
    assert sorted(read) == [PLAN, SUMMARY, *(path for path in sorted(read) if path.startswith(f"{WRITTEN}/"))]
    assert asked == {"list": 1, "read": files + 2, "stat": files + 1}


def test_a_folder_of_an_earlier_version_has_no_summary(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(str(family.recipe()), str(out), resources=Resources(workers=2))
    before = status(open_store(str(out)))
    (out / SUMMARY).unlink()
    assert status(open_store(str(out))) == before
    assert (out / PLAN).exists()


def test_thirty_files_of_a_far_store_are_asked_for_together(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that take long are under way at the same time."""
    out = tmp_path / "out"
    merge(str(family.recipe(pipeline={"file_size": "200"})), str(out))
    monkeypatch.setattr(LocalStore, "is_local", False)
    original, together = LocalStore.stat, threading.Barrier(3)

    def stat(self: LocalStore, path: str) -> Any:
        if path != PLAN:
            together.wait(timeout=30)
        return original(self, path)

    monkeypatch.setattr(LocalStore, "stat", stat)
    assert status(open_store(str(out)))["state"] == "committed"


def test_every_key_is_documented(family: Family, tmp_path: Path) -> None:
    merge(str(family.recipe()), str(tmp_path / "out"))
    text = (Path(__file__).parents[2] / "docs" / "output.md").read_text()
    assert [
        key for key in status(open_store(str(tmp_path / "out"))) if f"`{key}`" not in text and key != "output"
    ] == []


SHAPES: tuple[object, ...] = (
    {}, [], 5, {"settings": [], "files": 3}, {"settings": {"method": 1}, "fingerprint": "f", "files": []},
    {"settings": {"method": "linear", "output": "else"}, "fingerprint": "f", "files": []},
    {"settings": {"method": "linear"}, "fingerprint": "f", "files": [{"name": "a", "size_bytes": "b"}]},
)  # fmt: skip


@pytest.mark.parametrize("wrong", SHAPES)
def test_a_summary_of_the_wrong_shape_is_made_up_for_by_the_plan(family: Family, tmp_path: Path, wrong: object) -> None:
    out = tmp_path / "out"
    merge(str(family.recipe()), str(out))
    wanted = status(open_store(str(out)))
    (out / SUMMARY).write_text(json.dumps(wrong))
    assert status(open_store(str(out))) == wanted
    (out / PLAN).write_text(json.dumps(wrong))
    found = status(open_store(str(out)))
    assert (found["state"], found["files"], found["method"]) == ("damaged", 0, None)
    assert list(status_view(found))


@pytest.mark.parametrize("data", [b"{", b"", b"[]", b"\xff", b"[" * 100_000, b"{" * 2_000_000])
def test_a_plan_that_was_cut_is_damaged_whatever_its_summary_says(family: Family, tmp_path: Path, data: bytes) -> None:
    out = tmp_path / "out"
    merge(str(family.recipe()), str(out))
    assert status(open_store(str(out)))["state"] == "committed"
    (out / PLAN).write_bytes(data)
    assert status(open_store(str(out)))["state"] == "damaged"


def test_of_a_large_plan_only_the_ends_are_read(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    merge(str(family.recipe()), str(out))
    (out / PLAN).write_bytes(b"{\n" + b" " * 2_000_000 + b"}\n")
    read_bytes, original = [], LocalStore.read

    def read(self: LocalStore, path: str, start: int = 0, stop: int | None = None) -> bytes:
        data = original(self, path, start, stop)
        read_bytes.append(len(data))
        return data

    monkeypatch.setattr(LocalStore, "read", read)
    assert status(open_store(str(out)))["state"] == "committed"
    assert sum(read_bytes) < 10_000


def test_a_damaged_marker_is_that_of_a_file_to_be_written(family: Family, tmp_path: Path) -> None:
    recipe, out = family.recipe(pipeline={"file_size": "200"}), tmp_path / "out"
    merge(str(recipe), str(out))
    whole = digests(out)
    first, second, _ = sorted((out / WRITTEN).iterdir())
    first.write_text("{")
    second.write_text("[]")
    found = status(open_store(str(out)))
    assert (found["state"], found["files_written"]) == ("damaged", 1)
    assert merge(str(recipe), str(out))["resumed_files"] > 0
    assert digests(out) == whole


@pytest.mark.parametrize(
    "facts",
    [
        {"interval_s": math.nan, "pid": "5", "host": 3, "time": [], "state": [], "error": {}},
        {"interval_s": -1, "machine": machine_name(), "pid": os.getpid(), "token": [], "state": "running"},
        {"progress": {"rate": "fast", "seconds_left": math.nan, "waiting_for": 5, "phase": 7}},
        {"progress": {"rate": math.inf, "total_bytes": 10, "done_bytes": None, "files_total": 10**30}},
        {"progress": [1], "interval_s": 10**400, "pid": 10**30, "state": "running", "machine": machine_name()},
    ],
)
def test_a_run_file_of_the_wrong_shape_is_no_traceback(
    family: Family, tmp_path: Path, facts: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "INTERVAL_S", 0.01)
    monkeypatch.setattr(runs, "_LONGEST_INTERVAL_S", 0.01)
    out = tmp_path / "out"
    merge(str(family.recipe()), str(out))
    place = open_store(str(out))
    place.write(run_path(1), json.dumps(facts).encode())
    for watch in (True, False):
        found = status(place, watch=watch)
        assert found["state"] == "committed"
        assert found["rate"] is None
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert list(status_view({**found, "run": {**found["run"], "alive": True}}))
    if not found["run"]["alive"]:
        merge(str(family.recipe("linear", name="linear.yaml")), str(out), overwrite=True)
