"""Results in the order of their items, several items in flight at a time.

Owns the window, the room that large items must be admitted to, and the end of what is in flight when one fails.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from pipeline.engine.read_ahead import Need
from pipeline.engine.source import ChunkSource
from pipeline.errors import Problem, WorkerError

S = TypeVar("S")
T = TypeVar("T")
Item = TypeVar("Item", contravariant=True)


class Room(Protocol[Item]):
    """What items in flight share, beyond their number."""

    def admit(self, item: Item, *, alone: bool) -> bool:
        """Take room for an item and return True, or return False; one that is alone must be admitted."""

    def release(self, item: Item) -> None:
        """Take back the room of an item whose result was used."""


class InOrder:
    """Runs tasks in a worker's threads.

    Args:
        pool: The threads.
        window: Most items in flight.
        source: What the tasks read from; told what they will ask for.
        stopped: Set when the work is to end.
    """

    def __init__(self, pool: ThreadPoolExecutor, window: int, source: ChunkSource, stopped: threading.Event) -> None:
        self._pool = pool
        self._window = window
        self._source = source
        self._stopped = stopped

    def run(
        self,
        task: Callable[[S], T],
        items: Sequence[S],
        needs: Callable[[S], Iterator[Need]],
        room: Room[S] | None = None,
    ) -> Iterator[T]:
        """Yield the results of a task over chunks, or whole tensors, in order, a window of them in flight.

        Args:
            task: Run by the worker's threads.
            items: What it is run on.
            needs: What it will ask of the source for one item, in its order; remote inputs are read ahead of it.
            room: Where large items must be admitted to, in their order; a result counts until the next is asked for.
        """
        pending: deque[tuple[S, Future[T]]] = deque()
        waiting = deque(items)
        self._source.read_ahead(need for item in items for need in needs(item))
        try:
            while True:
                while waiting and len(pending) < self._window:
                    if room is not None and not room.admit(waiting[0], alone=not pending):
                        break
                    item = waiting.popleft()
                    pending.append((item, self._pool.submit(task, item)))
                if not pending:
                    return
                self.check()
                yield pending[0][1].result()
                done, _ = pending.popleft()
                if room is not None:
                    room.release(done)
        finally:
            for _, future in pending:
                future.cancel()
            self._source.stop_reading_ahead()
            for _, future in pending:
                if not future.cancelled():
                    future.exception()

    def check(self) -> None:
        """Raise when the work is to end.

        Raises:
            WorkerError: It is.
        """
        if self._stopped.is_set():
            raise WorkerError(Problem(what="stopped because another part of the merge failed"))
