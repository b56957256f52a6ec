"""The page cache: what of a file lies in it, and how to drop or fill it.

Owns the system calls. Needs no privileges, and files that this user owns on a disk (a tmpfs cannot be dropped).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_FAILED = ctypes.c_void_p(-1).value
_BLOCK_BYTES = 8 << 20


class Residency:
    """Tells which pages of a file lie in the page cache, without touching them."""

    def __init__(self, path: Path) -> None:
        self._bytes = path.stat().st_size
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self._address = _LIBC.mmap(None, self._bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        finally:
            os.close(descriptor)
        if self._address == _FAILED:
            raise OSError(ctypes.get_errno(), f"cannot map {path}")
        self._pages = ctypes.create_string_buffer(-(-self._bytes // mmap.PAGESIZE))

    def __enter__(self) -> Residency:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _LIBC.munmap(self._address, self._bytes)

    def share(self) -> float:
        """Return the share of pages that lie in the cache."""
        return self._look().count(b"\1") / len(self._pages)

    def beyond(self, start_bytes: int) -> bool:
        """Return whether any page from there on lies in the cache."""
        return b"\1" in self._look()[start_bytes // mmap.PAGESIZE :]

    def _look(self) -> bytes:
        if _LIBC.mincore(self._address, self._bytes, self._pages):
            raise OSError(ctypes.get_errno(), "mincore")
        return self._pages.raw


def drop(paths: Iterable[Path]) -> None:
    """Drop clean pages of files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm(paths: Sequence[Path]) -> None:
    """Read the files that do not lie in the page cache as a whole."""
    buffer = bytearray(_BLOCK_BYTES)
    for path in paths:
        if resident_share([path]) == 1:
            continue
        descriptor = os.open(path, os.O_RDONLY)
        offset = 0
        while count := os.preadv(descriptor, [buffer], offset):
            offset += count
        os.close(descriptor)


def resident_share(paths: Sequence[Path]) -> float:
    """Return the share of the files, each counted alike, that lies in the page cache."""
    shares = []
    for path in paths:
        with Residency(path) as residency:
            shares.append(residency.share())
    return sum(shares) / len(shares)
