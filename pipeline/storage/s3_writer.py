"""A streamed object on S3: a multipart upload whose every request is repeated as long as any other.

Owns parts and their numbers: a part keeps its number and its bytes until the server has confirmed it, so that sending
it again replaces it and none is lost or doubled. Must not know URLs, or which errors are worth repeating.
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from pipeline.errors import Problem, StorageError
from pipeline.storage.counting import count
from pipeline.storage.retrying import backend_errors
from pipeline.storage.s3 import S3Bucket

_Result = TypeVar("_Result")

# 10 000 parts are allowed: 32 MiB make objects of 320 GB possible.
_PART_BYTES = 32 << 20
# An abort is on the way out of an error and must not take long; what it cannot remove is a leftover.
_ABORT_S = 30.0


class Attempt(Protocol):
    """Repeats a request while that may help, and translates its last error."""

    def __call__(self, request: Callable[[float], _Result], /) -> _Result:
        """Return what the request returns, given the seconds it may take; a StorageError otherwise."""


class S3Writer:
    """An object that grows in a multipart upload.

    Args:
        bucket: Where it will be.
        key: Its name there.
        attempt: By which every request is sent.
    """

    def __init__(self, bucket: S3Bucket, key: str, attempt: Attempt) -> None:
        self._bucket, self._key, self._attempt = bucket, key, attempt
        self._buffer = io.BytesIO()
        self._parts: list[dict[str, object]] = []
        self._upload = ""
        self._token = secrets.token_hex(16)
        self._state = "open"

    def write(self, data: bytes | memoryview) -> None:
        """See `ObjectWriter`; a part that cannot be sent ends the upload."""
        self._require_open()
        view = memoryview(data)
        rest = view.cast("B") if view.nbytes else memoryview(b"")
        while rest:
            done = self._buffer.write(rest[: _PART_BYTES - self._buffer.tell()])
            rest = rest[done:]
            if self._buffer.tell() >= _PART_BYTES:
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
        except StorageError:
            self.abort()
            raise

    def _publish(self) -> None:
        if self._buffer.tell():
            self._send()
        if self._parts:
            self._attempt(self._complete)
        else:
            # An upload needs a part, and no part may be empty.
            self._attempt(lambda seconds: self._call("put_object", seconds, Body=b""))

    def _send(self) -> None:
        """Send the buffer as the next part."""
        if not self._upload:
            metadata = self._bucket.marked(self._token)
            begin = self._attempt(lambda seconds: self._call("create_multipart_upload", seconds, Metadata=metadata))
            self._upload = begin["UploadId"]
        number, body = len(self._parts) + 1, self._buffer.getvalue()
        self._buffer = io.BytesIO()
        part = {"PartNumber": number, "UploadId": self._upload, "Body": body}
        reply = self._attempt(lambda seconds: self._call("upload_part", seconds, **part))
        # The server checks these once more when it puts the parts together.
        checksums = {name: value for name, value in reply.items() if name.startswith("Checksum")}
        self._parts.append({"PartNumber": number, "ETag": reply["ETag"], **checksums})
        count(written_bytes=len(body))

    def _complete(self, seconds: float) -> None:
        """Put the parts together; that the upload is gone is no error when it was done and only the reply was lost."""
        parts = {"Parts": self._parts}
        try:
            self._call("complete_multipart_upload", seconds, UploadId=self._upload, MultipartUpload=parts)
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
            # An abort is on the way out of another error, which must not be hidden by this one.
            with suppress(*backend_errors()):
                self._bucket.abort(self._key, self._upload, _ABORT_S)

    def _call(self, verb: str, seconds: float, **arguments: object) -> Any:
        return self._bucket.call(verb, seconds, Key=self._key, **arguments)

    def _require_open(self) -> None:
        if self._state != "open":
            raise StorageError(Problem(what=f"the writer is {self._state}, nothing more can be written"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.abort()
