"""Files of this machine that appear whole.

Owns temporary names, durability (early write-back, fsync) and the step that publishes: rename, or link where nobody may
have the name. Must not know stores.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import Problem, StorageError
from pipeline.storage.base import temporary_name
from pipeline.storage.counting import count
from pipeline.storage.local_errors import translated
from pipeline.storage.page_cache import start_write_back

_log = logging.getLogger(__name__)

# One write moves at most 2 GiB less a page; 1 GiB keeps clear of it and of signed 32-bit counts in filesystems.
_WRITE_BYTES = 1 << 30
# Bytes after which the disk is told to begin: of a file of 0.8 GB then 0.02 s of fsync are left instead of 0.4. Telling
# it four times as often changed nothing.
_WRITE_BACK_BYTES = 32 << 20
# How filesystems without hard links answer: FAT, some network and user-space ones.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# Hidden files of this process that are neither published nor removed: the exception that a signal raises may come
# between making one and handing its writer over.
_unfinished: set[str] = set()


class LocalWriter:
    """A file that grows under a hidden name beside its final one.

    Args:
        target: The absolute path to appear at commit.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._temporary = temporary_name(target)
        self._state = "open"
        self._written_bytes = self._begun_bytes = 0
        with translated(target, "write"):
            _make_folders(Path(target).parent)
            # Mode 0666 less the umask, as any program's new file: others may have to read the model.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            _unfinished.add(self._temporary)
            self._descriptor = os.open(self._temporary, flags, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        """See `ObjectWriter`."""
        self._require_open()
        rest = flat(memoryview(data))
        with translated(self._target, "write"):
            while rest:
                done = os.write(self._descriptor, rest[:_WRITE_BYTES])
                count(requests=1, written_bytes=done)
                rest = rest[done:]
                self._written_bytes += done
            if self._written_bytes - self._begun_bytes >= _WRITE_BACK_BYTES:
                start_write_back(self._descriptor, self._begun_bytes, self._written_bytes)
                self._begun_bytes = self._written_bytes

    def commit(self) -> None:
        """See `ObjectWriter`; data and name are on disk when it returns."""
        if self._state == "committed":
            return
        self._require_open()
        try:
            with translated(self._target, "write"):
                os.fsync(self._descriptor)
                os.replace(self._temporary, self._target)  # noqa: PTH105
        except StorageError:
            self.abort()
            raise
        self._state = "committed"
        _unfinished.discard(self._temporary)
        with translated(self._target, "write"):
            os.close(self._descriptor)
            _sync_folder(Path(self._target).parent)

    def create(self) -> bool:
        """As `commit`, but only where nothing has the name yet; return whether it had none.

        Raises:
            StorageError: The bytes could not be made durable, or a folder has the name.
        """
        self._require_open()
        try:
            with translated(self._target, "write"):
                os.fsync(self._descriptor)
                created = _linked(self._temporary, self._target)
                if created:
                    _sync_folder(Path(self._target).parent)
                elif Path(self._target).is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        finally:
            self.abort()
        return created

    def abort(self) -> None:
        """See `ObjectWriter`; the hidden file is removed."""
        if self._state != "open":
            return
        self._state = "aborted"
        try:
            os.close(self._descriptor)
            Path(self._temporary).unlink(missing_ok=True)
            _unfinished.discard(self._temporary)
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


@atexit.register
def _remove_unfinished() -> None:
    """Remove what is left when the process ends in order."""
    for path in _unfinished:
        with suppress(OSError):
            Path(path).unlink(missing_ok=True)


def flat(view: memoryview) -> memoryview:
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


def _linked(source: str, target: str) -> bool:
    """Give a file a second name, which nobody has yet; return whether that was so."""
    try:
        os.link(source, target)
    except FileExistsError:
        # A network filesystem that lost its reply asked again: the name may be of this very file.
        return os.stat(source).st_nlink > 1  # noqa: PTH116
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _copied(source, target)
    return True


def _copied(source: str, target: str) -> bool:
    """As `_linked`, where files have one name only: exclusive too, but a reader may see the beginning alone."""
    content = Path(source).read_bytes()
    try:
        with Path(target).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True
