"""Local files read where the operating system holds them, without a copy.

Owns maps of files, and which of their pages are a process's at a time. Only what lies in the page cache is looked at:
a disk is read faster by reads. Must not know stores.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from pathlib import Path

import numpy as np

from pipeline.storage.bus_errors import bus_errors
from pipeline.storage.counting import count
from pipeline.storage.page_cache import is_resident, system_function

# What a loop reads in place begins at a multiple of this: of any element's size.
_ALIGNMENT = 8
# Linux maps what lies around a page that is touched too: up to a huge page, from one multiple of this to the next.
_AROUND_BYTES = 2 << 20
# Whether bytes are in memory is asked for parts of this length at a time, by one page in so many bytes.
_PART_BYTES, _SAMPLE_BYTES = 64 << 20, 2 << 20


class MappedFile:
    """A file that can be looked at.

    Args:
        path: The file. What is at this path later is not looked at: who reads must check the file's version.
        step_bytes: How much of it may stay in this process after it was let go; less costs more time.

    Raises:
        OSError: It cannot be mapped, here or at all.
    """

    def __init__(self, path: str, *, step_bytes: int) -> None:
        errors = bus_errors()
        # Too short to give up the interpreter's lock for.
        advise = system_function("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, short=True)
        if errors is None or advise is None:
            raise OSError("files are not mapped on this system")
        self._advise = advise
        with Path(path).open("rb") as file:
            try:
                view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
            except ValueError as error:
                raise OSError(f"{path} is empty") from error
        self._bytes = np.frombuffer(view, dtype=np.uint8)
        self._address = self._bytes.ctypes.data
        self._step_bytes = step_bytes
        self._lock = threading.Lock()
        # The range that holds what was let go since the last step, and how much of it that is.
        self._done, self._done_bytes = (self._bytes.size, 0), 0
        # The part that was asked for last, and whether it was in memory.
        self._asked = (0, 0, False)
        self._forget = errors.register(self._address, -(-len(view) // mmap.PAGESIZE) * mmap.PAGESIZE)

    def view(self, start: int, stop: int) -> np.ndarray | None:
        """Return bytes (uint8) in place; None unless they lie well and are, as far as samples tell, in the page cache.

        They may be looked at until `let_go`. When the file is cut short or its disk fails meanwhile, zeros take their
        place and `faults` rises.
        """
        if start % _ALIGNMENT or not start < stop <= self._bytes.size:
            return None
        begin, end, cached = self._asked
        # Passes go through a file in order: what is met at the begin of a part holds for the rest of it.
        if not begin <= start < end:
            end = min(start + _PART_BYTES, self._bytes.size)
            cached = self._is_cached(start, end)
            self._asked = start, end, cached
        if not cached:
            return None
        count(requests=1, read_bytes=stop - start)
        return self._bytes[start:stop]

    def let_go(self, start: int, stop: int) -> None:
        """Take back bytes; they leave this process with others, a step at a time. The operating system keeps them."""
        with self._lock:
            self._done_bytes += stop - start
            self._done = min(self._done[0], start), max(self._done[1], stop)
            if self._done_bytes >= self._step_bytes:
                # What lies behind is being looked at, mostly: a page that is shared with it leaves with the next step.
                self._unmap(self._done[1] // _AROUND_BYTES * _AROUND_BYTES)

    def rest(self) -> None:
        """Take out of this process what was let go so far."""
        with self._lock:
            if self._done_bytes:
                self._unmap(min(-(-self._done[1] // _AROUND_BYTES) * _AROUND_BYTES, self._bytes.size))

    def close(self) -> None:
        """Let the whole file go; nothing may look at it any more."""
        self._forget()
        # Unmapped with the last reference.
        self._bytes = np.empty(0, dtype=np.uint8)

    def _unmap(self, last: int) -> None:
        """Take out of this process all around what was let go; what is looked at there comes back by itself."""
        first = self._done[0] // _AROUND_BYTES * _AROUND_BYTES
        if first < last:
            self._advise(self._address + first, last - first, mmap.MADV_DONTNEED)
            self._done, self._done_bytes = (self._bytes.size, 0), 0

    def _is_cached(self, start: int, stop: int) -> bool:
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        return all(is_resident(self._address + place, 1) for place in range(first, stop, _SAMPLE_BYTES))


def faults() -> int:
    """Return how many pages of mapped files could not be had so far."""
    errors = bus_errors()
    return 0 if errors is None else errors.faults
