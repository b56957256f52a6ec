"""Events as lines and bars."""

import io
import logging

import pytest
from rich.console import Console

from pipeline.events import (
    Committed,
    Event,
    FileMeasured,
    FileWritten,
    GroupSolved,
    Note,
    PassEnded,
    PassProgress,
    PassStarted,
)
from pipeline.reporting import progress
from pipeline.reporting.batch_view import RecipeEnded, RecipeStarted
from pipeline.reporting.json_lines import JsonLines
from pipeline.reporting.progress import CHOICES, LogLines, listening
from pipeline.reporting.terminal import TerminalProgress

STORY: list[Event] = [
    Note(text="no base_model"),
    PassStarted(name="measure", total_bytes=4_000_000_000, files=2),
    PassProgress(name="measure", done_bytes=1_000_000_000),
    FileMeasured(file="model-00001-of-00002.safetensors"),
    PassEnded(name="measure", seconds=12.4),
    *(GroupSolved(group=f"block {number}", iterations=7, relative_gap=1.5e-12) for number in range(10)),
    PassStarted(name="write", total_bytes=0, files=2),
    PassProgress(name="write", done_bytes=0),
    FileWritten(file="model-00001-of-00002.safetensors", size_bytes=5_000_000_000),
    PassEnded(name="write", seconds=185.0),
    Committed(location="/out"),
]


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_log_tells_the_story(caplog: pytest.LogCaptureFixture) -> None:
    lines = LogLines()
    with caplog.at_level(logging.INFO):
        for event in STORY:
            lines(event)
    assert logged(caplog) == [
        "no base_model",
        "measure: 4 GB of input for 2 files",
        "measure: done in 12 s",
        *(f"solved block {number}: 7 iterations, relative gap 1.5e-12" for number in range(8)),
        "write: 0 B of input for 2 files",
        "wrote model-00001-of-00002.safetensors, 5 GB",
        "write: done in 3 min 05 s",
        "committed /out",
    ]
    assert [record.levelname for record in caplog.records][:2] == ["WARNING", "INFO"]


def test_progress_lines_are_seconds_apart(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = LogLines()
    with caplog.at_level(logging.INFO):
        lines(PassStarted(name="measure", total_bytes=4_000_000_000, files=1))
        for step in range(1, 21):
            clock[0] += 1.0
            lines(PassProgress(name="measure", done_bytes=step * 100_000_000))
    assert logged(caplog)[1:] == [
        "measure: 1 GB of 4 GB, 100 MB/s, 30 s left",
        "measure: 2 GB of 4 GB, 100 MB/s, 20 s left",
    ]


def test_a_pass_that_has_read_nothing_has_no_rate(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    lines = LogLines()
    with caplog.at_level(logging.INFO):
        lines(PassStarted(name="write", total_bytes=10, files=1))
        lines(PassProgress(name="write", done_bytes=0))
        lines(PassProgress(name="write", done_bytes=20))  # a retry reads again
    assert logged(caplog)[1] == "write: 0 B of 10 B, 0 B/s, 0 s left"
    assert logged(caplog)[2].endswith(" 0 s left")


def test_a_terminal_tells_the_story() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, no_color=True, legacy_windows=False)
    with TerminalProgress(console) as bar:
        for event in STORY:
            bar(event)
    text = stream.getvalue()
    for words in ("measure", "4.0/4.0 GB", "write", "note: no base_model", "committed /out", "solved block 7"):
        assert words in text
    assert "block 8" not in text
    assert text.count("note: no base_model") == 1


BATCH: list[Event] = [
    RecipeStarted(recipe="chat", output="out/[chat]", number=1, count=2),
    *STORY,
    RecipeEnded(recipe="chat", state="committed", seconds=200.0, error=""),
    RecipeStarted(recipe="code", output="out/code", number=2, count=2),
    *STORY,
    RecipeEnded(recipe="code", state="failed", seconds=1.5, error="no room"),
]


def test_a_log_tells_a_batch_recipe_by_recipe(caplog: pytest.LogCaptureFixture) -> None:
    lines = LogLines()
    with caplog.at_level(logging.INFO):
        for event in BATCH:
            lines(event)
    assert [line for line in logged(caplog) if "chat" in line or "code" in line] == [
        "[1/2] chat into out/[chat]",
        "chat: committed after 3 min 20 s",
        "[2/2] code into out/code",
        "code: failed after 1.5 s: no room",
    ]
    assert sum("solved" in line for line in logged(caplog)) == 2 * 8
    assert caplog.records[-1].levelname == "ERROR"


def test_a_terminal_shows_the_bars_of_one_recipe_only() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, no_color=True, legacy_windows=False)
    with TerminalProgress(console) as bar:
        for event in BATCH:
            bar(event)
        assert len(bar._progress.tasks) == 2
    text = stream.getvalue()
    for words in ("[1/2] chat into out/[chat]", "[2/2] code into out/code", "code: failed after 1.5 s: no room"):
        assert words in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("choice", "terminal", "kind"),
    [
        ("auto", True, TerminalProgress),
        ("auto", False, LogLines),
        ("bar", True, TerminalProgress),
        ("bar", False, TerminalProgress),
        ("lines", True, LogLines),
        ("lines", False, LogLines),
        ("json", True, JsonLines),
        ("json", False, JsonLines),
    ],
)
def test_a_user_chooses_the_form(choice: str, terminal: bool, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal() if terminal else io.StringIO()
    assert choice in CHOICES
    with listening(choice, stream) as listener:
        assert type(listener) is kind
        listener(PassStarted(name="measure", total_bytes=10, files=1))
    # Only a bar moves the cursor.
    assert ("\x1b[" in stream.getvalue()) == (kind is TerminalProgress)
