"""Which process on which machine this is, and whether another one still runs.

Owns the reading of /proc. Elsewhere than on Linux a process is known by its number alone.
"""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path


@functools.cache
def host_name() -> str:
    """Return this machine's name, for people."""
    return socket.gethostname()


@functools.cache
def machine_name() -> str:
    """Return what is the same for two processes that see one another by number, and for no others.

    A host name does not do: containers may share it, and each counts its processes from 1.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - it points to no path
    except OSError:
        return host_name()
    return f"{host_name()}/{boot}/{space}"


def process_start(pid: int) -> int | None:
    """Return when a process started, in ticks since the machine did; None when it is gone or that cannot be told.

    A number is given again to another process; the start tells the two apart. A process that nobody has waited for is
    gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def process_lives(pid: object, start: object) -> bool:
    """Return whether the process of a number that started then still runs.

    Args:
        pid: Its number.
        start: What `process_start` gave for it.
    """
    if not isinstance(pid, int) or pid <= 0:
        return False
    if start is not None:
        return process_start(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
