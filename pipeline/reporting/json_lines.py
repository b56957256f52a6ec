"""Progress for programs: one JSON document a line.

Owns the form of a line: `time`, `event`, in a batch `recipe`, and the event's own keys.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, TextIO

from pipeline.errors import PipelineError
from pipeline.events import Event, ExamplesSeen, PassProgress, to_json
from pipeline.reporting.batch_view import RecipeEnded, RecipeStarted

# Seconds between two lines of one pass's progress: a display follows it, and a log of hours stays small.
_PROGRESS_S = 1.0
# Seconds for what was written last to come through the pipe; a process that outlives this one may hold the other end.
_DRAIN_S = 1.0
# Two threads may have something to say; their lines must not run into each other.
_LOCK = threading.Lock()


class JsonLines:
    """Writes every event as one line, the progress of a pass at most once a second.

    Args:
        stream: Where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._recipe: str | None = None
        self._last = float("-inf")

    def __call__(self, event: Event) -> None:
        """Write an event."""
        if isinstance(event, PassProgress | ExamplesSeen):
            now = time.monotonic()
            if now - self._last < _PROGRESS_S:
                return
            self._last = now
        if isinstance(event, RecipeStarted):
            self._recipe = event.recipe
        fields = to_json(event)
        if self._recipe is not None:
            fields["recipe"] = self._recipe
        if isinstance(event, RecipeEnded):
            self._recipe = None
        write_line(self._stream, fields)


class JsonLogs(logging.Handler):
    """Writes what libraries log as lines of the same form, so that nothing else stands between them.

    Args:
        stream: Where to.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        fields = {"event": "Log", "level": record.levelname, "logger": record.name, "text": record.getMessage()}
        write_line(self._stream, fields)


@contextmanager
def only_lines(stream: TextIO) -> Iterator[TextIO]:
    """Yield where lines go, while all else that reaches the stream's descriptor becomes `Log` lines there.

    Ray writes to standard error past Python's own streams and loggers, and a program that reads lines must not stumble.

    Args:
        stream: Standard error. One that has no descriptor is yielded as it is.
    """
    try:
        number = stream.fileno()
    except OSError:
        yield stream
        return
    stream.flush()
    lines = os.fdopen(os.dup(number), "w", encoding="utf-8")
    reading, writing = os.pipe()
    os.dup2(writing, number)
    os.close(writing)
    relay = threading.Thread(target=_relay, args=(reading, lines), name="standard error", daemon=True)
    relay.start()
    try:
        yield lines
    finally:
        stream.flush()
        os.dup2(lines.fileno(), number)
        relay.join(timeout=_DRAIN_S)


def _relay(reading: int, lines: TextIO) -> None:
    """Hand on what arrives through a pipe, a `Log` line a line."""
    with os.fdopen(reading, encoding="utf-8", errors="replace") as source:
        for line in source:
            if text := line.strip():
                write_line(lines, {"event": "Log", "level": "", "logger": "stderr", "text": text})


def error_fields(error: PipelineError) -> dict[str, Any]:
    """Return the last line of a command that failed."""
    problems = [{"what": problem.what, "where": problem.where, "remedy": problem.remedy} for problem in error.problems]
    return {"event": "Error", "exit_code": error.exit_code, "problems": problems}


def write_line(stream: TextIO, fields: dict[str, Any]) -> None:
    """Write one line, with the time in front.

    Args:
        stream: Where to. When nobody reads it any more the line is lost: a merge does not end for that.
        fields: The keys, `event` first.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    with _LOCK, suppress(OSError):
        stream.write(json.dumps({"time": now, **fields}) + "\n")
        stream.flush()
