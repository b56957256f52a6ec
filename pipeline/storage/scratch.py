"""A file without a name, to try with how fast a disk takes what is written.

Owns where it lies and that nothing of it is left, even by a process that is killed. Must not know stores.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.storage.page_cache import start_write_back

# Bytes that are written before it begins again at its start: more than a disk's own cache hides, and no disk is full
# by it.
_MOST_BYTES = 256 << 20
# As for real files, see `local_writer`.
_WRITE_BACK_BYTES = 32 << 20


class ScratchFile:
    """Takes bytes as a file does that will be kept. When it fails, `failed` says so, and nothing is raised.

    Args:
        descriptor: Of a file that has no name; owned from now on.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = self._begun = 0
        self.failed = False

    def write(self, data: bytes | memoryview) -> None:
        """Write bytes, and let the disk begin with them now and then."""
        rest = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        try:
            while rest and not self.failed:
                done = os.pwrite(self._descriptor, rest, self._position)
                self._position += done
                rest = rest[done:]
            if self._position - self._begun >= _WRITE_BACK_BYTES:
                start_write_back(self._descriptor, self._begun, self._position)
                self._begun = self._position
            if self._position >= _MOST_BYTES:
                self._position = self._begun = 0
        except OSError:
            self.failed = True

    def sync(self) -> None:
        """Return when all bytes are on the disk."""
        try:
            os.fsync(self._descriptor)
        except OSError:
            self.failed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self._descriptor)


def open_scratch(folder: str) -> ScratchFile | None:
    """Return a file on the disk of a folder, or of the nearest one around it that exists; None where that cannot be.

    Args:
        folder: Absolute; it is left as it is, and so is its time of change.
    """
    existing = next(place for place in (Path(folder), *Path(folder).parents) if place.is_dir())
    if not hasattr(os, "O_TMPFILE"):
        return None
    with suppress(OSError):
        free = os.statvfs(existing)
        if free.f_bavail * free.f_frsize > 4 * _MOST_BYTES:
            return ScratchFile(os.open(existing, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    return None
