"""Many byte ranges at a time: neighbours joined, large ones cut, all in flight together.

Owns the requests of remote reads and the threads that wait for them. Knows stores and buffers; knows nothing of chunks,
plans or memory budgets.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from pipeline.planning.memory import REQUEST_BYTES
from pipeline.storage import Store

# Unwanted bytes that are read along rather than left out: they take a fraction of another request's latency.
GAP_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The bytes [start, stop) of one file."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.stop - self.start


def coalesce(ranges: Iterable[tuple[int, int]], *, gap_bytes: int, most_bytes: int) -> tuple[Span, ...]:
    """Return the requests that read some ranges of one file: sorted, disjoint, as few as the limits allow.

    Args:
        ranges: (start, stop) in any order; they may overlap, and empty ones are read by nothing.
        gap_bytes: Ranges that lie no farther apart are read together.
        most_bytes: No request is longer.

    Returns:
        Spans that hold every byte of the ranges once; none begins or ends with a byte that nobody wants.
    """
    spans: list[Span] = []
    for start, stop in sorted(ranges):
        start = max(start, spans[-1].stop) if spans else start
        while start < stop:
            last = spans[-1] if spans else None
            if last is not None and start - last.stop <= gap_bytes and start - last.start < most_bytes:
                end = min(stop, last.start + most_bytes)
                spans[-1] = Span(start=last.start, stop=end)
            else:
                end = min(stop, start + most_bytes)
                spans.append(Span(start=start, stop=end))
            start = end
    return tuple(spans)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Want:
    """A buffer to fill with the bytes of a file from `start` on."""

    store: Store
    path: str
    start: int
    buffer: np.ndarray

    @property
    def stop(self) -> int:
        """Where the bytes end."""
        return self.start + self.buffer.nbytes


class Fetch:
    """Reads that were started together. The first that fails makes those that have not begun fail with its error.

    Args:
        pool: The threads that read.
        wants: What to read.
    """

    def __init__(self, pool: ThreadPoolExecutor, wants: Sequence[Want]) -> None:
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._futures: dict[int, list[Future[None]]] = {id(want): [] for want in wants}
        order = {id(want): number for number, want in enumerate(wants)}
        requests = _requests(wants)
        # What is wanted first is asked for first, whatever file it lies in.
        requests.sort(key=lambda request: min(order[id(want)] for want in request[1]))
        for span, touched in requests:
            future = pool.submit(self._read, span, touched)
            for want in touched:
                self._futures[id(want)].append(future)

    def _read(self, span: Span, wants: Sequence[Want]) -> None:
        """Read one span into the buffers that it touches."""
        with self._lock:
            if self._error is not None:
                raise self._error
        try:
            _read_span(span, wants)
        except BaseException as error:  # kept for the reads that have not begun, and raised here all the same
            with self._lock:
                self._error = self._error or error
            raise

    def wait(self, wants: Iterable[Want]) -> None:
        """Return when some of the wants are filled.

        Raises:
            StorageError: One of them could not be read.
        """
        for want in wants:
            for future in self._futures[id(want)]:
                future.result()

    def cancel(self, reason: BaseException) -> None:
        """Let no further request begin and return when none is under way, so that the buffers may be used again."""
        with self._lock:
            self._error = self._error or reason
        self.settle()

    def settle(self) -> None:
        """Return when no request is under way, whatever became of them."""
        wait({future for futures in self._futures.values() for future in futures})


def _requests(wants: Sequence[Want]) -> list[tuple[Span, list[Want]]]:
    """Return the requests that fill all wants, each with the wants that it touches."""
    files: dict[tuple[int, str], list[Want]] = {}
    for want in wants:
        if want.buffer.nbytes:
            files.setdefault((id(want.store), want.path), []).append(want)
    found = []
    for members in files.values():
        members.sort(key=lambda want: want.start)
        ranges = [(want.start, want.stop) for want in members]
        begin = 0
        for span in coalesce(ranges, gap_bytes=GAP_BYTES, most_bytes=REQUEST_BYTES):
            while members[begin].stop <= span.start:
                begin += 1
            end = bisect_left(members, span.stop, lo=begin, key=lambda want: want.start)
            found.append((span, [want for want in members[begin:end] if want.stop > span.start]))
    return found


def _read_span(span: Span, wants: Sequence[Want]) -> None:
    """Read a span by one request, each part into where it belongs."""
    first = wants[0]
    if len(wants) == 1 or first.store.is_local:
        # Nothing to gain from one read of several ranges on a disk.
        for want in wants:
            start, stop = max(span.start, want.start), min(span.stop, want.stop)
            part = want.buffer[start - want.start : stop - want.start]
            want.store.read_into(want.path, start, part.data)
        return
    buffers: list[memoryview] = []
    end = span.start
    for want in wants:
        start, stop = max(span.start, want.start), min(span.stop, want.stop)
        if start < end:
            # Two want the same bytes: one of them gets a copy.
            _read_and_copy(span, wants)
            return
        if start > end:
            buffers.append(np.empty(start - end, dtype=np.uint8).data)
        buffers.append(want.buffer[start - want.start : stop - want.start].data)
        end = stop
    first.store.read_into(first.path, span.start, *buffers)


def _read_and_copy(span: Span, wants: Sequence[Want]) -> None:
    """Read a span whole and copy its parts to where they belong."""
    data = np.frombuffer(wants[0].store.read(wants[0].path, span.start, span.stop), dtype=np.uint8)
    for want in wants:
        start, stop = max(span.start, want.start), min(span.stop, want.stop)
        want.buffer[start - want.start : stop - want.start] = data[start - span.start : stop - span.start]


class Fetcher:
    """The threads of one worker that wait for stores.

    Args:
        requests: How many requests may be in flight.
    """

    def __init__(self, requests: int) -> None:
        self._pool = ThreadPoolExecutor(requests, thread_name_prefix="fetch")

    def start(self, wants: Sequence[Want]) -> Fetch:
        """Begin to fill buffers, in the order of the wants' files; earlier fetches come first.

        Args:
            wants: Buffers of bytes (uint8), disjoint; nobody else may touch them until they are filled.
        """
        return Fetch(self._pool, wants)

    def fetch(self, wants: Sequence[Want]) -> None:
        """Fill buffers, and return when all are filled or no read is under way.

        Raises:
            StorageError: The first that went wrong; the rest is given up.
        """
        fetch = self.start(wants)
        try:
            fetch.wait(wants)
        finally:
            fetch.settle()

    def close(self) -> None:
        """End the threads; what has not begun is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
