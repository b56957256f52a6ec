"""Folders of this machine.

Owns reading, listing and deleting there. Must not know fsspec, nor how files are written durably.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.storage.base import (
    Leftover,
    MissingObject,
    ObjectStat,
    checked_leftover,
    checked_path,
    checked_range,
    is_abandoned,
    is_swept,
    is_temporary,
    probe,
    range_bytes,
    short_read,
)
from pipeline.storage.counting import count
from pipeline.storage.descriptors import OpenFiles, require_regular
from pipeline.storage.local_errors import translated
from pipeline.storage.local_writer import LocalWriter, flat

# One preadv moves at most 2 GiB less a page; 1 GiB keeps clear of it and of signed 32-bit counts in filesystems.
_READ_BYTES = 1 << 30


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
        with translated(full, "read"):
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

    def leftovers(self) -> tuple[Leftover, ...]:
        """See `Store`."""
        found = []
        for path in sorted(path for path in self._below("") if is_temporary(path)):
            # Its writer may have finished meanwhile.
            with suppress(MissingObject), translated(self.location(path), "read"):
                status = Path(self._full(path)).stat()
                found.append(
                    Leftover(kind="temporary", path=path, size_bytes=status.st_size, started_s=status.st_mtime)
                )
        return tuple(found)

    def remove_leftover(self, leftover: Leftover) -> None:
        """See `Store`."""
        self.delete(checked_leftover(leftover).path)

    def sweep(self) -> int:
        """See `Store`."""
        abandoned = [path for path in self._below("") if is_swept(path) and is_abandoned(path)]
        for path in abandoned:
            self.delete(path)
        return len(abandoned)

    def _below(self, folder: str) -> Iterator[str]:
        full = self.location(folder)
        try:
            with translated(full, "read"), os.scandir(full) as scan:
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
        with translated(full, "read"), self._files.use(full) as descriptor:
            wanted_bytes = range_bytes(full, start, stop, os.fstat(descriptor).st_size)
            if wanted_bytes <= _READ_BYTES:
                data = os.pread(descriptor, wanted_bytes, start)
                if len(data) == wanted_bytes:
                    count(requests=1, read_bytes=wanted_bytes)
                    return data
        buffer = bytearray(wanted_bytes)
        self.read_into(path, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: str, start: int, *buffers: memoryview) -> None:
        """See `Store`."""
        checked_range(path, start, None)
        full = self._full(path)
        with translated(full, "read"), self._files.use(full) as descriptor:
            for buffer in buffers:
                target, done = flat(buffer), 0
                while done < len(target):
                    got_bytes = os.preadv(descriptor, [target[done : done + _READ_BYTES]], start + done)
                    count(requests=1, read_bytes=got_bytes)
                    if not got_bytes:
                        raise short_read(full, start, len(target), done)
                    done += got_bytes
                start += done

    def write(self, path: str, data: bytes) -> None:
        """See `Store`; on disk when it returns."""
        with self.open_writer(path) as writer:
            writer.write(data)
            writer.commit()

    def create(self, path: str, data: bytes) -> bool:
        """See `Store`; on disk when it returns True."""
        with self.open_writer(path) as writer:
            writer.write(data)
            return writer.create()

    def open_writer(self, path: str) -> LocalWriter:
        """See `Store`; folders are made as needed."""
        return LocalWriter(self._full(path))

    def delete(self, path: str) -> None:
        """See `Store`."""
        full = self._full(path)
        with translated(full, "delete"), suppress(FileNotFoundError, NotADirectoryError):
            Path(full).unlink()

    def free_bytes(self) -> int | None:
        """See `Store`: what an ordinary user may still write to this disk."""
        existing = next(folder for folder in (Path(self._folder), *Path(self._folder).parents) if folder.exists())
        with translated(str(existing), "measure"):
            disk = os.statvfs(existing)
        return disk.f_bavail * disk.f_frsize

    def probe_writable(self) -> None:
        """See `Store`."""
        probe(self)

    def close(self) -> None:
        """See `Store`."""
        self._files.close()
