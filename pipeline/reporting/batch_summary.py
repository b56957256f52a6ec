"""What is kept of a batch: a row a recipe, as a document and as a table.

Owns the keys of both, and what is counted of a merge for them. Must not know how a batch is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline import __version__
from pipeline.checkpoints.tables import write_table
from pipeline.engine.run_folder import write_json
from pipeline.events import Committed, Event, FileWritten, Listener, PassProgress
from pipeline.storage import Store

SUMMARY = "summary.json"
TABLE = "summary.parquet"
# Raised when a key of the summary changes its meaning or goes away.
SUMMARY_SCHEMA = 1
# What becomes of a recipe.
STATES = ("committed", "unchanged", "failed", "busy", "stopped", "not started")


@dataclass(kw_only=True)
class Row:
    """What became of one recipe; "" and 0 where there is nothing to tell, so that columns keep their types.

    It is saved and shown: its URLs are without credentials.

    Attributes:
        recipe: The name of its file without the suffix.
        recipe_url: Its file.
        output: Where it is merged into.
        state: One of `STATES`.
        error: Why it is not committed.
        exit_code: What a merge of this recipe alone would have ended with; 0 when it is committed.
        seconds: How long this batch took over it.
        bytes_read: Input bytes read; of a merge that failed, those its passes had done.
        bytes_written: Of output files.
        fingerprint: The merge's, as in its report.
        started: UTC.
        ended: UTC.
    """

    recipe: str
    recipe_url: str
    output: str
    state: str = "not started"
    error: str = ""
    exit_code: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    fingerprint: str = ""
    started: str = ""
    ended: str = ""


def exit_code(rows: Sequence[Row]) -> int:
    """Return 0 when all recipes are committed, else the exit code of those that are not if it is one, else 1."""
    codes = {row.exit_code for row in rows} - {0}
    return 1 if len(codes) > 1 else max(codes, default=0)


def summary(
    rows: Sequence[Row], heading: Mapping[str, str], *, state: str, began: str, seconds: float
) -> dict[str, Any]:
    """Return a batch as a document.

    Args:
        rows: The recipes.
        heading: Where they and their outputs are.
        state: "running", "finished" or "stopped".
        began: When it began, UTC.
        seconds: How long it has taken.
    """
    return {
        "schema": SUMMARY_SCHEMA,
        "version": __version__,
        **heading,
        "state": state,
        "exit_code": exit_code(rows),
        "started": began,
        "ended": now(),
        "seconds": round(seconds, 3),
        "counts": {name: sum(row.state == name for row in rows) for name in STATES},
        "merges": [asdict(row) for row in rows],
    }


def save(place: Store, document: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Save the last word on a batch, as a table and as the document, and return it.

    Raises:
        StorageError: One of them could not be written; the document is tried in any case.
    """
    columns = {name: [getattr(row, name) for row in rows] for name in Row.__dataclass_fields__}
    metadata = {key: str(document[key]) for key in ("schema", "version", "state", "exit_code", "started", "ended")}
    try:
        write_table(place, TABLE, columns, metadata)
    finally:
        write_json(place, SUMMARY, document)
    return document


class Watch:
    """Hears what a merge says, passes it on, and keeps what the summary wants of it."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._done: dict[str, int] = {}
        self.committed = False
        self.written_bytes = 0

    @property
    def read_bytes(self) -> int:
        """Input bytes that the passes have done."""
        return sum(self._done.values())

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        match event:
            case PassProgress():
                self._done[event.name] = event.done_bytes
            case FileWritten():
                self.written_bytes += event.size_bytes
            case Committed():
                self.committed = True
            case _:
                pass
        self._listener(event)


def as_text(words: object) -> str:
    """Return an error's words as text that every file takes: names of files in it need not be text."""
    return str(words).encode("utf-8", "backslashreplace").decode("utf-8")


def now() -> str:
    """Return this instant in UTC, as text."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
