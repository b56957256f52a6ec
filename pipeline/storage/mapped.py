"""Local files read where the operating system holds them, without a copy.

Owns maps of files, and which of their pages are a process's at a time. Only what lies in the page cache is looked at:
a disk is read faster by reads. Must not know stores.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.storage.bus_errors import bus_errors
from pipeline.storage.counting import count
from pipeline.storage.page_cache import cached_share, system_function

# What a loop reads in place begins at a multiple of this: of any element's size.
_ALIGNMENT = 8
# Linux maps what lies around a page that is touched too: up to a huge page, from one multiple of this to the next.
_AROUND_BYTES = 2 << 20
# Whether bytes are in memory is asked for parts of this length at a time, by one page in so many bytes.
_PART_BYTES, _SAMPLE_BYTES = 64 << 20, 2 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """Bytes of a file in place, until they are let go.

    Attributes:
        bytes: uint8, not to be written. When the file is cut short or its disk fails meanwhile, zeros take their place
            and `faults` rises.
        file: Whose they are.
        start: The first byte's place in it.
    """

    bytes: np.ndarray
    file: MappedFile
    start: int

    def let_go(self) -> None:
        """End the look; once."""
        self.file.let_go(self)


class MappedFile:
    """A file that can be looked at. Thread-safe. It takes a descriptor until it is closed.

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
        self._path = path
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
        self._looks, self._closed = 0, False
        ends = errors.register(self._address, -(-len(view) // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._ends = weakref.finalize(self, ends)

    def look(self, start: int, stop: int) -> Look | None:
        """Return bytes in place; None unless they lie well and are, as far as samples tell, in the page cache."""
        if start % _ALIGNMENT or not start < stop <= self._bytes.size or not self._is_cached(start):
            return None
        with self._lock:
            if self._closed:
                return None
            self._looks += 1
        count(requests=1, read_bytes=stop - start)
        return Look(bytes=self._bytes[start:stop], file=self, start=start)

    def let_go(self, look: Look) -> None:
        """Take back bytes; they leave this process with others, a step at a time. The operating system keeps them."""
        with self._lock:
            self._looks -= 1
            self._done_bytes += look.bytes.size
            self._done = min(self._done[0], look.start), max(self._done[1], look.start + look.bytes.size)
            if self._closed and not self._looks:
                self._end()
            elif self._done_bytes >= self._step_bytes:
                self._unmap()

    def close(self) -> None:
        """Let the whole file go, as soon as nobody looks at it."""
        with self._lock:
            self._closed = True
            if not self._looks:
                self._end()

    def _end(self) -> None:
        self._ends()
        # Unmapped with the last reference.
        self._bytes = np.empty(0, dtype=np.uint8)

    def _unmap(self) -> None:
        """Take out of this process what was let go, but for the page at its end: what lies behind is being looked at.

        What is looked at in between comes back by itself.
        """
        first, last = (place // _AROUND_BYTES * _AROUND_BYTES for place in self._done)
        if first < last:
            self._advise(self._address + first, last - first, mmap.MADV_DONTNEED)
            rest = last < self._done[1]
            self._done, self._done_bytes = (last, self._done[1]) if rest else (self._bytes.size, 0), 0

    def _is_cached(self, start: int) -> bool:
        """Return whether bytes are in memory, as far as it is known.

        Passes go through a file in order: what is met at the begin of a part holds for the rest of it.
        """
        begin, end, cached = self._asked
        if not begin <= start < end:
            end = min(start + _PART_BYTES, self._bytes.size)
            cached = _are_cached(self._path, range(start, end, _SAMPLE_BYTES))
            self._asked = start, end, cached
        return cached


def _are_cached(path: str, places: Iterable[int]) -> bool:
    """Return whether some bytes of a file can be read without a wait; False where there is no telling."""
    with suppress(OSError), Path(path).open("rb", buffering=0) as file:
        byte = bytearray(1)
        for place in places:
            try:
                os.preadv(file.fileno(), [byte], place, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    return False
                # Filesystems in memory or on a network do not say; mincore does, of files that one may write.
                return os.access(path, os.W_OK) and cached_share(path, [(place, place + 1) for place in places]) == 1.0
        return True
    return False


def faults() -> int:
    """Return how many pages of mapped files could not be had so far."""
    errors = bus_errors()
    return 0 if errors is None else errors.faults
