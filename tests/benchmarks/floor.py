"""What no merge can do without: read so many bytes of the inputs, write an output, make it durable.

    python -m tests.benchmarks.floor READ_BYTES WRITE_BYTES OUTPUT INPUT…

Owns nothing else; imports as little as a program can, so that its start-up does not count.
"""

from __future__ import annotations

import itertools
import os
import sys

# Long enough that system calls do not count, short enough to stay near the processor.
_BLOCK_BYTES = 8 << 20


def run(read_bytes: int, write_bytes: int, output: str, inputs: list[str]) -> None:
    """Read the inputs in turn, round and round, up to `read_bytes`; write `write_bytes`; fsync."""
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    files = [os.open(path, os.O_RDONLY) for path in inputs]
    for file in itertools.cycle(files):
        offset = 0
        while read_bytes > 0 and (count := os.preadv(file, [view[:read_bytes]], offset)):
            offset += count
            read_bytes -= count
        if read_bytes <= 0:
            break
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    while write_bytes > 0:
        write_bytes -= os.write(descriptor, view[:write_bytes])
    os.fsync(descriptor)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
