"""A batch of merges for people and programs: its events, and its summary as a table.

Owns how a batch looks. Must not know how one is run. The table's library is loaded when there is one to show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.events import Event
from pipeline.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeStarted(Event):
    """A batch goes on to a recipe, the `number`-th of `count`."""

    recipe: str
    output: str
    number: int
    count: int

    def __str__(self) -> str:
        return f"[{self.number}/{self.count}] {self.recipe} into {self.output}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeEnded(Event):
    """A batch is through with a recipe: what became of it, and the error if there was one."""

    recipe: str
    state: str
    seconds: float
    error: str

    def __str__(self) -> str:
        return f"{self.recipe}: {self.state} after {format_seconds(self.seconds)}" + (
            f": {self.error}" if self.error else ""
        )


def batch_view(summary: Mapping[str, Any]) -> Iterator[str | Table]:
    """Yield a batch that ended: one row a recipe, and a line of counts.

    Errors are told when they come up, and kept in the summary: a column would break their URLs.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("recipe", "state"):
        table.add_column(name)
    for name in ("time", "read", "written"):
        table.add_column(name, justify="right", no_wrap=True)
    for merge in summary["merges"]:
        cells = [
            merge["recipe"],
            merge["state"],
            format_seconds(merge["seconds"]) if merge["started"] else "",
            *(format_bytes(merge[key]) if merge[key] else "" for key in ("bytes_read", "bytes_written")),
        ]
        # As text: names may hold square brackets.
        table.add_row(*(Text(cell) for cell in cells))
    yield table
    counts = ", ".join(f"{count} {state}" for state, count in summary["counts"].items() if count)
    number = len(summary["merges"])
    yield (
        f"{summary['outputs']}: {number} recipe{'' if number == 1 else 's'}, {counts},"
        f" {format_seconds(summary['seconds'])}"
    )
