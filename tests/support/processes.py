"""Processes that the tests start: found by their kinship in /proc, killed with all they started, never left behind.

Run as a program this is the guard: it waits for the end of the tests' process and kills what that one had no time for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]

# Killed processes are gone after milliseconds; one in the middle of a write to a disk may take longer.
_PATIENCE_S = 30.0


class Process(NamedTuple):
    """One process: its parent, its session, and whether it is dead and only waits for its parent to notice."""

    pid: int
    parent: int
    session: int
    zombie: bool


def processes() -> list[Process]:
    """Return all processes."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # The command's name stands in brackets and may hold anything.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found.append(Process(int(entry.name), int(fields[1]), int(fields[3]), fields[0] == "Z"))
    return found


def family(leader: int) -> list[int]:
    """Return the living processes of a leader's session and all their descendants, whatever session they made."""
    everyone = processes()
    found = {process.pid for process in everyone if leader in (process.pid, process.session)}
    while more := {process.pid for process in everyone if process.parent in found} - found:
        found |= more
    return sorted(process.pid for process in everyone if process.pid in found and not process.zombie)


def connected_from(port: int, candidates: Iterable[int]) -> int | None:
    """Return the process that has a TCP connection from a local port, or None.

    Args:
        port: Of this end.
        candidates: The processes to look at.
    """
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    inodes = {fields[9] for fields in map(str.split, lines) if int(fields[1].rpartition(":")[2], 16) == port}
    for pid in candidates:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    target = str(descriptor.readlink())
                    if target.startswith("socket:[") and target[8:-1] in inodes:
                        return pid
    return None


def command_line(pid: int) -> str:
    """Return a process's command as a list of processes shows it, or "" when it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def kill(*pids: int, with_signal: int = signal.SIGKILL) -> None:
    """Send a signal; a process that is gone already is none to worry about."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, with_signal)


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that leads a session, and that does not outlive this one.

    Args:
        command: Its command line.
        options: Of `subprocess.Popen`.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    _tell_guard(f"+{process.pid}")
    return process


def kill_family(leader: subprocess.Popen[bytes]) -> None:
    """Kill what `start` started, everything in its session and everything below, until nothing is left.

    Raises:
        RuntimeError: Something does not die.
    """
    _kill_all(leader.pid, leader.poll)
    leader.wait()
    _tell_guard(f"-{leader.pid}")


def _kill_all(leader: int, reap: Callable[[], object]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    # Collected over time: an orphan in a session of its own can no longer be told from a stranger.
    everyone = set(family(leader))
    while alive := [pid for pid in everyone if _lives(pid)]:
        kill(*alive)
        reap()
        everyone |= set(family(leader))
        if time.monotonic() > deadline:
            raise RuntimeError(f"these do not die: {[command_line(pid) for pid in alive]}")
        time.sleep(0.02)


_guard: subprocess.Popen[str] | None = None


def _tell_guard(line: str) -> None:
    global _guard
    if _guard is None:
        command = [sys.executable, "-m", "tests.support.processes"]
        # In a session of its own it hears no ctrl-C; its stdin ends when this process does, however that ends.
        _guard = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True, start_new_session=True)
    if _guard.stdin is not None:
        _guard.stdin.write(line + "\n")
        _guard.stdin.flush()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> None:
    """Wait for the end of stdin, then kill the families of the leaders that it named and did not take back."""
    leaders: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        leaders = leaders | {pid} if line[0] == "+" else leaders - {pid}
    for leader in leaders:
        _kill_all(leader, lambda: None)


if __name__ == "__main__":
    main()
