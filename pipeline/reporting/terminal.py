"""Progress as a live display on a terminal.

Owns the bars. Importing this module imports what draws them.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from pipeline.events import Committed, Event, GroupSolved, Note, PassEnded, PassProgress, PassStarted, StageEnded
from pipeline.reporting.batch_view import RecipeEnded, RecipeStarted
from pipeline.reporting.progress import NAMED_GROUPS, event_text, solved_text


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
                if self._solved <= NAMED_GROUPS:
                    self._print(solved_text(event))
            case Note() | Committed() | RecipeEnded() | StageEnded():
                self._print(event_text(event))
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
