"""Object stores and everything else that fsspec opens.

Owns the dealings with fsspec: settings, ranges with a length check, error translation. The only module that imports
fsspec. Must not know local folders.
"""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from pipeline.errors import Problem, StorageError
from pipeline.storage.base import (
    MissingObject,
    ObjectStat,
    checked_path,
    checked_range,
    is_abandoned,
    is_temporary,
    probe,
    range_bytes,
    short_read,
    temporary_name,
)
from pipeline.storage.redaction import redacted, secrets_of, shown_url
from pipeline.storage.remote_writer import FsspecWriter
from pipeline.storage.retrying import RetryPolicy, backend_errors, cause_of

_Result = TypeVar("_Result")

# One request moves at most this much, so that the deadline of an attempt means something; chunks are smaller.
_REQUEST_BYTES = 64 << 20
# Whose files honour autocommit=False by a multipart upload; the others get a temporary name and a rename.
_DEFERRED = frozenset({"s3", "s3a", "gs", "gcs"})
# s3fs's own defaults hang for minutes on a dead connection and cache listings that other workers change.
_S3_CONFIG: Mapping[str, object] = {
    "connect_timeout": 5,
    "read_timeout": 30,
    "retries": {"max_attempts": 2, "mode": "standard"},
    "max_pool_connections": 64,
}
# s3fs repeats on top of botocore, and we on top of s3fs.
_S3_RETRIES = 3
# What wrong options raise, some backends only when they first connect.
_MISTAKES = (TypeError, ValueError)
# Where backends say which version of an object this is; the first that is there decides.
_VERSION_FIELDS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "created")


class FsspecStore:
    """A prefix of anything fsspec can open.

    Args:
        url: With its scheme. Credentials in it are used and never shown.
        options: What the filesystem takes beside the URL.
        retry: How long requests are tried.
    """

    def __init__(self, url: str, options: Mapping[str, object], retry: RetryPolicy | None = None) -> None:
        self._url = shown_url(url)
        self._secrets = secrets_of(url, options)
        self._retry = retry or RetryPolicy()
        base, mark, query = url.partition("?")
        protocol = base.partition(":")[0].lower()
        is_http = protocol in ("http", "https")
        if mark and not is_http:
            raise StorageError(Problem(what="a query has no meaning here", where=self._url, remedy="leave out '?…'"))
        # A signed HTTP URL carries its signature behind every path.
        self._suffix = mark + query
        is_s3 = protocol in ("s3", "s3a")
        try:
            self._fs, root = url_to_fs(base, **(_s3_settings(options) if is_s3 else options))
        except (*_MISTAKES, ImportError, OSError, RuntimeError) as error:
            raise self._error("open", self._url, error) from self._shown(error)
        self._root = str(root).rstrip("/")
        if is_s3:
            self._fs.retries = _S3_RETRIES
        self._deferred = protocol in _DEFERRED

    @property
    def url(self) -> str:
        """Scheme and prefix, without credentials."""
        return self._url

    @property
    def is_local(self) -> bool:
        """False."""
        return False

    def location(self, path: str = "") -> str:
        """See `Store`."""
        return f"{self._url.removesuffix('/')}/{path}" if path else self._url

    def _full(self, path: str) -> str:
        return f"{self._root}/{checked_path(path)}{self._suffix}"

    def stat(self, path: str) -> ObjectStat:
        """See `Store`; the version is the backend's ETag, generation or time, whichever it has."""
        full = self._full(path)

        def request(seconds: float) -> ObjectStat:
            info = self._call("info", full, seconds=seconds)
            if info.get("type") == "directory":
                raise IsADirectoryError(full)
            if not isinstance(info.get("size"), int):
                raise OSError(f"{self.location(path)}: the server does not tell the size")
            version = next((info[field] for field in _VERSION_FIELDS if info.get(field)), None)
            version = str(self._fs.ukey(full)) if version is None else f"{version}-{info['size']}"
            return ObjectStat(size_bytes=info["size"], version=version)

        return self._attempt("read", path, request)

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

    def sweep(self) -> int:
        """See `Store`; unfinished multipart uploads are not objects and stay."""
        abandoned = [path for path in self._below("") if is_abandoned(path)]
        for path in abandoned:
            self.delete(path)
        return len(abandoned)

    def _below(self, prefix: str) -> Iterator[str]:
        prefix = checked_path(prefix, folder=True)
        folder = f"{self._root}/{prefix}" if prefix else self._root

        def request(seconds: float) -> list[str]:
            # Another process may have written since.
            self._fs.invalidate_cache()
            return [str(name) for name in self._call("find", folder + self._suffix, seconds=seconds)]

        try:
            names = self._attempt("read", prefix, request)
        except MissingObject:
            return
        inside = (name.partition("?")[0] for name in names)
        yield from (name[len(self._root) + 1 :] for name in inside if name.startswith(folder + "/") and name[-1] != "/")

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Store`."""
        checked_range(path, start, stop)
        if stop is None or start == stop:
            stop = start + range_bytes(self.location(path), start, stop, self.stat(path).size_bytes)
        if stop - start <= _REQUEST_BYTES:
            return self._piece(path, start, stop - start) if stop > start else b""
        buffer = bytearray(stop - start)
        self.read_into(path, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """See `Store`."""
        checked_range(path, start, None)
        target = buffer.cast("B") if buffer.nbytes else memoryview(b"")
        for done in range(0, len(target), _REQUEST_BYTES):
            count = min(_REQUEST_BYTES, len(target) - done)
            target[done : done + count] = self._piece(path, start + done, count)

    def _piece(self, path: str, start: int, wanted_bytes: int) -> bytes:
        """Return one range by one request, its length checked: stores cut a range at the end without a word."""
        full = self._full(path)

        def request(seconds: float) -> bytes:
            try:
                data = bytes(self._call("cat_file", full, seconds=seconds, start=start, end=start + wanted_bytes))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # How S3 answers a range that begins beyond the end.
                return b""
            if len(data) > wanted_bytes:
                raise OSError("the server ignores ranges")
            return data

        data = self._attempt("read", path, request)
        if len(data) != wanted_bytes:
            raise short_read(self.location(path), start, wanted_bytes, len(data))
        return data

    def write(self, path: str, data: bytes) -> None:
        """See `Store`."""
        full = self._full(path)

        def request(seconds: float) -> None:
            if self._deferred:
                # These stores put an object in one step anyway, by one request where a streamed one needs three.
                self._call("pipe_file", full, data, seconds=seconds)
                return
            with self._begin(path) as writer:
                writer.write_raw(data)
                writer.commit_raw()

        self._attempt("write", path, request)

    def open_writer(self, path: str) -> FsspecWriter:
        """See `Store`; the backend's own retries guard each part."""
        with self._translated("write", path):
            return self._begin(path)

    def _begin(self, path: str) -> FsspecWriter:
        target = self._full(path)
        temporary = target if self._deferred else self._full(temporary_name(path))
        if not self._deferred:
            self._fs.makedirs(temporary.rpartition("/")[0], exist_ok=True)
        return FsspecWriter(self._fs, target, temporary, lambda: self._translated("write", path))

    def delete(self, path: str) -> None:
        """See `Store`."""
        full = self._full(path)
        try:
            self._attempt("delete", path, lambda seconds: self._call("rm_file", full, seconds=seconds))
        except MissingObject:
            return

    def free_bytes(self) -> int | None:
        """See `Store`; unlimited as far as anyone says."""
        return None

    def probe_writable(self) -> None:
        """See `Store`."""
        probe(self)

    def close(self) -> None:
        """See `Store`; connections belong to fsspec, which shares and closes them."""

    def _call(self, verb: str, *positional: object, seconds: float, **arguments: object) -> Any:
        """Call a method of the filesystem, with a time limit where it understands one."""
        method = getattr(self._fs, verb)
        # Asynchronous backends wrap coroutines; the wrapper takes the limit and cancels the request.
        if inspect.iscoroutinefunction(getattr(method, "__wrapped__", None)):
            arguments["timeout"] = seconds
        return method(*positional, **arguments)

    def _attempt(self, verb: str, path: str, request: Callable[[float], _Result]) -> _Result:
        with self._translated(verb, path):
            return self._retry.run(request)

    @contextmanager
    def _translated(self, verb: str, path: str) -> Iterator[None]:
        try:
            yield
        except self._foreign_errors() as error:
            raise self._error(verb, self.location(path), error) from self._shown(error)

    @staticmethod
    def _foreign_errors() -> tuple[type[BaseException], ...]:
        return (*backend_errors(), *_MISTAKES)

    def _shown(self, error: BaseException) -> BaseException | None:
        """Return the error to chain; none when its own text could give credentials away."""
        return None if self._secrets else error

    def _error(self, verb: str, where: str, error: BaseException) -> StorageError:
        cause = redacted(cause_of(error), self._secrets)
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) and verb != "write":
            return MissingObject(Problem(what="does not exist", where=where, remedy="check the path"))
        remedy = "check the address, the network and the credentials, then run again"
        if isinstance(error, PermissionError):
            remedy = "check the credentials and what they allow"
        elif isinstance(error, RuntimeError):
            remedy = "this kind of URL may not support it: use a folder or an object store"
        elif isinstance(error, (*_MISTAKES, ImportError)):
            remedy = "check the URL's scheme, the storage options, and that the backend's package is installed"
        return StorageError(Problem(what=f"cannot {verb}: {cause}", where=where, remedy=remedy))


def _s3_settings(options: Mapping[str, object]) -> dict[str, object]:
    """Return the options for s3fs with our defaults below them."""
    config = options.get("config_kwargs")
    merged = {**_S3_CONFIG, **(config if isinstance(config, Mapping) else {})}
    return {"use_listings_cache": False, **options, "config_kwargs": merged}
