"""Killed at any point and started again: the same bits, and nothing done twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.engine.run_folder import INDEX, MEASURED, WRITTEN, finished
from pipeline.merging import Resources, merge
from pipeline.storage import open_store
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
