"""What the operating system does with the pages of files: how many stay in memory, and when they reach the disk.

Owns the calls of Linux for that. Elsewhere nothing is known and nothing is begun early. Must not know stores.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

# Start to write pages that are dirty and on no way to the disk yet; do not wait for any.
_SYNC_FILE_RANGE_WRITE = 2
# What says that early write-back is not to be had here: another system, a filesystem without it, a sandbox's filter.
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
# Where a control group's limit on memory, file pages included, is stated: version 2, and the controller of version 1.
_LIMITS = {"": ("/sys/fs/cgroup", "memory.max"), "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")}


def start_write_back(descriptor: int, start: int, stop: int) -> None:
    """Let the disk begin with bytes that were written; fsync is needed all the same.

    Args:
        descriptor: Of the file.
        start: The first byte.
        stop: The byte after the last.

    Raises:
        OSError: The disk failed. One that fails later is told by fsync.
    """
    call = system_function("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if call is None or not call(descriptor, start, stop - start, _SYNC_FILE_RANGE_WRITE):
        return
    code = ctypes.get_errno()
    if code not in _NOT_HERE:
        raise OSError(code, os.strerror(code))


def page_cache_bytes() -> int:
    """Return how many bytes of files can stay in memory beside what programs hold now; 0 where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0
    return min([available, *_group_limits()])


def cached_share(path: str, ranges: Iterable[tuple[int, int]]) -> float:
    """Return which share of some bytes of a file is in memory now; 1 where it is not known, as of others' files.

    Args:
        path: The file.
        ranges: (start, stop); what lies beyond its end does not count.
    """
    resident = pages = 0
    with suppress(OSError, ValueError), Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start, stop in ((start, min(stop, size)) for start, stop in ranges if start < min(stop, size)):
            begin = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            # Private, because ctypes takes addresses of writable buffers only; nothing is written.
            with mmap.mmap(file.fileno(), stop - begin, flags=mmap.MAP_PRIVATE, offset=begin) as view:
                found = _resident(view)
            resident += sum(byte & 1 for byte in found)
            pages += len(found)
    return resident / pages if pages else 1.0


def _resident(view: mmap.mmap) -> bytes:
    """Return a byte for every page of a mapped file, whose lowest bit tells whether it is in memory."""
    call = system_function("mincore", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    vector = ctypes.create_string_buffer(-(-len(view) // mmap.PAGESIZE))
    held = ctypes.c_char.from_buffer(view)
    try:
        failed = call is None or call(ctypes.addressof(held), len(view), vector)
    finally:
        # A view that something points into cannot be closed.
        del held
    return b"" if failed else vector.raw


def _group_limits() -> Iterator[int]:
    """Yield the limits of the control groups that this process is in, and of those around them."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controller, inside = line.split(":", 2)
            if controller not in _LIMITS:
                continue
            root, name = _LIMITS[controller]
            folder = Path(root) / inside.lstrip("/")
            for place in (folder, *folder.parents):
                with suppress(OSError, ValueError):
                    yield int((place / name).read_text())


@functools.cache
def system_function(name: str, *arguments: type, short: bool = False) -> Callable[..., int] | None:
    """Return a function of the C library; None where it has none of that name.

    Args:
        name: Of the function.
        arguments: The types of its arguments.
        short: Whether it is over before another thread could take the interpreter's lock.
    """
    library = (ctypes.PyDLL if short else ctypes.CDLL)(None, use_errno=True) if os.name == "posix" else None
    found = getattr(library, name, None)
    if found is not None:
        found.argtypes, found.restype = arguments, ctypes.c_int
    return found
