"""Events, logs and errors as JSON lines."""

import io
import json
import logging
import subprocess
import sys
import threading
from datetime import UTC, datetime
from typing import Any

import pytest

from pipeline.errors import Problem, RecipeError
from pipeline.events import Committed, Note, PassProgress, PassStarted
from pipeline.reporting import json_lines
from pipeline.reporting.batch_view import RecipeEnded, RecipeStarted
from pipeline.reporting.json_lines import JsonLines, JsonLogs, error_fields, only_lines, write_line


def read(stream: io.StringIO) -> list[dict[str, Any]]:
    """The lines without their times, which must be of now."""
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    for line in lines:
        assert next(iter(line)) == "time"
        moment = datetime.fromisoformat(line.pop("time"))
        assert abs((datetime.now(UTC) - moment).total_seconds()) < 60
    return lines


def test_every_event_is_a_line() -> None:
    stream = io.StringIO()
    lines = JsonLines(stream)
    lines(PassStarted(name="measure", total_bytes=10, files=2))
    lines(Committed(location="/out/\n[x]"))
    assert read(stream) == [
        {"event": "PassStarted", "name": "measure", "total_bytes": 10, "files": 2},
        {"event": "Committed", "location": "/out/\n[x]"},
    ]


def test_progress_comes_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(json_lines.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    lines = JsonLines(stream)
    for step in range(8):
        lines(PassProgress(name="measure", done_bytes=step))
        clock[0] += 0.25
    assert [line["done_bytes"] for line in read(stream)] == [0, 4]


def test_in_a_batch_a_line_names_the_recipe() -> None:
    stream = io.StringIO()
    lines = JsonLines(stream)
    lines(Note(text="before"))
    lines(RecipeStarted(recipe="chat", output="out/chat", number=1, count=2))
    lines(Note(text="inside"))
    lines(RecipeEnded(recipe="chat", state="committed", seconds=1.5, error=""))
    lines(Note(text="after"))
    assert [line.get("recipe") for line in read(stream)] == [None, "chat", "chat", "chat", None]


def test_what_libraries_log_has_the_same_form() -> None:
    stream = io.StringIO()
    logger = logging.getLogger("tests.json_lines")
    logger.propagate = False
    handler = JsonLogs(stream)
    logger.addHandler(handler)
    try:
        logger.warning("%d tries for\n%s", 3, "x")
    finally:
        logger.removeHandler(handler)
    assert read(stream) == [
        {"event": "Log", "level": "WARNING", "logger": "tests.json_lines", "text": "3 tries for\nx"}
    ]


def test_an_error_has_all_its_problems() -> None:
    fields = error_fields(RecipeError(Problem(what="one", where="here", remedy="do"), Problem(what="two")))
    assert fields == {
        "event": "Error",
        "exit_code": 2,
        "problems": [{"what": "one", "where": "here", "remedy": "do"}, {"what": "two", "where": "", "remedy": ""}],
    }


def test_lines_of_many_threads_stay_whole() -> None:
    stream = io.StringIO()
    threads = [
        threading.Thread(target=lambda: [write_line(stream, {"event": "E", "text": "x" * 999}) for _ in range(50)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(stream) == [{"event": "E", "text": "x" * 999}] * 400


def test_a_reader_that_went_away_does_not_end_a_merge() -> None:
    class Broken(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    JsonLines(Broken())(Note(text="nobody hears this"))


def test_what_reaches_the_descriptor_becomes_lines() -> None:
    """As the C++ parts of libraries and child processes write."""
    code = """
import os, subprocess, sys
from pipeline.reporting.json_lines import only_lines, write_line
with only_lines(sys.stderr) as lines:
    write_line(lines, {"event": "First"})
    os.write(2, b"one \\xff\\n\\ntwo")
    subprocess.run(["sh", "-c", "echo three >&2"])
    print("four", file=sys.stderr)
    write_line(lines, {"event": "Last"})
print("five", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, after = done.stderr.splitlines()
    found = [json.loads(line) for line in lines]
    assert {line["event"] for line in found} == {"First", "Last", "Log"}
    assert [line["text"] for line in found if line["event"] == "Log"] == ["one \ufffd", "twothree", "four"]
    assert after == "five"


def test_a_stream_without_a_descriptor_is_left_as_it_is() -> None:
    stream = io.StringIO()
    with only_lines(stream) as lines:
        assert lines is stream
