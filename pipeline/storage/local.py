"""Folders of this machine.

Owns file descriptors, temporary names and durability (fsync, rename). Must not know fsspec.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

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
from pipeline.storage.descriptors import OpenFiles, require_regular

_log = logging.getLogger(__name__)

# One preadv moves at most 2 GiB less a page; 1 GiB keeps clear of it and of signed 32-bit counts in filesystems.
_READ_BYTES = 1 << 30
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free space or choose another folder",
    errno.EFBIG: "the limit on file sizes is reached: raise it (ulimit -f) or set a smaller pipeline: {file_size: ...}",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "the filesystem is read-only: choose another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk or network mount failed: check it and run again",
}
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


@contextmanager
def _translated(where: str, verb: str) -> Iterator[None]:
    """Turn OSError into StorageError: MissingObject when a read finds nothing."""
    try:
        yield
    except OSError as error:
        if verb == "read" and error.errno in _ABSENT:
            raise MissingObject(Problem(what="does not exist", where=where, remedy="check the path")) from error
        reason = error.strerror or type(error).__name__
        remedy = _REMEDIES.get(error.errno or 0, "")
        raise StorageError(Problem(what=f"cannot {verb}: {reason}", where=where, remedy=remedy)) from error


class LocalStore:
    """A folder. It need not exist before the first write.

    Args:
        folder: Absolute or relative to the working directory of now.
    """

    def __init__(self, folder: Path) -> None:
        # Resolves "..", keeps symbolic links as the user wrote them.
        self._folder = os.path.abspath(folder)  # noqa: PTH100
        self._files = OpenFiles()

    @property
    def url(self) -> str:
        """The absolute path."""
        return self._folder

    @property
    def is_local(self) -> bool:
        """True."""
        return True

    def location(self, path: str = "") -> str:
        """See `Store`."""
        return os.path.join(self._folder, path) if path else self._folder  # noqa: PTH118

    def _full(self, path: str) -> str:
        return os.path.join(self._folder, checked_path(path))  # noqa: PTH118 - a hot path

    def stat(self, path: str) -> ObjectStat:
        """See `Store`; the version is made of modification time, size and inode."""
        full = self._full(path)
        with _translated(full, "read"):
            status = Path(full).stat()
            require_regular(status, full)
        version = f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"
        return ObjectStat(size_bytes=status.st_size, version=version)

    def exists(self, path: str) -> bool:
        """See `Store`."""
        try:
            self.stat(path)
        except MissingObject:
            return False
        return True

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """See `Store`; links to files count as files, links to folders and dangling links are left out."""
        prefix = checked_path(prefix, folder=True)
        return tuple(sorted(path for path in self._below(prefix) if not is_temporary(path)))

    def sweep(self) -> int:
        """See `Store`."""
        abandoned = [path for path in self._below("") if is_abandoned(path)]
        for path in abandoned:
            self.delete(path)
        return len(abandoned)

    def _below(self, folder: str) -> Iterator[str]:
        full = self.location(folder)
        try:
            with _translated(full, "read"), os.scandir(full) as scan:
                entries = [(entry.name, entry.is_dir(follow_symlinks=False), entry.is_file()) for entry in scan]
        except MissingObject:
            return
        for name, is_folder, is_file in entries:
            path = f"{folder}/{name}" if folder else name
            if is_folder:
                yield from self._below(path)
            elif is_file:
                yield path

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Store`."""
        checked_range(path, start, stop)
        full = self._full(path)
        with _translated(full, "read"), self._files.use(full) as descriptor:
            wanted_bytes = range_bytes(full, start, stop, os.fstat(descriptor).st_size)
            if wanted_bytes <= _READ_BYTES:
                data = os.pread(descriptor, wanted_bytes, start)
                if len(data) == wanted_bytes:
                    return data
        buffer = bytearray(wanted_bytes)
        self.read_into(path, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """See `Store`."""
        checked_range(path, start, None)
        full = self._full(path)
        with _translated(full, "read"), self._files.use(full) as descriptor:
            target, done = _flat(buffer), 0
            while done < len(target):
                count = os.preadv(descriptor, [target[done : done + _READ_BYTES]], start + done)
                if not count:
                    raise short_read(full, start, len(target), done)
                done += count

    def write(self, path: str, data: bytes) -> None:
        """See `Store`; on disk when it returns."""
        with self.open_writer(path) as writer:
            writer.write(data)
            writer.commit()

    def open_writer(self, path: str) -> LocalWriter:
        """See `Store`; folders are made as needed."""
        return LocalWriter(self._full(path))

    def delete(self, path: str) -> None:
        """See `Store`."""
        full = self._full(path)
        with _translated(full, "delete"), suppress(FileNotFoundError, NotADirectoryError):
            Path(full).unlink()

    def free_bytes(self) -> int | None:
        """See `Store`: what an ordinary user may still write to this disk."""
        existing = next(folder for folder in (Path(self._folder), *Path(self._folder).parents) if folder.exists())
        with _translated(str(existing), "measure"):
            disk = os.statvfs(existing)
        return disk.f_bavail * disk.f_frsize

    def probe_writable(self) -> None:
        """See `Store`."""
        probe(self)

    def close(self) -> None:
        """See `Store`."""
        self._files.close()


class LocalWriter:
    """A file that grows under a hidden name beside its final one.

    Args:
        target: The absolute path to appear at commit.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._temporary = temporary_name(target)
        self._state = "open"
        with _translated(target, "write"):
            _make_folders(Path(target).parent)
            # Mode 0666 less the umask, as any program's new file: others may have to read the model.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self._temporary, flags, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        """See `ObjectWriter`."""
        self._require_open()
        rest = _flat(memoryview(data))
        with _translated(self._target, "write"):
            while rest:
                rest = rest[os.write(self._descriptor, rest[:_READ_BYTES]) :]

    def commit(self) -> None:
        """See `ObjectWriter`; data and name are on disk when it returns."""
        if self._state == "committed":
            return
        self._require_open()
        try:
            with _translated(self._target, "write"):
                os.fsync(self._descriptor)
                os.replace(self._temporary, self._target)  # noqa: PTH105
        except StorageError:
            self.abort()
            raise
        self._state = "committed"
        with _translated(self._target, "write"):
            os.close(self._descriptor)
            _sync_folder(Path(self._target).parent)

    def abort(self) -> None:
        """See `ObjectWriter`; the hidden file is removed."""
        if self._state != "open":
            return
        self._state = "aborted"
        try:
            os.close(self._descriptor)
            Path(self._temporary).unlink(missing_ok=True)
        except OSError as error:
            # An abort is on the way out of another error, which must not be hidden by this one.
            _log.warning("%s: could not be cleaned up: %s", self._temporary, error.strerror)

    def _require_open(self) -> None:
        if self._state != "open":
            raise StorageError(
                Problem(what=f"the writer is {self._state}, nothing more can be written", where=self._target)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.abort()


def _flat(view: memoryview) -> memoryview:
    """Return a view of bytes; memoryview refuses to cast shapes with a zero."""
    return view.cast("B") if view.nbytes else memoryview(b"")


def _sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folders(folder: Path) -> None:
    """Create a folder and its parents, each durable in its own parent."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
        _sync_folder(folder.parent)
