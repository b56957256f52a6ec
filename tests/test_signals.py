"""Signals at any moment from the first on: a code, a text, no traceback, and nothing half done."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline import signals
from pipeline.engine.claim import RUNS
from pipeline.storage import open_store
from tests.support.sparse import save_sparse

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SHAPES = {f"model.layers.{layer}.mlp.weight": (4096, 4096) for layer in range(3)}
PATIENCE_S = 120.0
# Sends itself a signal when a module is first asked for, in the midst of the import that asks for it.
AT_IMPORT = """
import importlib.abc, os, sys

awaited, number = sys.argv[1], int(sys.argv[2])

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == awaited:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), number)
        return None

sys.meta_path.insert(0, Finder())
del sys.argv[0], sys.argv[0], sys.argv[0]
sys.argv.insert(0, "geomerge")
from pipeline.__main__ import run
run()
"""
# Takes the terminal on its standard input for its own, so that a hang-up of it reaches this process.
ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "pipeline", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models = [{"model": str(save_sparse(root / name, SHAPES))} for name in ("a", "b", "c")]
    path = root / "large.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "geometric_median", "models": models}))
    return path


def growing(output: Path) -> bool:
    return any(".safetensors." in path.name for path in output.glob(".*.part"))


def wait_for_growth(process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not growing(output):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# The first of all, that of a plan, NumPy's own C, and one that is asked for when the output is claimed already.
@pytest.mark.parametrize(
    ("module", "number", "progress"),
    [
        ("click", signal.SIGINT, "lines"), ("click", signal.SIGHUP, "json"),
        ("pipeline.merging", signal.SIGINT, "json"),
        ("numpy._core.multiarray", signal.SIGINT, "lines"), ("numpy._core.multiarray", signal.SIGTERM, "json"),
        ("pyarrow", signal.SIGINT, "lines"), ("pyarrow", signal.SIGHUP, "json"),
    ],
)  # fmt: skip
def test_in_the_midst_of_an_import(
    recipe: Path, tmp_path: Path, module: str, number: signal.Signals, progress: str
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", AT_IMPORT, module, str(int(number)), "merge", str(recipe), str(output)]
    ran = subprocess.run(
        [*command, "--executor", "local", "--progress", progress],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (CODES[number], ""), ran.stderr
    assert "Traceback" not in ran.stderr
    last = ran.stderr.splitlines()[-1]
    if progress == "json":
        event = json.loads(last)
        assert (event["event"], event["exit_code"]) == ("Error", CODES[number])
        last = event["problems"][0]["what"]
    assert last == "stopped; the same command resumes"
    assert not (output / "model.safetensors.index.json").exists()
    if output.exists():
        assert open_store(str(output)).leftovers() == ()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_at_any_time_of_the_start(recipe: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Whatever it is in the midst of: the interpreter's own start is over when the handlers are there."""
    for moment in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", f"import os; os.write(1, b'1'); {AT_IMPORT}", "-", "0", "merge", str(recipe),
             str(tmp_path / f"out{moment}"), "--executor", "local"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.read(1) == "1"
        time.sleep(0.1 + moment * 0.25)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_S)
        # Fast machines may have ended it.
        assert process.returncode in (CODES[number], 0), errors
        assert "Traceback" not in errors
        assert "Aborted" not in errors
        if process.returncode:
            assert errors.splitlines()[-1] == "stopped; the same command resumes"


def test_a_hang_up_of_the_terminal(recipe: Path, tmp_path: Path) -> None:
    """What would be written to it is lost, and nothing else."""
    output = tmp_path / "out"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", ON_TERMINAL, "merge", str(recipe), str(output), "--executor", "local"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, text=True, start_new_session=True)
    os.close(theirs)
    try:
        wait_for_growth(process, output)
        os.close(ours)
        assert process.wait(timeout=PATIENCE_S) == 129
    finally:
        process.kill()
        process.wait()
    assert open_store(str(output)).leftovers() == ()
    assert json.loads(next((output / RUNS).glob("*.json")).read_text())["state"] == "interrupted"


def test_under_nohup_a_hang_up_is_nothing(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", "pipeline", "merge", str(recipe), str(output), "--executor", "local"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for_growth(process, output)
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors


def test_where_an_exception_would_be_lost_it_is_raised_later() -> None:
    class Closed:
        def __init__(self, stop: Callable[[], None]) -> None:
            self._stop = stop

        def __del__(self) -> None:
            self._stop()

    class Referred:
        pass

    def lost() -> None:
        signal.raise_signal(signal.SIGINT)

    for how in ("finalizer", "callback"):
        with pytest.raises(SystemExit) as ended, signals.Unwinding():  # noqa: PT012
            held: object = Closed(lost) if how == "finalizer" else Referred()
            reference = weakref.ref(held, lambda _: lost()) if how == "callback" else None
            del held
            time.sleep(PATIENCE_S)
        assert ended.value.code == 130
        assert reference is None or reference() is None


def test_codes_of_signals_and_of_other_reasons() -> None:
    assert [signals.exit_code(code) for code in (129, 130, 143, 15)] == [129, 130, 143, 143]
    assert [signals.exit_code(code) for code in (0, 1, 2, 9, None, "text")] == [None] * 6


def test_what_comes_of_an_interrupted_body_is_the_signal_s_code() -> None:
    before = {number: signal.getsignal(number) for number in CODES}
    with pytest.raises(SystemExit) as ended, signals.Unwinding():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            # One more is nothing to it.
            signal.raise_signal(signal.SIGHUP)
            raise RuntimeError
    assert ended.value.code == 143
    assert {number: signal.getsignal(number) for number in CODES} == before


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["merge", "--progress", "json"], True), (["merge", "--progress=json", "a"], True),
        (["merge", "--progress"], False), (["json", "--progress", "lines"], False), ([], False),
    ],
)  # fmt: skip
def test_who_asks_for_lines(arguments: list[str], asked: bool) -> None:
    assert signals.wants_lines(arguments) == asked
