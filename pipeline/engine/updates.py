"""What is made of a tensor's factors once and used by all of its chunks.

Owns the lifetime of that: it lives while chunks of the tensor are in flight, and the last one a little longer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Entry(Generic[T]):
    """One tensor's value, once it is made, and how many chunks use it now."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    made: list[T] = field(default_factory=list)
    users: int = 0


class TensorCache(Generic[T]):
    """Makes a value for a tensor when the first chunk asks, and forgets it when chunks of another tensor follow.

    Args:
        make: Called with a tensor's index, once for all chunks in flight together.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry[T]] = {}

    @contextmanager
    def lease(self, tensor: int) -> Iterator[T]:
        """Hold the value of a tensor."""
        with self._lock:
            entry = self._entries.setdefault(tensor, _Entry())
            entry.users += 1
        try:
            with entry.lock:
                if not entry.made:
                    entry.made.append(self._make(tensor))
            yield entry.made[0]
        finally:
            with self._lock:
                entry.users -= 1
                # Those before it only: a chunk that ends late must not take what its followers are in the midst of.
                before = list(takewhile(lambda other: other != tensor, self._entries))
                for other in before:
                    if self._entries[other].users == 0:
                        del self._entries[other]
