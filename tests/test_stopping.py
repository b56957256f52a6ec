"""SIGTERM, which schedulers send: a merge unwinds, leaves nothing half done, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs
import yaml

from pipeline.batch import FOLDER, SUMMARY
from pipeline.engine.claim import RUNS
from pipeline.storage import open_store
from tests.support.fault_proxy import Fault, FaultProxy, Rule, fault_proxy
from tests.support.s3 import prefix
from tests.support.sparse import save_sparse

# Holes: large enough for some parts of an upload, and for a write to take a while, at no bytes on disk.
SHAPES = {f"model.layers.{layer}.mlp.weight": (4096, 4096) for layer in range(3)}
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models = [{"model": str(save_sparse(root / name, SHAPES))} for name in ("a", "b", "c")]
    (root / "recipes").mkdir()
    path = root / "recipes" / "large.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    (root / "recipes" / "next.yaml").write_text(path.read_text())
    return path


@pytest.fixture
def proxy(s3_url: str) -> Iterator[FaultProxy]:
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        yield running


def start(*arguments: object, endpoint: str | None = None) -> subprocess.Popen[str]:
    where = () if "--address" in arguments else ("--executor", "local")
    command = [sys.executable, "-m", "pipeline", *map(str, arguments), *where]
    environment = {**os.environ, **({"AWS_ENDPOINT_URL": endpoint} if endpoint else {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def end(process: subprocess.Popen[str], ready: Callable[[], bool], number: signal.Signals = signal.SIGTERM) -> str:
    """Wait until a process is in the middle of it, send the signal, and return what it wrote to standard error."""
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        output, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert output == ""
    assert "Traceback" not in errors
    return errors


def growing(output: Path) -> bool:
    """Whether an output file is being written under its temporary name."""
    return any(".safetensors." in path.name for path in output.glob(".*.part"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_merge_into_a_folder(recipe: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    output = tmp_path / "out"
    process = start("merge", recipe, output)
    errors = end(process, lambda: growing(output), number)
    assert process.returncode == code
    assert errors.splitlines()[-1] == "stopped; the same command resumes"
    assert open_store(str(output)).leftovers() == ()
    assert json.loads(next((output / RUNS).glob("*.json")).read_text())["state"] == "interrupted"
    assert not (output / "model.safetensors.index.json").exists()
    again = start("merge", recipe, output, "--json")
    report, errors = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, errors
    assert len(json.loads(report)["files"]) == 1


def test_a_merge_into_the_bucket(recipe: Path, s3_url: str, proxy: FaultProxy) -> None:
    """No part of an upload stays behind."""
    place = prefix(s3_url)
    store = open_store(place)
    # Every part takes long enough to be met in the middle.
    proxy.start(Rule(fault=Fault.STALL, method="PUT", part="partNumber", times=None))
    process = start("merge", recipe, place, "--progress", "json", endpoint=proxy.url)
    errors = end(process, lambda: any(item.kind == "upload" for item in store.leftovers()))
    assert process.returncode == 143
    last = json.loads(errors.splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("Error", 143)
    assert last["problems"][0]["what"] == "stopped; the same command resumes"
    assert all("event" in json.loads(line) for line in errors.splitlines())
    assert store.leftovers() == ()
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    assert [item for item in fs.list_multipart_uploads(place.split("/")[2]) if item["Key"] in place] == []
    assert not [path for path in store.list() if path.endswith(".safetensors")]
    proxy.stop()
    again = start("merge", recipe, place)
    assert again.wait(timeout=PATIENCE_S) == 0
    again.communicate()


def test_a_batch(recipe: Path, tmp_path: Path) -> None:
    """It says how far it came, and no other one is kept out."""
    process = start("batch", recipe.parent, tmp_path)
    errors = end(process, lambda: growing(tmp_path / "large"))
    assert process.returncode == 143
    assert errors.splitlines()[-1] == "stopped; the same command resumes"
    summary = json.loads((tmp_path / FOLDER / SUMMARY).read_text())
    assert (summary["state"], summary["exit_code"]) == ("stopped", 143)
    assert [(merge["state"], merge["exit_code"]) for merge in summary["merges"]] == [
        ("stopped", 143), ("not started", 143)
    ]  # fmt: skip
    assert open_store(str(tmp_path)).leftovers() == ()
    again = start("batch", recipe.parent, tmp_path, "--json")
    output, errors = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, errors
    assert json.loads(output)["counts"]["committed"] == 2


def test_a_merge_on_ray(recipe: Path, tmp_path: Path, ray_cluster: str) -> None:
    """Ray puts handlers of its own in place when it starts, which would end the process where it stands."""
    output = tmp_path / "out"
    process = start("merge", recipe, output, "--address", ray_cluster, "--progress", "json")
    errors = end(process, lambda: growing(output))
    assert process.returncode == 143
    lines = [json.loads(line) for line in errors.splitlines()]
    assert (lines[-1]["event"], lines[-1]["exit_code"]) == ("Error", 143)
    assert json.loads(next((output / RUNS).glob("*.json")).read_text())["state"] == "interrupted"
    again = start("merge", recipe, output, "--json")
    report, errors = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, errors
    assert len(json.loads(report)["files"]) == 1
    assert open_store(str(output)).leftovers() == ()
