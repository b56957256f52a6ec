"""One range of a remote object, or all of it, by one request.

Owns the check that the bytes which come are those that were asked for: servers cut a range at the object's end without
a word, some cut it elsewhere, and some send everything. Must not know how reads are split.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence

from pipeline.storage.backend import Backend
from pipeline.storage.base import short_read
from pipeline.storage.counting import count
from pipeline.storage.retrying import backend_errors, is_beyond_end

# A server that says less than it has once may do so again, but hardly four times.
_SHORT_REPLIES = 4


class IgnoresRangesError(RuntimeError):
    """The server sends everything: nothing that another attempt could mend."""

    def __init__(self) -> None:
        super().__init__("the server ignores byte ranges")


class RangeReader:
    """Reads ranges of a backend's objects.

    Args:
        backend: The backend.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ranges_known = not backend.is_http

    def read(self, path: str, start: int, wanted_bytes: int) -> bytes:
        """Return a range.

        Args:
            path: The object.
            start: Its first byte.
            wanted_bytes: Its length, more than zero.

        Raises:
            MissingObject: There is no object.
            StorageError: The range goes beyond the end, or the backend failed.
        """
        full, data = self._backend.full(path), b""

        def request(seconds: float) -> int:
            nonlocal data
            data = self._ranged(full, start, wanted_bytes, seconds)
            return len(data)

        self._whole(path, start, wanted_bytes, request)
        return data

    def read_into(self, path: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill buffers with a range, one behind the other.

        Args:
            path: The object.
            start: Its first byte.
            buffers: Writable bytes (format B), more than none.

        Raises:
            MissingObject: There is no object.
            StorageError: The range goes beyond the end, or the backend failed.
        """
        full, wanted_bytes = self._backend.full(path), sum(map(len, buffers))
        direct = self._backend.direct

        def request(seconds: float) -> int:
            nonlocal direct
            end_s = time.monotonic() + seconds
            got_bytes = direct.read_into(full, start, buffers, seconds) if direct is not None else None
            if got_bytes is not None:
                return got_bytes
            # What failed there once is not worth another try before it works here.
            direct = None
            data = self._ranged(full, start, wanted_bytes, max(end_s - time.monotonic(), 1e-3))
            _spread(data, buffers)
            return len(data)

        self._whole(path, start, wanted_bytes, request)

    def _whole(self, path: str, start: int, wanted_bytes: int, request: Callable[[float], int]) -> None:
        """Repeat a request until it has brought as many bytes as are wanted; it returns how many it did."""
        full, short = self._backend.full(path), 0

        def attempt(seconds: float) -> int:
            nonlocal short
            got_bytes = request(seconds)
            if 0 < got_bytes < wanted_bytes and self._has(full, start + wanted_bytes, seconds):
                short += 1
                if short < _SHORT_REPLIES:
                    raise OSError(errno.EIO, f"wanted {wanted_bytes} bytes from offset {start}, got {got_bytes}")
            return got_bytes

        got_bytes = self._backend.attempt("read", path, attempt)
        if got_bytes != wanted_bytes:
            remedy = "the server sends less than it says it has: ask who runs it" if short else None
            raise short_read(self._backend.location(path), start, wanted_bytes, got_bytes, remedy)
        count(read_bytes=wanted_bytes)

    def read_all(self, path: str) -> bytes:
        """Return a whole object by one request without a range: all its bytes are of one version, however long it is.

        That the reply has the length which it states is checked by the backends' HTTP clients.

        Raises:
            MissingObject: There is no object.
            StorageError: The backend failed.
        """
        full = self._backend.full(path)
        # s3fs would ask for the size first and for several ranges then.
        one = {"max_concurrency": 1} if self._backend.bucket is not None else {}

        def request(seconds: float) -> bytes:
            return bytes(self._backend.call("cat_file", full, seconds=seconds, **one))

        data = self._backend.attempt("read", path, request)
        count(read_bytes=len(data))
        return data

    def _ranged(self, full: str, start: int, wanted_bytes: int, seconds: float) -> bytes:
        """Return what the backend gives for a range: less beyond the end."""
        self._require_ranges(full)
        try:
            data = bytes(self._backend.call("cat_file", full, seconds=seconds, start=start, end=start + wanted_bytes))
        except backend_errors() as error:
            if not is_beyond_end(error):
                raise
            return b""
        if len(data) > wanted_bytes:
            raise IgnoresRangesError
        return data

    def _require_ranges(self, full: str) -> None:
        """Ask once for the second byte of an object: a server that ignores ranges would send all, each time."""
        if self._ranges_known:
            return
        count(requests=1)
        with self._backend.fs.open(full, "rb", size=2, block_size=1, cache_type="none") as file:
            file.seek(1)
            try:
                file.read(1)
            except ValueError as error:
                raise IgnoresRangesError from error
        self._ranges_known = True

    def _has(self, full: str, stop: int, seconds: float) -> bool:
        """Return whether an object goes at least so far."""
        size = self._backend.call("info", full, seconds=seconds).get("size")
        return isinstance(size, int) and size >= stop


def _spread(data: bytes, buffers: Sequence[memoryview]) -> None:
    """Copy bytes into buffers, as far as they go."""
    done = 0
    for buffer in buffers:
        part = memoryview(data)[done : done + len(buffer)]
        buffer[: len(part)] = part
        done += len(part)
