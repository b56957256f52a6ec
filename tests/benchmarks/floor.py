"""What no merge can do without: read so many bytes of the inputs, write an output, make it durable.

    python floor.py THREADS BLOCK_BYTES READER WRITER FIRST_BYTES LAST_BYTES WRITE_BYTES OUTPUT INPUT…

reads FIRST_BYTES of the inputs in turn, then LAST_BYTES while it writes, and calls fsync. READER is "pread" or "mmap"
(mapped, then copied by the C library), WRITER "late" (through the page cache, left to fsync), "early" (the same, with
write-back begun at once) or "direct" (past the page cache). `tests.benchmarks.tuning` finds the fastest of them.

Owns nothing else; imports as little as a program can, so that its start-up does not count.
"""

import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

# A read or a write: its descriptor's place in the list, -1 for the output; offset; length.
_Task = tuple[int, int, int]
# Direct writes come in whole blocks of the disk.
_ALIGNED_BYTES = 4096
# The least that the kernel can lay on a huge page.
_HUGE_BYTES = 2 << 20
# Bytes after which write-back is begun: a second's worth is not gathered, nor is it begun for every block.
_EARLY_BYTES = 32 << 20
# From linux/fs.h.
_SYNC_FILE_RANGE_WRITE = 2


def run(settings: Sequence[str], amounts: Sequence[int], output: str, inputs: Sequence[str]) -> None:
    """Read and write as the module says.

    Args:
        settings: Threads, block bytes, reader, writer.
        amounts: Bytes read first, read while writing, written.
        output: The file to write.
        inputs: The files to read.
    """
    threads, block, reader, writer = int(settings[0]), int(settings[1]), settings[2], settings[3]
    first, last, writes = amounts
    files = [os.open(path, os.O_RDONLY) for path in inputs]
    sizes = [os.fstat(file).st_size for file in files]
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if writer == "direct" else 0)
    target = os.open(output, flags)
    before = list(_reads(sizes, block, first))
    during = list(_spread(list(_reads(sizes, block, last)), list(_writes(block, writes))))
    write = _early(target) if writer == "early" else lambda view, offset: os.pwrite(target, view, offset)
    read = _mapped(files, sizes) if reader == "mmap" else lambda at, view, offset: os.preadv(files[at], [view], offset)
    for tasks in (before, during):
        _work(threads, block, iter(tasks), read, write)
    os.ftruncate(target, writes)
    os.fsync(target)


def _work(
    threads: int,
    block: int,
    tasks: Iterator[_Task],
    read: Callable[[int, memoryview, int], int],
    write: Callable[[memoryview, int], int],
) -> None:
    """Do all tasks, each thread with a buffer of its own that stays near its core."""
    failed: list[BaseException] = []

    def work() -> None:
        buffer = mmap.mmap(-1, max(block, _HUGE_BYTES))
        buffer.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(buffer)
        view[:8] = b"\1" * 8
        try:
            # Taking the next of a list's iterator is one step under the interpreter's lock.
            for at, offset, length in tasks:
                done = write(view[:length], offset) if at < 0 else read(at, view[:length], offset)
                if done != length:
                    raise OSError(f"{done} of {length} bytes")
        except BaseException as error:
            failed.append(error)

    others = [threading.Thread(target=work) for _ in range(threads - 1)]
    for other in others:
        other.start()
    work()
    for other in others:
        other.join()
    if failed:
        raise failed[0]


def _reads(sizes: Sequence[int], block: int, total: int) -> Iterator[_Task]:
    """Yield the blocks of the inputs, round and round, up to a total."""
    while total > 0:
        for at, size in enumerate(sizes):
            for offset in range(0, size, block):
                length = min(block, size - offset, total)
                if length <= 0:
                    return
                yield at, offset, length
                total -= length


def _writes(block: int, total: int) -> Iterator[_Task]:
    """Yield the blocks of the output, the last one up to a whole block of the disk."""
    total = -(-total // _ALIGNED_BYTES) * _ALIGNED_BYTES
    return ((-1, offset, min(block, total - offset)) for offset in range(0, total, block))


def _spread(reads: Sequence[_Task], writes: Sequence[_Task]) -> Iterator[_Task]:
    """Yield both, the writes evenly between the reads."""
    done = 0
    for number, task in enumerate(writes, start=1):
        upto = len(reads) * number // len(writes)
        yield from chain(reads[done:upto], (task,))
        done = upto
    yield from reads[done:]


def _early(target: int) -> Callable[[memoryview, int], int]:
    """Return a writer that begins write-back of what it has written now and then."""
    import ctypes

    begin = ctypes.CDLL(None).sync_file_range
    begin.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    begun = 0

    def write(view: memoryview, offset: int) -> int:
        nonlocal begun
        done = os.pwrite(target, view, offset)
        if offset - begun >= _EARLY_BYTES:
            start, begun = begun, offset
            begin(target, start, offset - start, _SYNC_FILE_RANGE_WRITE)
        return done

    return write


def _mapped(files: Sequence[int], sizes: Sequence[int]) -> Callable[[int, memoryview, int], int]:
    """Return a reader that copies from maps of the files."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
    libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    maps = [
        libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0) for file, size in zip(files, sizes, strict=True)
    ]

    def read(at: int, view: memoryview, offset: int) -> int:
        libc.memcpy(ctypes.addressof(ctypes.c_char.from_buffer(view)), maps[at] + offset, len(view))
        return len(view)

    return read


if __name__ == "__main__":
    run(sys.argv[1:5], [int(amount) for amount in sys.argv[5:8]], sys.argv[8], sys.argv[9:])
