"""What happens during a merge, as values, and who may listen.

Owns the event classes and the listener protocol. Library code emits; the terminal, the log and the report listen.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Event):
    """Something the user should read: a warning, a resumption, an observation."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PassStarted(Event):
    """A pass begins: "measure", "solve", "weigh" or "write", over that many input bytes and files."""

    name: str
    total_bytes: int
    files: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassProgress(Event):
    """Input bytes done since the pass began, over all workers."""

    name: str
    done_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassEnded(Event):
    """A pass is complete."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMeasured(Event):
    """The statistics of one output file's tensors are saved."""

    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileWritten(Event):
    """One output file is complete and marked."""

    file: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSolved(Event):
    """A group has its coefficients."""

    group: str
    iterations: int
    relative_gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamplesSeen(Event):
    """A stage of a calibration has seen some of its examples."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEnded(Event):
    """The statistics of a stage of a calibration are saved: of a layer, or of a pass over all examples."""

    stage: str
    number: int
    stages: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Event):
    """The output is complete and visible."""

    location: str


class Listener(Protocol):
    """Whoever wants to know. Called from the driver's thread only."""

    def __call__(self, event: Event) -> None:
        """Take notice of an event; must be quick and must not raise."""
        ...


def ignore(event: Event) -> None:
    """Listen to nothing."""


def to_json(event: Event) -> dict[str, Any]:
    """Return an event as JSON-ready data: its class's name as "event", and its fields."""
    return {"event": type(event).__name__, **dataclasses.asdict(event)}
