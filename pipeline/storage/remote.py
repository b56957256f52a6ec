"""Object stores and everything else that fsspec opens.

Owns the splitting of reads, whole and exclusive writes, listing. Must not know fsspec, but what its filesystems are
called to do; nor local folders.
"""

from __future__ import annotations

import errno
import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from urllib.parse import unquote

from pipeline.errors import Problem, StorageError
from pipeline.storage import remote_leftovers
from pipeline.storage.backend import Backend
from pipeline.storage.base import (
    Leftover,
    MissingObject,
    ObjectStat,
    ObjectWriter,
    checked_leftover,
    checked_path,
    checked_range,
    is_abandoned,
    is_path,
    is_swept,
    is_temporary,
    probe,
    range_bytes,
    temporary_name,
)
from pipeline.storage.counting import count
from pipeline.storage.range_reader import RangeReader
from pipeline.storage.remote_writer import FsspecWriter
from pipeline.storage.retrying import RetryPolicy
from pipeline.storage.s3_writer import S3Writer

_log = logging.getLogger(__name__)

# One request moves at most this much, so that the deadline of an attempt means something; chunks are smaller.
_REQUEST_BYTES = 64 << 20
# Whose files honour autocommit=False by an upload of their own; the others get a temporary name and a rename.
_DEFERRED = frozenset({"s3", "s3a", "gs", "gcs"})
# Whose pipe_file(mode="create") refuses when there is an object; others ignore it or look first themselves.
_EXCLUSIVE = frozenset({"gs", "gcs", "az", "abfs", "abfss"})
# Where backends say which version of an object this is; the first that is there decides.
_VERSION_FIELDS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
    "created",
)


class FsspecStore:
    """A prefix of anything fsspec can open.

    Args:
        url: With its scheme. Credentials in it are used and never shown.
        options: What the filesystem takes beside the URL.
        retry: How long requests are tried.
    """

    def __init__(self, url: str, options: Mapping[str, object], retry: RetryPolicy | None = None) -> None:
        self._backend = Backend(url, options, retry or RetryPolicy())
        self._deferred = self._backend.scheme in _DEFERRED
        self._ranges = RangeReader(self._backend)

    @property
    def url(self) -> str:
        """Scheme and prefix, without credentials."""
        return self._backend.url

    @property
    def is_local(self) -> bool:
        """False."""
        return False

    def location(self, path: str = "") -> str:
        """See `Store`."""
        return self._backend.location(path)

    def stat(self, path: str) -> ObjectStat:
        """See `Store`; the version is the backend's ETag, generation or time, whichever it has."""
        full = self._backend.full(path)

        def request(seconds: float) -> ObjectStat:
            info = self._backend.call("info", full, seconds=seconds)
            if info.get("type") == "directory":
                raise IsADirectoryError(full)
            if not isinstance(info.get("size"), int):
                # A fault that lasts, by its number.
                raise OSError(errno.EINVAL, "the server does not tell the size")
            version = next((info[field] for field in _VERSION_FIELDS if info.get(field)), None)
            version = str(self._backend.fs.ukey(full)) if version is None else f"{version}-{info['size']}"
            return ObjectStat(size_bytes=info["size"], version=version)

        return self._backend.attempt("read", path, request)

    def exists(self, path: str) -> bool:
        """See `Store`."""
        try:
            self.stat(path)
        except MissingObject:
            return False
        return True

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """See `Store`."""
        return tuple(sorted(path for path in self._below(prefix) if not is_temporary(path)))

    def leftovers(self) -> tuple[Leftover, ...]:
        """See `Store`; where the backend has uploads but tells nothing of them, as GCS, they are missing here."""
        names = [path for path in self._below("") if is_temporary(path) and is_path(path)]
        found = list(remote_leftovers.temporaries(self._backend, names))
        for upload in remote_leftovers.uploads(self._backend):
            leftover = remote_leftovers.as_leftover(self._backend, upload)
            found += [leftover] if leftover else []
        return tuple(sorted(found, key=lambda leftover: (leftover.path, leftover.handle)))

    def remove_leftover(self, leftover: Leftover) -> None:
        """See `Store`."""
        checked_leftover(leftover)
        if leftover.kind == "temporary":
            self.delete(leftover.path)
        else:
            remote_leftovers.abort(self._backend, leftover.path, leftover.handle)

    def sweep(self) -> int:
        """See `Store`; uploads that may not be listed stay, and the log says so."""
        abandoned = [path for path in self._below("") if is_swept(path) and is_abandoned(path)]
        for path in abandoned:
            self.delete(path)
        prefix = self._backend.bucket.prefix if self._backend.bucket else ""
        try:
            found = ((one.key.removeprefix(prefix), one.upload_id) for one in remote_leftovers.uploads(self._backend))
            uploads = [(path, upload_id) for path, upload_id in found if is_swept(path)]
            for path, upload_id in uploads:
                remote_leftovers.abort(self._backend, path, upload_id)
        except StorageError as error:
            # They cost room, no more: a merge does not end for them.
            _log.warning("unfinished uploads stay: %s", error)
            return len(abandoned)
        return len(abandoned) + len(uploads)

    def _below(self, prefix: str) -> Iterator[str]:
        prefix = checked_path(prefix, folder=True)
        folder = f"{self._backend.root}/{prefix}" if prefix else self._backend.root

        def request(seconds: float) -> list[str]:
            # Another process may have written since.
            self._backend.fs.invalidate_cache()
            if self._backend.is_http:
                # find() takes a refusal for an empty folder.
                self._backend.call("ls", folder + self._backend.suffix, seconds=seconds, detail=False)
            return [str(name) for name in self._backend.call("find", folder + self._backend.suffix, seconds=seconds)]

        try:
            names = self._backend.attempt("list", prefix, request)
        except MissingObject:
            if self._backend.is_http:
                raise StorageError(_no_index(self.location(prefix))) from None
            return
        # Elsewhere a question mark is part of a name.
        inside = (unquote(name.partition("?")[0]) for name in names) if self._backend.is_http else iter(names)
        yield from (
            name[len(self._backend.root) + 1 :] for name in inside if name.startswith(folder + "/") and name[-1] != "/"
        )

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Store`; all bytes of a whole object are of one version, also while others replace it."""
        checked_range(path, start, stop)
        if start == 0 and stop is None:
            return self._ranges.read_all(path)
        if stop is None or start == stop:
            stop = start + range_bytes(self.location(path), start, stop, self.stat(path).size_bytes)
        if stop - start <= _REQUEST_BYTES:
            return self._ranges.read(path, start, stop - start) if stop > start else b""
        buffer = bytearray(stop - start)
        self.read_into(path, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, start: int, *buffers: memoryview) -> None:
        """See `Store`."""
        checked_range(path, start, None)
        for request in _requests([buffer.cast("B") for buffer in buffers if buffer.nbytes]):
            self._ranges.read_into(path, start, request)
            start += sum(map(len, request))

    def write(self, path: str, data: bytes) -> None:
        """See `Store`."""
        full = self._backend.full(path)

        def request(seconds: float) -> None:
            if self._deferred:
                # These stores put an object in one step anyway, by one request where a streamed one needs three.
                self._backend.call("pipe_file", full, data, seconds=seconds)
                return
            with self._streamed(path) as writer:
                writer.write_raw(data)
                writer.commit_raw()

        self._backend.attempt("write", path, request)
        count(written_bytes=len(data))

    def create(self, path: str, data: bytes) -> bool:
        """See `Store`; a server that ignores the condition, as some do, is no better than one that has none."""
        if self.exists(path):
            return False
        if self._backend.bucket is not None:
            create = partial(self._backend.bucket.create, self._backend.key(path), data, secrets.token_hex(16))
        elif self._backend.scheme in _EXCLUSIVE:
            create = partial(self._put_exclusively, self._backend.full(path), data)
        else:
            self.write(path, data)
            return True
        created = self._backend.attempt("write", path, create)
        count(written_bytes=len(data) if created else 0)
        return created

    def _put_exclusively(self, full: str, data: bytes, seconds: float) -> bool:
        try:
            self._backend.call("pipe_file", full, data, seconds=seconds, mode="create")
        except FileExistsError:
            return False
        return True

    def open_writer(self, path: str) -> ObjectWriter:
        """See `Store`; on S3 every request is repeated as others are, elsewhere the backend's own retries guard it."""
        if self._backend.bucket is not None:
            return S3Writer(
                self._backend.bucket, self._backend.key(path), partial(self._backend.attempt, "write", path)
            )
        with self._backend.translated("write", path):
            return self._streamed(path)

    def _streamed(self, path: str) -> FsspecWriter:
        target = self._backend.full(path)
        temporary = target if self._deferred else self._backend.full(temporary_name(path))
        if not self._deferred:
            self._backend.fs.makedirs(temporary.rpartition("/")[0], exist_ok=True)
        return FsspecWriter(self._backend.fs, target, temporary, lambda: self._backend.translated("write", path))

    def delete(self, path: str) -> None:
        """See `Store`."""
        full = self._backend.full(path)
        try:
            self._backend.attempt("delete", path, lambda seconds: self._backend.call("rm_file", full, seconds=seconds))
        except MissingObject:
            return

    def free_bytes(self) -> int | None:
        """See `Store`; unlimited as far as anyone says."""
        return None

    def probe_writable(self) -> None:
        """See `Store`."""
        probe(self)

    def close(self) -> None:
        """See `Store`; other connections belong to fsspec, which shares and closes them."""
        if self._backend.direct is not None:
            self._backend.direct.close()


def _requests(buffers: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """Yield the pieces of buffers that are filled together, in their order."""
    request: list[memoryview] = []
    room = _REQUEST_BYTES
    for buffer in buffers:
        rest = buffer
        while rest:
            request.append(rest[:room])
            rest, room = rest[room:], room - len(request[-1])
            if not room:
                yield request
                request, room = [], _REQUEST_BYTES
    if request:
        yield request


def _no_index(where: str) -> Problem:
    """Say that nobody can know which files a web server has there."""
    remedy = "let the server show its folders as pages of links, or use a folder or an object store"
    return Problem(what="cannot list: the server shows no such folder", where=where, remedy=remedy)
