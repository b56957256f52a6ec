"""Reading ahead of the computation: the needs of coming tasks, started in their order as far as a byte bound allows.

Owns the order, the bound and the buffer that ranges are read into again and again. Knows neither the plan nor what
bytes mean; what a need reads and where it lands is the holder's business.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pipeline.engine.fetch import Fetch, Fetcher, Want
from pipeline.errors import Problem, WorkerError
from pipeline.planning.grid import Chunk
from pipeline.planning.memory import REQUEST_BYTES
from pipeline.storage.mapped import Look

# Arrays handed to the kernels start at multiples of a cache line, whatever their dtype.
ALIGNMENT = 64

# A tensor, and the start of one of its chunks; -1 for its factors.
Key = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a task will ask for: a chunk of some inputs, or the factors of a tensor's updates.

    Attributes:
        chunk: None for factors.
        inputs: Distinct input indices; nothing for factors.
        keep: The bytes are to be kept for a later need if there is room.
        drop: What was kept is to be forgotten afterwards.
    """

    tensor: int
    chunk: Chunk | None = None
    inputs: tuple[int, ...] = ()
    keep: bool = False
    drop: bool = False

    @property
    def key(self) -> Key:
        """What tells it from other needs of one pass."""
        return self.tensor, self.chunk.start if self.chunk is not None else -1


@dataclass(slots=True, kw_only=True, eq=False)
class Held:
    """The arrays of one need, filled or about to be.

    Attributes:
        raw: By input index, arrays that are filled already and arrays that are being filled.
        wants: What has to be read.
        reused_bytes: Bytes that were kept by an earlier need.
        kept: The arrays that are to be kept once they are filled; their room is taken already.
        freed_bytes: Room for kept bytes to give back at the end.
        give_back: Returns the buffer that fresh arrays lie in, where it is used again.
        fetch: The reads that fill them; None when nothing was started.
        in_place: By input, arrays that are looked at in place.
    """

    need: Need
    raw: dict[int, tuple[np.ndarray, ...]]
    wants: list[Want] = field(default_factory=list)
    reused_bytes: int = 0
    kept: dict[int, tuple[np.ndarray, ...]] = field(default_factory=dict)
    freed_bytes: int = 0
    give_back: Callable[[], None] | None = None
    fetch: Fetch | None = None
    in_place: dict[int, Look] = field(default_factory=dict)

    @property
    def wanted_bytes(self) -> int:
        """The bytes that have to be read."""
        return sum(want.buffer.nbytes for want in self.wants)


@dataclass(slots=True, kw_only=True, eq=False)
class Place:
    """Bytes [start, stop) of a ring, until they are given back."""

    start: int
    stop: int
    free: bool = False


class Ring:
    """One buffer whose parts are taken one behind the other and come back in nearly that order. Thread-safe.

    Args:
        size_bytes: How many bytes may be out at a time; no part can be larger.
    """

    def __init__(self, size_bytes: int) -> None:
        whole = size_bytes // ALIGNMENT * ALIGNMENT
        buffer = np.empty(whole + ALIGNMENT, dtype=np.uint8)
        begin = -buffer.ctypes.data % ALIGNMENT
        self._buffer = buffer[begin : begin + whole]
        self._taken: deque[Place] = deque()
        self._lock = threading.Lock()

    def fits(self, size_bytes: int) -> bool:
        """Return whether a part of that size could be taken now."""
        with self._lock:
            return not size_bytes or self._start(_rounded(size_bytes)) is not None

    def take(self, size_bytes: int) -> Place | None:
        """Return a part of that size, aligned; None when there is no room."""
        with self._lock:
            start = self._start(_rounded(size_bytes))
            if start is None:
                return None
            place = Place(start=start, stop=start + _rounded(size_bytes))
            self._taken.append(place)
            return place

    def view(self, place: Place) -> np.ndarray:
        """Return the bytes of a part (uint8)."""
        return self._buffer[place.start : place.stop]

    def give_back(self, place: Place) -> None:
        """Let a part be used again."""
        with self._lock:
            place.free = True
            while self._taken and self._taken[0].free:
                self._taken.popleft()

    def _start(self, size_bytes: int) -> int | None:
        """Return where a part of that size, a multiple of the alignment, can begin."""
        if not self._taken:
            return 0 if size_bytes <= len(self._buffer) else None
        first, last = self._taken[0], self._taken[-1]
        if last.start < first.start:
            return last.stop if size_bytes <= first.start - last.stop else None
        if size_bytes <= len(self._buffer) - last.stop:
            return last.stop
        return 0 if size_bytes <= first.start else None


def _rounded(size_bytes: int) -> int:
    """Return a size that keeps the next part aligned, and is one."""
    return -(-max(1, size_bytes) // ALIGNMENT) * ALIGNMENT


class Holder(Protocol):
    """Who knows what a need reads, and where to."""

    def missing_bytes(self, need: Need) -> Mapping[int, int]:
        """Return, by input, the bytes that a need has to read."""

    def fits(self, size_bytes: int) -> bool:
        """Return whether arrays of that size could be had now."""

    def hold(self, need: Need) -> Held | None:
        """Return a need's arrays, nothing read yet; None when there is no room."""

    def let_go(self, held: Held) -> None:
        """Take the arrays of a need back."""


class ReadAhead:
    """Starts reads before tasks ask for them. Thread-safe.

    Needs are started in batches whose ranges in each input add up to a large request, so that neighbouring chunks, or
    the factors of neighbouring tensors, cost one request together.

    Args:
        needs: All that the tasks will ask for, each once, in their order.
        holder: Who gives and takes back arrays.
        fetcher: Who reads.
        most_bytes: Bound on the bytes that are read or being read and that no task has asked for; one need, however
            large, is started all the same.
    """

    def __init__(self, needs: Iterable[Need], *, holder: Holder, fetcher: Fetcher, most_bytes: int) -> None:
        self._waiting = deque(needs)
        self._announced = {need.key for need in self._waiting}
        self._held: dict[Key, Held] = {}
        self._holder = holder
        self._fetcher = fetcher
        self._most_bytes = most_bytes
        self._ahead_bytes = 0
        self._batch: tuple[int, int] | None = None
        self._stopped: WorkerError | None = None
        self._changed = threading.Condition()
        self.go_on()

    def take(self, key: Key) -> Held | None:
        """Return what was started for a need, once it is; None when nobody announced it.

        Raises:
            WorkerError: It was stopped before that need had its turn.
        """
        with self._changed:
            if key not in self._announced:
                return None
            while key not in self._held:
                if self._stopped is not None:
                    raise self._stopped
                self._changed.wait()
            self._announced.discard(key)
            held = self._held.pop(key)
            self._ahead_bytes -= held.wanted_bytes
        self.go_on()
        return held

    def go_on(self) -> None:
        """Start what there is room for now."""
        with self._changed:
            while self._waiting and self._stopped is None:
                count, size_bytes = self._batch = self._batch or self._next_batch()
                full = self._ahead_bytes + size_bytes > self._most_bytes or not self._holder.fits(size_bytes)
                # With nothing started a part of the batch is better than none: tasks wait for it.
                if (full and self._held) or not self._begin(count):
                    break
                self._batch = None
            self._changed.notify_all()

    def stop(self) -> None:
        """Start nothing more, wait for what is under way, and give back what no task has taken."""
        with self._changed:
            self._stopped = WorkerError(Problem(what="stopped because another part of the merge failed"))
            self._waiting.clear()
            left = list(self._held.values())
            self._held.clear()
            self._changed.notify_all()
        for held in left:
            if held.fetch is not None:
                held.fetch.cancel(self._stopped)
        for held in left:
            self._holder.let_go(held)

    def _next_batch(self) -> tuple[int, int]:
        """Return how many needs to start together, and how many bytes they read."""
        by_input: dict[int, int] = {}
        total = count = 0
        for need in self._waiting:
            sizes = self._holder.missing_bytes(need)
            size = sum(sizes.values())
            longest = max((by_input.get(index, 0) + size for index, size in sizes.items()), default=0)
            # Half of the bound, so that the next batch is read while this one is computed.
            if count and (longest > REQUEST_BYTES or total + size > self._most_bytes // 2):
                break
            for index, part in sizes.items():
                by_input[index] = by_input.get(index, 0) + part
            total += size
            count += 1
        return count, total

    def _begin(self, count: int) -> bool:
        """Start up to that many needs together; return whether there was room for any."""
        begun: list[Held] = []
        while len(begun) < count:
            held = self._holder.hold(self._waiting[0])
            if held is None:
                break
            self._waiting.popleft()
            begun.append(held)
        wants = [want for held in begun for want in held.wants]
        fetch = self._fetcher.start(wants) if wants else None
        for held in begun:
            held.fetch = fetch
            self._held[held.need.key] = held
            self._ahead_bytes += held.wanted_bytes
        return bool(begun)
