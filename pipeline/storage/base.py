"""What a store is: the protocol both implementations keep, and the rules for paths inside it.

Owns `Store`, `ObjectWriter`, `ObjectStat`, `Leftover`, `MissingObject`, path checking, and the shape of temporary
names. Must not know any backend.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

from pipeline.errors import Problem, StorageError

# Where a merge keeps what is its own, inside of its output.
_RUN_FOLDER = "_geomerge"
# Hidden, unique per process and attempt, and recognisable: a crashed run leaves such names, and no listing shows them.
_TEMPORARY = re.compile(r"\..*\.(?P<process>[0-9]+)-[0-9a-f]{16}\.part")


class MissingObject(StorageError):  # noqa: N818 - reads as the fact it states
    """There is no object at this path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStat:
    """What is known of an object without reading it.

    Attributes:
        size_bytes: Its size.
        version: Opaque text that changes when the object is replaced.
    """

    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """What a writer that did not finish has in a store: nobody sees it, and it takes room.

    Attributes:
        kind: An unfinished multipart upload, or an object under a temporary name.
        path: Relative: of the object that the upload was for; of the temporary object itself.
        size_bytes: What it takes; None when the backend does not say.
        started_s: When it began, seconds since 1970; of a temporary object, when it was last written. None: unknown.
        handle: By which the backend knows the upload; "" for a temporary object.
    """

    kind: Literal["upload", "temporary"]
    path: str
    size_bytes: int | None = None
    started_s: float | None = None
    handle: str = ""


class ObjectWriter(Protocol):
    """A streamed object, invisible until `commit`. Not thread-safe.

    As a context manager it aborts unless `commit` was called, so that a failing body publishes nothing.
    """

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""

    def commit(self) -> None:
        """Make the object visible, whole; a second call does nothing.

        Raises:
            StorageError: The bytes could not be made durable, or the writer was aborted before.
        """

    def abort(self) -> None:
        """Forget everything written; does nothing after `commit` or `abort`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None: ...


class Store(Protocol):
    """One URL prefix. Paths are relative and "/"-separated; every method may be called from any thread.

    Attributes:
        url: The prefix without credentials and trailing slash; `open_store(url)` opens the same place elsewhere.
        is_local: Whether it is a folder of this machine.
    """

    @property
    def url(self) -> str:
        """See above."""

    @property
    def is_local(self) -> bool:
        """See above."""

    def location(self, path: str = "") -> str:
        """Return where a path is, for messages: no credentials in it."""

    def stat(self, path: str) -> ObjectStat:
        """Return an object's size and version.

        Raises:
            MissingObject: There is none; a folder is none.
            StorageError: The backend failed.
        """

    def exists(self, path: str) -> bool:
        """Return whether there is an object (a folder is none)."""

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Return the paths of all objects below a folder, recursive, sorted; () when it is absent or an object.

        Args:
            prefix: The folder, relative; "" for all. Temporary names of this room are left out.
        """

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop) of an object, or to its end.

        Raises:
            MissingObject: There is no object.
            StorageError: The range goes beyond the end, or the backend failed.
        """

    def read_into(self, path: str, start: int, *buffers: memoryview) -> None:
        """Fill whole writable buffers with the bytes from `start` on, one behind the other; raises as `read` does."""

    def write(self, path: str, data: bytes) -> None:
        """Put an object in one step: visible whole or not at all."""

    def create(self, path: str, data: bytes) -> bool:
        """Put an object in one step unless there is one, and return whether this call put it.

        Of several at once exactly one succeeds: in folders, on S3 servers that know If-None-Match, and where the
        backend has an operation for it. Elsewhere it looks first and writes then: two at the same moment both succeed.
        """

    def open_writer(self, path: str) -> ObjectWriter:
        """Begin a streamed object; nothing is visible before its `commit`."""

    def delete(self, path: str) -> None:
        """Remove an object; no error when there is none."""

    def leftovers(self) -> tuple[Leftover, ...]:
        """Return what unfinished writers have below the prefix, those that still write included, sorted by path.

        Raises:
            StorageError: The backend refuses to list it.
        """

    def remove_leftover(self, leftover: Leftover) -> None:
        """Remove one of `leftovers()`; no error when it is gone already. A writer that still needs it fails."""

    def sweep(self) -> int:
        """Remove what killed writers of a merge left, and return how much that was; for the one who owns the output.

        Only names directly in the folder and below `_geomerge/`: what else lies there may be another merge's. Objects
        under temporary names go unless a process of this machine still writes them, unfinished multipart uploads go
        always.
        """

    def free_bytes(self) -> int | None:
        """Return the bytes that can still be written; None when unknown or unlimited."""

    def probe_writable(self) -> None:
        """Write, read back and delete a marker.

        Raises:
            StorageError: One of the three failed; the text names the folder.
        """

    def close(self) -> None:
        """Release what is held open; the store may be used again afterwards."""


def checked_path(path: str, *, folder: bool = False) -> str:
    """Return a relative path that stays inside its store.

    Args:
        path: "/"-separated; not absolute, no empty, "." or ".." part, no NUL, no backslash.
        folder: Whether "" (the whole store) and a trailing slash are allowed.

    Raises:
        StorageError: The path breaks one of these rules.
    """
    stripped = path.removesuffix("/") if folder else path
    if folder and not stripped and path in ("", "/"):
        return ""
    if any(part in ("", ".", "..") for part in stripped.split("/")) or "\0" in stripped or "\\" in stripped:
        raise StorageError(
            Problem(
                what=f"{path!r} is no path inside a store",
                remedy="write it relative, with single slashes, without '.' and '..'",
            )
        )
    return stripped


def is_path(path: str) -> bool:
    """Return whether `checked_path` takes a path; object stores have keys that it does not."""
    try:
        checked_path(path)
    except StorageError:
        return False
    return True


def is_swept(path: str) -> bool:
    """Return whether `Store.sweep` may touch a path: a merge writes there, and no other below the same prefix does."""
    return is_path(path) and ("/" not in path or path.startswith(f"{_RUN_FOLDER}/"))


def checked_range(path: str, start: int, stop: int | None) -> None:
    """Raise ValueError for a range that no object can have: a caller's mistake, not the store's."""
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"{path}: [{start}, {stop}) is no byte range")


def range_bytes(where: str, start: int, stop: int | None, size_bytes: int) -> int:
    """Return the length of [start, stop), or to the end, of an object of this size; a StorageError when it has less."""
    if stop is None and start > size_bytes:
        raise short_read(where, start, 1, 0)
    end = size_bytes if stop is None else stop
    if start < end and end > size_bytes:
        raise short_read(where, start, end - start, max(size_bytes - start, 0))
    return end - start


def temporary_name(path: str) -> str:
    """Return a hidden, unique path in the same folder, under which an object can grow."""
    folder, _, name = path.rpartition("/")
    hidden = f".{name}.{os.getpid()}-{secrets.token_hex(8)}.part"
    return f"{folder}/{hidden}" if folder else hidden


def is_abandoned(path: str) -> bool:
    """Return whether a temporary name belongs to no process that runs on this machine."""
    match = _TEMPORARY.fullmatch(path.rpartition("/")[2])
    if match is None or int(match["process"]) == os.getpid():
        return False
    try:
        os.kill(int(match["process"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def is_temporary(path: str) -> bool:
    """Return whether `temporary_name` made this path."""
    return _TEMPORARY.fullmatch(path.rpartition("/")[2]) is not None


def checked_leftover(leftover: Leftover) -> Leftover:
    """Return what may be removed; ValueError for a visible object or an upload that nobody named."""
    known = is_temporary(leftover.path) if leftover.kind == "temporary" else bool(leftover.handle)
    if not known:
        raise ValueError(f"{leftover.path} is no leftover")
    return leftover


def short_read(where: str, start: int, wanted_bytes: int, got_bytes: int, remedy: str | None = None) -> StorageError:
    """Return the error of a read that ended early."""
    return StorageError(
        Problem(
            what=f"wanted {wanted_bytes} bytes from offset {start}, got {got_bytes}",
            where=where,
            remedy=remedy or "the file is shorter than its header or its index says: fetch it again",
        )
    )


def probe(store: Store) -> None:
    """Do the work of `Store.probe_writable` with the other methods of a store."""
    path, marker = temporary_name("probe"), secrets.token_bytes(16)
    try:
        try:
            store.write(path, marker)
            intact = store.read(path) == marker
            store.delete(path)
        except (KeyboardInterrupt, SystemExit):
            # A signal, which may come at any moment.
            with suppress(StorageError):
                store.delete(path)
            raise
    except StorageError as error:
        problem = Problem(
            what=f"cannot be written: {error}",
            where=store.location(),
            remedy="choose a folder that you may write, read and delete in",
        )
        raise StorageError(problem) from error
    if not intact:
        raise StorageError(Problem(what="gave back other bytes than were written", where=store.location()))
