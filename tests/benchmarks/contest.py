"""The programs that are timed, and how one run is taken.

Owns the command lines, their recipes and the figures of a process (wall, user + system seconds, peak memory).
A child starts with the peak of its parent, so this process must stay small: no torch here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The largest family that mergekit's karcher is run on: it takes minutes above that.
_KARCHER_BYTES = 250_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A program with its arguments; the folder it writes comes last.

    Attributes:
        reads: Bytes of the inputs that it reads if it does not report them.
        start: A command that only starts the interpreter and imports what the program needs.
        slow: Run in the first round only.
    """

    name: str
    command: tuple[str, ...]
    reads: int
    start: tuple[str, ...]
    slow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one process took."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def take(command: tuple[str, ...]) -> Figures:
    """Run a program to its end.

    Raises:
        RuntimeError: It failed; its standard error is the text.
    """
    # What earlier runs left unwritten must not be paid for by this one.
    os.sync()
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{errors.read().decode(errors='replace')[-2000:]}")
    return Figures(wall_s=wall_s, cpu_s=usage.ru_utime + usage.ru_stime, peak_bytes=usage.ru_maxrss * 1024)


def take_merge(contestant: Contestant, output: Path) -> tuple[Figures, dict[str, Any] | None]:
    """Run a merge into an empty folder; return its figures and, if it is ours, its report."""
    figures = take((*contestant.command, str(output)))
    path = output / "geomerge_report.json"
    report = json.loads(path.read_text()) if path.exists() else None
    shutil.rmtree(output)
    return figures, report


def contestants(root: Path, folders: list[Path], mergekit: str | None) -> list[Contestant]:
    """Return what is run on a family.

    Args:
        root: Where recipes may be written.
        folders: The base, then the models.
        mergekit: An interpreter that has mergekit, or None.
    """
    base, *models = [str(folder) for folder in folders]
    size = (folders[0] / "model.safetensors").stat().st_size
    entries = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    linear = _recipe(root / "linear.yaml", {"merge_method": "linear", "dtype": "bfloat16", "models": entries})
    median = _recipe(root / "median.yaml", {"merge_method": "geometric_median", "base_model": base, "models": entries})
    merge = (sys.executable, "-m", "pipeline", "merge", "--executor", "local")
    start = (sys.executable, "-c", "import pipeline.merging, rich.console")
    terms: dict[str, int] = _plan(median)["memory_per_worker"]["terms"]
    # Enough to run at full width, nothing to keep chunks of the first read in.
    frugal = ("--memory", str(sum(terms.values()) - terms["retained"]))
    one = size * len(models)
    found = [
        Contestant(name="linear", command=(*merge, linear), reads=one, start=start),
        Contestant(name="median", command=(*merge, median), reads=0, start=start),
        Contestant(name="median, two reads", command=(*merge, *frugal, median), reads=0, start=start),
    ]
    if mergekit is None:
        return found
    module = "mergekit.scripts.run_yaml"
    start = (mergekit, "-c", f"import {module}")
    # One thread: two of them take more processor time and, on a shared machine, more wall time as well.
    peer = (mergekit, "-m", module, "--no-copy-tokenizer", "--lazy-unpickle", "--low-cpu-memory", "--quiet", "-j", "1")
    found.append(Contestant(name="mergekit linear", command=(*peer, linear), reads=one, start=start))
    if size <= _KARCHER_BYTES:
        keys = {"merge_method": "karcher", "dtype": "float32", "out_dtype": "bfloat16"}
        karcher = _recipe(root / "karcher.yaml", {**keys, "models": [{"model": model} for model in models]})
        found.append(Contestant(name="mergekit karcher", command=(*peer, karcher), reads=one, start=start, slow=True))
    return found


def _recipe(path: Path, document: dict[str, object]) -> str:
    path.write_text(json.dumps(document))  # JSON is YAML
    return str(path)


def _plan(recipe: str) -> dict[str, Any]:
    command = (sys.executable, "-m", "pipeline", "plan", recipe, recipe + ".planned", "--json")
    plan: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return plan
