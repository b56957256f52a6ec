"""A streamed object on S3: a multipart upload whose every request is repeated as long as any other.

Owns parts, their numbers and the threads that send them: a part keeps its number and its bytes until the server has
confirmed it, so that sending it again replaces it and none is lost or doubled. Must not know URLs, or which errors are
worth repeating.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from pipeline.errors import Problem, StorageError
from pipeline.storage.counting import count
from pipeline.storage.retrying import backend_errors
from pipeline.storage.s3 import S3Bucket

_Result = TypeVar("_Result")

# Parts of usual files: several are sent at a time, and the first begins soon.
_PART_BYTES = 16 << 20
# 10 000 parts are allowed: twice as long beyond so many, they make objects of 300 GB possible.
_SHORT_PARTS = 2000
# Held at a time, in short parts: the one that grows and those on their way.
_HELD_PARTS = 4
# An abort is on the way out of an error and must not take long; what it cannot remove is a leftover.
_ABORT_S = 30.0


class Attempt(Protocol):
    """Repeats a request while that may help, and translates its last error."""

    def __call__(self, request: Callable[[float], _Result], /) -> _Result:
        """Return what the request returns, given the seconds it may take; a StorageError otherwise."""


class S3Writer:
    """An object that grows in a multipart upload.

    Parts are sent while the next one grows; an error of theirs is raised by a later `write`, or by `commit`.

    Args:
        bucket: Where it will be.
        key: Its name there.
        attempt: By which every request is sent.
    """

    def __init__(self, bucket: S3Bucket, key: str, attempt: Attempt) -> None:
        self._bucket, self._key, self._attempt = bucket, key, attempt
        self._buffer = io.BytesIO()
        self._pool: ThreadPoolExecutor | None = None
        self._parts: list[Future[dict[str, object]]] = []
        self._under_way: set[Future[dict[str, object]]] = set()
        self._upload = ""
        self._token = secrets.token_hex(16)
        self._state = "open"

    def write(self, data: bytes | memoryview) -> None:
        """See `ObjectWriter`; a part that cannot be sent ends the upload."""
        self._require_open()
        view = memoryview(data)
        rest = view.cast("B") if view.nbytes else memoryview(b"")
        while rest:
            size_bytes = self._part_bytes()
            done = self._buffer.write(rest[: size_bytes - self._buffer.tell()])
            rest = rest[done:]
            if self._buffer.tell() >= size_bytes:
                self._guarded(self._send)

    def commit(self) -> None:
        """See `ObjectWriter`."""
        if self._state == "committed":
            return
        self._require_open()
        self._guarded(self._publish)
        self._state = "committed"

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException:
            self.abort()
            raise

    def _part_bytes(self) -> int:
        """Return how long the part that grows may become."""
        return _PART_BYTES * (1 if len(self._parts) < _SHORT_PARTS else 2)

    def _publish(self) -> None:
        if self._buffer.tell():
            self._send()
        if self._parts:
            parts = [part.result() for part in self._parts]
            self._attempt(lambda seconds: self._complete(parts, seconds))
        else:
            # An upload needs a part, and no part may be empty.
            self._attempt(lambda seconds: self._call("put_object", seconds, Body=b""))
        self._end_threads()

    def _send(self) -> None:
        """Let the buffer be sent as the next part, once there is room for another one.

        Raises:
            StorageError: An earlier part could not be sent.
        """
        if not self._upload:
            metadata = self._bucket.marked(self._token)
            begin = self._attempt(lambda seconds: self._call("create_multipart_upload", seconds, Metadata=metadata))
            self._upload = begin["UploadId"]
        self._pool = self._pool or ThreadPoolExecutor(_HELD_PARTS - 1, thread_name_prefix="upload")
        part = self._pool.submit(self._sent, len(self._parts) + 1, self._buffer.getvalue())
        self._buffer = io.BytesIO()
        self._parts.append(part)
        self._under_way.add(part)
        # What grows next is held beside those on their way.
        most = _HELD_PARTS * _PART_BYTES // self._part_bytes() - 1
        while self._under_way:
            patience_s = None if len(self._under_way) > most else 0
            done, self._under_way = wait(self._under_way, patience_s, FIRST_COMPLETED)
            for part in done:
                part.result()
            if patience_s is not None:
                return

    def _sent(self, number: int, body: bytes) -> dict[str, object]:
        """Send a part and return what the completion says of it."""

        def request(seconds: float) -> Any:
            if self._state != "open":
                # The upload is given up: nothing that another attempt could mend.
                raise RuntimeError(f"the writer is {self._state}")
            part = {"PartNumber": number, "UploadId": self._upload, "Body": body}
            return self._call("upload_part", seconds, **part)

        reply = self._attempt(request)
        # The server checks these once more when it puts the parts together.
        checksums = {name: value for name, value in reply.items() if name.startswith("Checksum")}
        count(written_bytes=len(body))
        return {"PartNumber": number, "ETag": reply["ETag"], **checksums}

    def _complete(self, parts: list[dict[str, object]], seconds: float) -> None:
        """Put the parts together; that the upload is gone is no error when it was done and only the reply was lost."""
        upload = {"Parts": parts}
        try:
            self._call("complete_multipart_upload", seconds, UploadId=self._upload, MultipartUpload=upload)
        except FileNotFoundError:
            if not self._bucket.is_marked(self._key, self._token, seconds):
                raise

    def abort(self) -> None:
        """See `ObjectWriter`; what the server cannot remove now is among the store's leftovers."""
        if self._state != "open":
            return
        self._state = "aborted"
        self._buffer = io.BytesIO()
        if self._upload:
            # A part that arrives after the abort would stay.
            wait(self._parts, timeout=_ABORT_S)
            # An abort is on the way out of another error, which must not be hidden by this one.
            with suppress(*backend_errors()):
                self._bucket.abort(self._key, self._upload, _ABORT_S)
        self._end_threads()

    def _end_threads(self) -> None:
        """Let the threads end when they have nothing left to do."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _call(self, verb: str, seconds: float, **arguments: object) -> Any:
        return self._bucket.call(verb, seconds, Key=self._key, **arguments)

    def _require_open(self) -> None:
        if self._state != "open":
            raise StorageError(Problem(what=f"the writer is {self._state}, nothing more can be written"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.abort()
