"""What killed runs leave is listed and removed; what lives or is young stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import s3fs
from click.testing import CliRunner, Result

from pipeline.cleaning import clean
from pipeline.cli import main
from pipeline.engine.claim import RUNS, Claim
from pipeline.engine.run_folder import FOLDER
from pipeline.errors import OutputError
from pipeline.storage import open_store
from pipeline.storage.base import is_swept
from tests.support.s3 import prefix


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def leave(folder: Path, name: str, *, age_s: float = 7200.0, size_bytes: int = 10) -> Path:
    """A temporary file as a killed process leaves it."""
    path = folder / f".{name}.999999-{os.urandom(8).hex()}.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size_bytes)
    moment = time.time() - age_s
    os.utime(path, (moment, moment))
    return path


def done(result: dict[str, Any]) -> dict[str, str]:
    """What became of every leftover, by the name of what it was to become."""
    return {Path(entry["path"]).name.split(".")[1]: entry["done"] for entry in result["found"]}


def test_old_ones_go_and_young_ones_stay(tmp_path: Path) -> None:
    old, young = leave(tmp_path / "a", "old"), leave(tmp_path, "young", age_s=60.0)
    (tmp_path / "a" / "model.safetensors").write_bytes(b"finished")
    result = clean(str(tmp_path), older_than_s=3600.0, dry_run=False)
    assert done(result) == {"old": "removed", "young": "kept: too young"}
    assert (result["removed"], result["bytes"]) == (1, 10)
    entry = next(entry for entry in result["found"] if entry["done"] == "removed")
    assert (entry["path"], entry["kind"], entry["bytes"]) == (f"a/{old.name}", "temporary", 10)
    assert 7200 <= entry["age_seconds"] < 7300
    assert not old.exists()
    assert young.exists()
    assert done(clean(str(tmp_path), older_than_s=0.0, dry_run=False)) == {"young": "removed"}
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["model.safetensors"]


def test_a_dry_run_only_looks(tmp_path: Path) -> None:
    path = leave(tmp_path, "old")
    result = clean(str(tmp_path), older_than_s=3600.0, dry_run=True)
    assert (done(result), result["removed"]) == ({"old": "would be removed"}, 1)
    assert path.exists()


def test_what_a_living_run_writes_stays_however_old(tmp_path: Path) -> None:
    deep = leave(tmp_path / "out" / "_geomerge" / "measured", "deep")
    flat, other = leave(tmp_path / "out", "flat"), leave(tmp_path / "other", "other")
    with Claim.take(open_store(str(tmp_path / "out"))):
        for url in (tmp_path, tmp_path / "out"):
            result = done(clean(str(url), older_than_s=0.0, dry_run=False))
            assert result.pop("deep") == result.pop("flat")
            assert result == ({"other": "removed"} if url == tmp_path else {})
        assert f"process {os.getpid()}" in clean(str(tmp_path), older_than_s=0.0, dry_run=True)["found"][0]["done"]
        with pytest.raises(OutputError, match="lies inside the run folder"):
            clean(str(tmp_path / "out" / "_geomerge" / "measured"), older_than_s=0.0, dry_run=False)
    assert deep.exists()
    assert flat.exists()
    assert not other.exists()
    clean(str(tmp_path), older_than_s=0.0, dry_run=False)
    assert not deep.exists()
    assert not flat.exists()


def test_what_a_dead_run_left_goes(tmp_path: Path) -> None:
    """Its run file is there, and its process is not."""
    code = (
        "import os, sys; from pipeline.engine.claim import Claim; from pipeline.storage import open_store;"
        " Claim.take(open_store(sys.argv[1])); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert list((tmp_path / "out" / RUNS).iterdir())
    path = leave(tmp_path / "out", "dead")
    assert done(clean(str(tmp_path), older_than_s=3600.0, dry_run=False)) == {"dead": "removed"}
    assert not path.exists()


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_of_another_machine_is_watched(tmp_path: Path, alive: bool) -> None:
    """It lives when its file changes while we look."""
    path = leave(tmp_path, "far")
    run_file = tmp_path / RUNS / "0001.json"
    run_file.parent.mkdir(parents=True)
    facts = {"state": "running", "host": "far", "pid": 1, "machine": "another", "interval_s": 0.2, "counter": 1}
    run_file.write_text(json.dumps(facts))
    beat = "import json, sys, time, pathlib\npath = pathlib.Path(sys.argv[1])\n"
    beat += "while True:\n    facts = json.loads(path.read_text()); facts['counter'] += 1\n"
    beat += "    other = path.with_suffix('.new'); other.write_text(json.dumps(facts)); other.replace(path)\n"
    beat += "    time.sleep(0.1)\n"
    process = subprocess.Popen([sys.executable, "-c", beat, str(run_file)]) if alive else None
    try:
        while alive and json.loads(run_file.read_text())["counter"] == 1:
            time.sleep(0.02)
        (entry,) = clean(str(tmp_path), older_than_s=0.0, dry_run=False)["found"]
    finally:
        if process is not None:
            process.kill()
            process.wait()
    assert path.exists() == alive
    assert entry["done"].startswith("kept: process 1 on far" if alive else "removed")


def test_the_command_lists_and_removes(tmp_path: Path) -> None:
    leave(tmp_path, "old", size_bytes=2_000_000)
    result = run("clean", tmp_path, "--dry-run")
    assert result.exit_code == 0
    for words in ("temporary", "2 MB", "2 h 00 min", f"{tmp_path}: 1 leftover, 1 would be removed"):
        assert words in result.stdout.replace("\n", " ") or words in result.stdout
    assert run("clean", tmp_path, "--older-than", "3h").stdout.endswith("1 leftover, 0 removed\n")
    found = json.loads(run("clean", tmp_path, "--older-than", "30min", "--json").stdout)
    assert (found["removed"], found["bytes"], found["older_than_seconds"]) == (1, 2_000_000, 1800)
    result = run("clean", tmp_path)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}: 0 leftovers, 0 removed\n")


def test_the_run_folder_is_what_sweeping_takes_it_for() -> None:
    assert is_swept(f"{FOLDER}/measured/a")
    assert not is_swept(f"{FOLDER}_batch/a")
    assert not is_swept(f"out/{FOLDER}/a")


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert run("clean", tmp_path).exit_code == 0


def test_an_unfinished_upload_in_the_bucket(s3_url: str) -> None:
    """Begun by a process that was killed in it."""
    place = prefix(s3_url)
    code = (
        "import os, sys; from pipeline.storage import open_store;"
        " writer = open_store(sys.argv[1]).open_writer('out/model.safetensors');"
        " writer.write(b'x' * (40 << 20)); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, place], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    store = open_store(place)
    store.write("out/finished.safetensors", b"finished")
    store.write("out/_geomerge/plan.json", b"{}")
    found = json.loads(run("clean", place, "--json").stdout)
    (entry,) = found["found"]
    assert (entry["path"], entry["kind"], entry["done"]) == ("out/model.safetensors", "upload", "kept: too young")
    assert json.loads(run("clean", f"{place}/out", "--json", "--older-than", "0").stdout)["removed"] == 1
    assert json.loads(run("clean", place, "--json").stdout)["found"] == []
    assert store.list() == ("out/_geomerge/plan.json", "out/finished.safetensors")


def test_uploads_of_other_programs_stay_and_odd_names_end_nothing(s3_url: str) -> None:
    place = prefix(s3_url)
    bucket, _, above = place.removeprefix("s3://").partition("/")
    fs = s3fs.S3FileSystem()
    store = open_store(place)
    store.write("out/_geomerge/plan.json", b"{}")
    theirs = ("backup/disk.img", "weird/a?b/c", "weird//c", "weird/b\\c")
    for path in (*theirs, "out/model.safetensors", "out/deep/er/side file?.json"):
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{above}/{path}")
    result = clean(place, older_than_s=0.0, dry_run=False)
    done = {entry["path"]: entry["done"] for entry in result["found"]}
    assert done.pop("out/model.safetensors") == done.pop("out/deep/er/side file?.json") == "removed"
    assert done["backup/disk.img"] == done["weird/a?b/c"] == "kept: no merge of ours here"
    assert all(words.startswith("kept: no merge of ours") for words in done.values())
    assert {item.path for item in store.leftovers()} == set(done)
