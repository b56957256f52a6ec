"""How far a run is, for whoever asks from outside.

Owns phase, rate and time left, made of the events of the driver's thread and read by the thread that gives signs of
life. Must not know how a run is claimed or shown.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pipeline.events import Event, FileMeasured, FileWritten, Listener, PassEnded, PassProgress, PassStarted

# Seconds that the rate looks back: long enough to be steady, short enough to show a stall.
_WINDOW_S = 30.0
# What comes after a pass that has ended.
_NEXT = {"measure": "solve", "write": "commit"}


class Progress:
    """A listener that keeps what a run is doing and hands events on.

    Args:
        listener: Told every event.
        waiting: Says what the workers wait for; "" for nothing.
        clock: Seconds that only grow.
    """

    def __init__(
        self, listener: Listener, waiting: Callable[[], str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._listener, self._waiting, self._clock = listener, waiting, clock
        self._lock = threading.Lock()
        self._phase, self._iteration = "start", 0
        self._total_bytes = self._files = self._files_done = 0
        # Moments and the bytes done then, since the pass began.
        self._samples: deque[tuple[float, int]] = deque()

    def __call__(self, event: Event) -> None:
        """Take notice of an event and hand it on."""
        with self._lock:
            match event:
                case PassStarted():
                    self._begin(event)
                case PassProgress():
                    self._add(event.done_bytes)
                case PassEnded():
                    self._phase = _NEXT.get(event.name, self._phase)
                    self._total_bytes = self._files = self._files_done = 0
                    self._samples.clear()
                case FileMeasured() | FileWritten():
                    self._files_done += 1
                case _:
                    pass
        self._listener(event)

    def snapshot(self) -> dict[str, Any]:
        """Return the state as JSON-ready data; callable from any thread.

        Returns:
            phase ("start", "measure", "solve", "write", "commit"), iteration (None unless the parameters are measured
            again and again), done_bytes and total_bytes of the pass, files_done and files_total, rate (bytes a second
            over the last half minute, or None), seconds_left of the pass (or None), waiting_for ("" for nothing).
        """
        waiting_for = self._waiting()
        with self._lock:
            done_bytes = self._samples[-1][1] if self._samples else 0
            rate = self._rate()
            left = (self._total_bytes - done_bytes) / rate if rate and self._total_bytes else None
            return {
                "phase": self._phase,
                "iteration": self._iteration or None,
                "done_bytes": done_bytes,
                "total_bytes": self._total_bytes,
                "files_done": self._files_done,
                "files_total": self._files,
                "rate": rate,
                "seconds_left": None if left is None else max(0.0, left),
                "waiting_for": waiting_for,
            }

    def _begin(self, event: PassStarted) -> None:
        word, _, number = event.name.partition(" ")
        streams = word == "iteration"
        self._phase = "solve" if streams else event.name
        self._iteration = int(number) if streams else 0
        self._total_bytes, self._files, self._files_done = event.total_bytes, event.files, 0
        self._samples.clear()
        self._samples.append((self._clock(), 0))

    def _add(self, done_bytes: int) -> None:
        now = self._clock()
        self._samples.append((now, done_bytes))
        # One sample of the window's beginning stays, so that a slow pass has a rate, too.
        while len(self._samples) > 2 and self._samples[1][0] <= now - _WINDOW_S:
            self._samples.popleft()

    def _rate(self) -> float | None:
        """Return bytes a second up to now: a stall lowers it."""
        if not self._samples:
            return None
        (first, before), (_, done_bytes) = self._samples[0], self._samples[-1]
        seconds = self._clock() - first
        return (done_bytes - before) / seconds if seconds > 0 else None
