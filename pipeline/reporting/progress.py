"""Progress for people as plain lines; and the choice between all forms.

Owns how events look in a log. Everything goes to stderr.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from pipeline.events import (
    Committed,
    Event,
    ExamplesSeen,
    FileWritten,
    GroupSolved,
    Listener,
    Note,
    PassEnded,
    PassProgress,
    PassStarted,
    StageEnded,
)
from pipeline.reporting.batch_view import RecipeEnded, RecipeStarted
from pipeline.reporting.json_lines import JsonLines
from pipeline.units import format_bytes, format_seconds

# What a user may ask for: "auto" is a bar on a terminal and lines elsewhere.
CHOICES = ("auto", "bar", "lines", "json")
_LOG = logging.getLogger(__name__)
# Seconds between two progress lines in a log: a job of hours stays readable.
_LINE_S = 10.0
# Solved groups named one by one; further ones are in the report.
NAMED_GROUPS = 8


@contextmanager
def listening(choice: str, stream: TextIO) -> Iterator[Listener]:
    """Yield the listener that a user asked for, shown as long as the context lasts.

    Args:
        choice: One of `CHOICES`.
        stream: Standard error.
    """
    if choice == "json":
        yield JsonLines(stream)
    elif choice == "bar" or (choice == "auto" and stream.isatty()):
        # Whoever looks at a log does not wait for what draws bars.
        from rich.console import Console

        from pipeline.reporting.terminal import TerminalProgress

        with TerminalProgress(Console(file=stream, force_terminal=True if choice == "bar" else None)) as bar:
            yield bar
    else:
        yield LogLines()


class LogLines:
    """One line when something happened, and one every ten seconds of a pass."""

    def __init__(self) -> None:
        self._totals: dict[str, PassStarted] = {}
        self._started = 0.0
        self._last = 0.0
        self._solved = 0

    def __call__(self, event: Event) -> None:
        """Log an event."""
        now = time.monotonic()
        match event:
            case PassStarted():
                self._totals[event.name] = event
                self._started = self._last = now
                files = f"{event.files} file" + ("" if event.files == 1 else "s")
                _LOG.info("%s: %s of input for %s", event.name, format_bytes(event.total_bytes), files)
            case PassProgress() if now - self._last >= _LINE_S:
                self._last = now
                _LOG.info("%s", self._line(event, now))
            case PassEnded():
                _LOG.info("%s: done in %s", event.name, format_seconds(event.seconds))
            case GroupSolved():
                self._solved += 1
                if self._solved <= NAMED_GROUPS:
                    _LOG.info("%s", solved_text(event))
            case FileWritten():
                _LOG.info("wrote %s, %s", event.file, format_bytes(event.size_bytes))
            case Note():
                _LOG.warning("%s", event.text)
            case Committed() | StageEnded():
                _LOG.info("%s", event_text(event))
            case ExamplesSeen() if now - self._last >= _LINE_S:
                self._last = now
                _LOG.info("%s: %d of %d examples", event.stage, event.done, event.total)
            case RecipeStarted():
                self._solved = 0
                _LOG.info("%s", event)
            case RecipeEnded():
                _LOG.log(logging.ERROR if event.error else logging.INFO, "%s", event)
            case _:
                pass

    def _line(self, event: PassProgress, now: float) -> str:
        total = self._totals[event.name].total_bytes
        rate = event.done_bytes / max(1e-9, now - self._started)
        left = (total - event.done_bytes) / rate if rate > 0 else 0.0
        return (
            f"{event.name}: {format_bytes(event.done_bytes)} of {format_bytes(total)}, {format_bytes(rate)}/s,"
            f" {format_seconds(max(0.0, left))} left"
        )


def solved_text(event: GroupSolved) -> str:
    """Return a solved group in a line."""
    return f"solved {event.group}: {event.iterations} iterations, relative gap {event.relative_gap:.1e}"


def event_text(event: Note | Committed | RecipeEnded | StageEnded) -> str:
    """Return an event that is told in any form, in a line."""
    match event:
        case Note():
            return f"note: {event.text}"
        case Committed():
            return f"committed {event.location}"
        case StageEnded():
            took = format_seconds(event.seconds)
            return f"saved the statistics of {event.stage} ({event.number} of {event.stages}) in {took}"
    return str(event)
