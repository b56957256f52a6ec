"""A streamed object on a remote store.

Owns the deferred commit: the backend's own where there is one, else a hidden name and a rename. Must not know URLs,
credentials or retries, nor import fsspec: it is handed a filesystem.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any, Self

from pipeline.errors import Problem, StorageError
from pipeline.storage.counting import count
from pipeline.storage.retrying import backend_errors

# 10 000 parts are allowed: 32 MiB make objects of 320 GB possible.
_PART_BYTES = 32 << 20


class FsspecWriter:
    """An object that grows in a multipart upload, or under a hidden name where there are none.

    Args:
        fs: The filesystem.
        target: The object's name there.
        temporary: Where the bytes go; equal to `target` when the backend defers the commit itself.
        translated: A context that turns backend errors into `StorageError`.
    """

    def __init__(
        self, fs: Any, target: str, temporary: str, translated: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._fs, self._target, self._temporary, self._translated = fs, target, temporary, translated
        self._state = "open"
        self._deferred = target == temporary
        count(requests=1)
        self._file = fs.open(temporary, "wb", block_size=_PART_BYTES, autocommit=not self._deferred)

    def write(self, data: bytes | memoryview) -> None:
        """See `ObjectWriter`."""
        with self._translated():
            self.write_raw(data)
        count(written_bytes=memoryview(data).nbytes)

    def commit(self) -> None:
        """See `ObjectWriter`."""
        if self._state == "committed":
            return
        try:
            with self._translated():
                self.commit_raw()
        except StorageError:
            self.abort()
            raise

    def write_raw(self, data: bytes | memoryview) -> None:
        """As `write`, with the backend's own errors, for a caller that retries."""
        self._require_open()
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        for start in range(0, len(view), _PART_BYTES):
            self._file.write(view[start : start + _PART_BYTES])

    def commit_raw(self) -> None:
        """As `commit`, with the backend's own errors, for a caller that retries."""
        self._require_open()
        count(requests=1)
        self._file.close()
        if self._deferred:
            self._file.commit()
        else:
            self._rename()
        self._fs.invalidate_cache()
        self._state = "committed"

    def _rename(self) -> None:
        """Move the hidden object to its name."""
        move = type(self._fs).mv
        if move.__module__ in ("fsspec.spec", "fsspec.asyn"):
            # The generic mv expands "*" and "[" in names.
            self._fs.cp_file(self._temporary, self._target)
            self._fs.rm_file(self._temporary)
        else:
            self._fs.mv(self._temporary, self._target)

    def abort(self) -> None:
        """See `ObjectWriter`; what the backend cannot delete now, its lifecycle rules must."""
        if self._state != "open":
            return
        self._state = "aborted"
        # An abort is on the way out of another error, which must not be hidden by this one.
        with suppress(*backend_errors()):
            if self._deferred:
                self._file.discard()
            else:
                self._file.close()
                self._fs.rm_file(self._temporary)
        if self._deferred:
            # Otherwise the garbage collector closes the file, and closing uploads the rest of the buffer.
            self._file.closed = True

    def _require_open(self) -> None:
        if self._state != "open":
            raise StorageError(Problem(what=f"the writer is {self._state}, nothing more can be written"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.abort()
