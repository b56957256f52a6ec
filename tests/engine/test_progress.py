"""What a run says of itself while it works."""

from __future__ import annotations

import pytest

from pipeline.engine.progress import Progress
from pipeline.events import Event, FileMeasured, FileWritten, Note, PassEnded, PassProgress, PassStarted


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def quiet() -> str:
    return ""


def test_phases_follow_the_passes(clock: Clock) -> None:
    heard: list[Event] = []
    progress = Progress(heard.append, quiet, clock)
    seen = [progress.snapshot()["phase"]]
    events: list[Event] = [
        PassStarted(name="measure", total_bytes=100, files=2),
        FileMeasured(file="a"),
        PassEnded(name="measure", seconds=1.0),
        PassStarted(name="iteration 4", total_bytes=100, files=2),
        PassEnded(name="iteration 4", seconds=1.0),
        PassStarted(name="write", total_bytes=100, files=2),
        FileWritten(file="a", size_bytes=5),
        PassEnded(name="write", seconds=1.0),
        Note(text="that's it"),
    ]
    for event in events:
        progress(event)
        state = progress.snapshot()
        seen.append(f"{state['phase']} {state['iteration'] or ''} {state['files_done']}/{state['files_total']}")
    assert heard == events
    assert seen == [
        "start",
        "measure  0/2",
        "measure  1/2",
        "solve  0/0",
        "solve 4 0/2",
        "solve 4 0/0",
        "write  0/2",
        "write  1/2",
        "commit  0/0",
        "commit  0/0",
    ]


def test_the_rate_is_that_of_the_last_half_minute(clock: Clock) -> None:
    progress = Progress(lambda _: None, quiet, clock)
    progress(PassStarted(name="measure", total_bytes=10_000, files=1))
    assert progress.snapshot()["rate"] is None
    # A minute at 10 bytes a second, then one at 100.
    done = 0
    for second in range(120):
        clock.now += 1.0
        done += 10 if second < 60 else 100
        progress(PassProgress(name="measure", done_bytes=done))
        if second == 59:
            assert progress.snapshot()["rate"] == pytest.approx(10.0)
    state = progress.snapshot()
    assert state["done_bytes"] == done == 6600
    assert state["rate"] == pytest.approx(100.0)
    assert state["seconds_left"] == pytest.approx((10_000 - 6600) / 100.0)
    # A stall lowers it, though no event comes.
    clock.now += 30.0
    assert progress.snapshot()["rate"] == pytest.approx(50.0)
    progress(PassEnded(name="measure", seconds=1.0))
    assert progress.snapshot()["rate"] is None
    assert progress.snapshot()["seconds_left"] is None


def test_a_pass_of_rare_news_has_a_rate(clock: Clock) -> None:
    progress = Progress(lambda _: None, quiet, clock)
    progress(PassStarted(name="write", total_bytes=1000, files=1))
    for _ in range(3):
        clock.now += 100.0
        progress(PassProgress(name="write", done_bytes=int(clock.now - 100.0)))
        assert progress.snapshot()["rate"] == pytest.approx(1.0)


def test_what_workers_wait_for_is_passed_on(clock: Clock) -> None:
    progress = Progress(lambda _: None, lambda: "worker 2 on 10.0.0.3", clock)
    assert progress.snapshot()["waiting_for"] == "worker 2 on 10.0.0.3"
