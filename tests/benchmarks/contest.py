"""How one run of a program is taken: its wall time, its processor time, its memory.

A child starts with the peak of its parent, so this process must stay small: no torch here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Seconds between two looks at a process's memory: nothing is held for less, and a look costs microseconds.
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A program with its arguments; the folder it writes comes last."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one process took.

    Attributes:
        peak_bytes: Resident, mapped files included.
        anonymous_bytes: The most seen at a time of memory of its own, without files that it maps.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    anonymous_bytes: int = 0


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
        with _watched(process.pid) as seen:
            _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{errors.read().decode(errors='replace')[-2000:]}")
    return Figures(
        wall_s=wall_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        anonymous_bytes=max(seen, default=0),
    )


def take_merge(contestant: Contestant, output: Path) -> tuple[Figures, dict[str, Any] | None]:
    """Run a merge into an empty folder; return its figures and, if it is ours, its report."""
    figures = take((*contestant.command, str(output)))
    path = output / "geomerge_report.json"
    report = json.loads(path.read_text()) if path.exists() else None
    shutil.rmtree(output)
    return figures, report


@contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """Yield a list that grows by a process's anonymous memory in bytes, every now and then."""
    seen: list[int] = []
    ended = threading.Event()
    status = Path(f"/proc/{pid}/status")

    def watch() -> None:
        while not ended.wait(_LOOK_S):
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            seen.extend(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
