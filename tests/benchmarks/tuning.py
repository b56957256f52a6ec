"""The fastest way to read and write on this machine, found by trying.

Owns the choice of the floor's settings and the table of what was tried.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks import caches
from tests.benchmarks.contest import Figures, take

_FLOOR = str(Path(__file__).with_name("floor.py"))
_BLOCKS = (128 << 10, 256 << 10, 1 << 20, 2 << 20, 8 << 20)
_WRITERS = ("late", "early", "direct")
# Bytes that a trial reads and writes: long beside the interpreter's start, short beside a round.
_TRIAL_READ_BYTES, _TRIAL_WRITE_BYTES = 4_000_000_000, 500_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the floor reads and writes; see `tests.benchmarks.floor`."""

    threads: int
    block: int
    reader: str
    writer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """What a floor moves.

    Attributes:
        first: Bytes that a method must read before it can write the first.
        last: Bytes that it can read while it writes.
        writes: Bytes of the output.
    """

    first: int
    last: int
    writes: int


def take_floor(settings: Settings, amounts: Amounts, inputs: Sequence[Path], output: Path) -> Figures:
    """Run the floor once; the inputs are read in turn, so one that is read less often comes last."""
    ways = (str(settings.threads), str(settings.block), settings.reader, settings.writer)
    bytes_ = (str(amounts.first), str(amounts.last), str(amounts.writes))
    # Neither site packages nor the environment: what a merge cannot do without starts as fast as Python does.
    figures = take((sys.executable, "-I", "-S", _FLOOR, *ways, *bytes_, str(output), *map(str, inputs)))
    output.unlink()
    return figures


def _seconds(way: Settings, amounts: Amounts, inputs: Sequence[Path], output: Path) -> float:
    """Return how long one way takes; for ever where the file system does not have it."""
    try:
        return take_floor(way, amounts, inputs, output).wall_s
    except RuntimeError:
        if way.writer != "direct":
            raise
        output.unlink(missing_ok=True)
        return math.inf


def tune_cold(settings: Settings, inputs: Sequence[Path], output: Path) -> tuple[Settings, list[dict[str, Any]]]:
    """Return what is fastest where inputs lie on the disk only, and what was tried, each way once."""
    amounts = Amounts(first=sum(path.stat().st_size for path in inputs), last=0, writes=0)
    cores = len(os.sched_getaffinity(0))
    known = {}
    for threads in (cores, 2 * cores, 4 * cores):
        for block in sorted({settings.block, _BLOCKS[-1]}):
            caches.drop(inputs)
            way = replace(settings, threads=threads, block=block)
            known[way] = take_floor(way, amounts, inputs, output).wall_s
    tried = [{**asdict(way), **asdict(amounts), "cold": True, "wall_s": wall_s} for way, wall_s in known.items()]
    return min(known, key=lambda way: known[way]), tried


def tune(inputs: Sequence[Path], output: Path, *, tries: int) -> tuple[Settings, list[dict[str, Any]]]:
    """Return the fastest settings, and what was tried with the best of its wall seconds.

    Args:
        inputs: Files to read; they are read into the page cache first.
        output: A file that may be written and removed.
        tries: Of each way; the best counts.
    """
    caches.warm(inputs)
    tried: list[dict[str, Any]] = []
    size = sum(path.stat().st_size for path in inputs)
    read = Amounts(first=min(_TRIAL_READ_BYTES, 4 * size), last=0, writes=0)
    written = Amounts(first=0, last=size, writes=min(_TRIAL_WRITE_BYTES, size))

    def best(ways: Iterator[Settings], amounts: Amounts) -> Settings:
        # Round by round, so that a busy spell meets all of them.
        each = list(ways)
        rounds = [[_seconds(way, amounts, inputs, output) for way in each] for _ in range(tries)]
        known = dict(zip(each, map(min, *rounds) if tries > 1 else rounds[0], strict=True))
        tried.extend({**asdict(way), **asdict(amounts), "wall_s": wall_s} for way, wall_s in known.items())
        return min(known, key=lambda way: known[way])

    cores = len(os.sched_getaffinity(0))
    start = Settings(threads=cores, block=1 << 20, reader="pread", writer="late")
    found = best((replace(start, block=block) for block in _BLOCKS), read)
    found = best((replace(found, threads=threads) for threads in sorted({1, cores, cores + 1, 2 * cores})), read)
    found = best((replace(found, reader=reader) for reader in ("pread", "mmap")), read)
    # A writer that waits for the disk leaves its core to one more thread.
    ways = [(writer, found.threads + more) for writer in _WRITERS for more in (0, 1)]
    found = best((replace(found, writer=writer, threads=threads) for writer, threads in ways), written)
    return found, tried
