"""Progress for people: a live display on a terminal, plain lines elsewhere; and the choice between all forms.

Owns how events look. Everything goes to stderr.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from pipeline.events import (
    Committed,
    Event,
    FileWritten,
    GroupSolved,
    Listener,
    Note,
    PassEnded,
    PassProgress,
    PassStarted,
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
_NAMED_GROUPS = 8


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
        with TerminalProgress(Console(file=stream, force_terminal=True if choice == "bar" else None)) as bar:
            yield bar
    else:
        yield LogLines()


class TerminalProgress:
    """A bar a pass with bytes, rate and time left; used as a context manager around the merge."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>12}"),
            BarColumn(),
            DownloadColumn(),
            SpeedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._totals: dict[str, int] = {}
        self._iteration: TaskID | None = None
        self._solved = 0

    def __enter__(self) -> TerminalProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case PassStarted():
                self._start(event)
            case PassProgress():
                self._progress.update(self._tasks[event.name], completed=event.done_bytes)
            case PassEnded():
                self._progress.update(self._tasks[event.name], completed=self._totals[event.name])
            case GroupSolved():
                self._solved += 1
                if self._solved <= _NAMED_GROUPS:
                    self._print(_solved_text(event))
            case Note() | Committed() | RecipeEnded():
                self._print(_text(event))
            case RecipeStarted():
                self._clear()
                self._print(str(event))
            case _:
                pass

    def _print(self, text: str) -> None:
        """Print a line above the bars; names may hold what would else be markup."""
        self._progress.console.print(text, highlight=False, markup=False)

    def _clear(self) -> None:
        """Forget the bars of a batch's last merge."""
        for task in {*self._tasks.values()}:
            self._progress.remove_task(task)
        self._tasks.clear()
        self._iteration = None
        self._solved = 0

    def _start(self, event: PassStarted) -> None:
        """Show a new bar, or for a further iteration the last one's again."""
        total = self._totals[event.name] = max(1, event.total_bytes)
        if self._iteration is not None and event.name.startswith("iteration"):
            self._progress.reset(self._iteration, total=total, description=event.name)
            self._tasks[event.name] = self._iteration
            return
        task = self._tasks[event.name] = self._progress.add_task(event.name, total=total)
        if event.name.startswith("iteration"):
            self._iteration = task


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
                if self._solved <= _NAMED_GROUPS:
                    _LOG.info("%s", _solved_text(event))
            case FileWritten():
                _LOG.info("wrote %s, %s", event.file, format_bytes(event.size_bytes))
            case Note():
                _LOG.warning("%s", event.text)
            case Committed():
                _LOG.info("%s", _text(event))
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


def _solved_text(event: GroupSolved) -> str:
    return f"solved {event.group}: {event.iterations} iterations, relative gap {event.relative_gap:.1e}"


def _text(event: Note | Committed | RecipeEnded) -> str:
    match event:
        case Note():
            return f"note: {event.text}"
        case Committed():
            return f"committed {event.location}"
    return str(event)
