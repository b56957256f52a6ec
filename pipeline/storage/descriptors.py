"""File descriptors that stay open between reads.

Owns their number, their sharing among threads, and noticing that a file was replaced. Must not know stores.
"""

from __future__ import annotations

import errno
import os
import stat as stat_bits
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

# A family of 8 models with 4 shards each stays open; ulimit is 1024 on common systems.
_MOST_OPEN = 64


class _OpenFile:
    """A descriptor shared by the reads that are under way; closed by the last one once it is retired."""

    __slots__ = ("descriptor", "identity", "readers", "retired")

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self.descriptor)
        self.identity = (status.st_dev, status.st_ino)
        self.readers = 0
        self.retired = False


class OpenFiles:
    """At most `_MOST_OPEN` idle descriptors, least recently used first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()

    @contextmanager
    def use(self, path: str) -> Iterator[int]:
        """Yield a descriptor of the file that is at `path` now."""
        file = self._acquire(path)
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.readers -= 1
                if file.retired and not file.readers:
                    os.close(file.descriptor)

    def _acquire(self, path: str) -> _OpenFile:
        # Asked each time: a replaced file must not be read through its old descriptor, and opening a pipe would block.
        status = os.stat(path)  # noqa: PTH116 - a hot path
        require_regular(status, path)
        with self._lock:
            file = self._files.get(path)
            if file is not None and file.identity != (status.st_dev, status.st_ino):
                self._retire(path)
                file = None
            if file is None:
                file = self._files[path] = _OpenFile(path)
            file.readers += 1
            self._files.move_to_end(path)
            while len(self._files) > _MOST_OPEN:
                self._retire(next(iter(self._files)))
            return file

    def _retire(self, path: str) -> None:
        file = self._files.pop(path)
        file.retired = True
        if not file.readers:
            os.close(file.descriptor)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor that no read is using, and the others when they finish."""
        with self._lock:
            for path in tuple(self._files):
                self._retire(path)


def require_regular(status: os.stat_result, path: str) -> None:
    """Raise as open() would for a folder: pipes and devices are no objects either."""
    if not stat_bits.S_ISREG(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is no regular file", path)
