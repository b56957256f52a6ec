"""What this process asked of storage so far.

Owns the counters and their lock. Must not know stores: they report here.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Sums since the process began; none ever falls.

    Attributes:
        requests: What was sent to stores, repetitions included; a read or write of a local file is one.
        retries: Those that were repetitions.
        read_bytes: Contents of objects that were handed to callers.
        written_bytes: Contents of objects that stores took.
    """

    requests: int = 0
    retries: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


_lock = threading.Lock()
_sums = [0, 0, 0, 0]


def counters() -> Counters:
    """Return the sums of now, taken at one moment."""
    with _lock:
        requests, retries, read_bytes, written_bytes = _sums
    return Counters(requests=requests, retries=retries, read_bytes=read_bytes, written_bytes=written_bytes)


def count(*, requests: int = 0, retries: int = 0, read_bytes: int = 0, written_bytes: int = 0) -> None:
    """Add to the sums; every argument is at least zero."""
    with _lock:
        _sums[0] += requests
        _sums[1] += retries
        _sums[2] += read_bytes
        _sums[3] += written_bytes
