"""What is told of a store that is waited for: once when it lasts, once when it is over."""

from __future__ import annotations

import logging
import uuid
from types import SimpleNamespace

import pytest

from pipeline.storage import waiting
from pipeline.storage.waiting import Waiting


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def place() -> str:
    return f"s3://{uuid.uuid4().hex}"


def test_an_outage_is_told_once_for_all_requests_and_once_when_it_is_over(
    clock: Clock, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [Waiting(place) for _ in range(3)]
    for seconds in (2, 10, 20):
        clock.now_s = 1000.0 + seconds
        for request in requests:
            request.failed("connection refused")
    for request in requests:
        request.succeeded()
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, f"waiting for {place} since 10 s: connection refused"),
        (logging.WARNING, f"{place} answers again after 20 s"),
    ]


def test_short_faults_are_not_told(clock: Clock, place: str, caplog: pytest.LogCaptureFixture) -> None:
    request = Waiting(place)
    clock.now_s += 9
    request.failed("busy")
    request.succeeded()
    assert not caplog.records


def test_another_place_has_outages_of_its_own(clock: Clock, place: str, caplog: pytest.LogCaptureFixture) -> None:
    one, other, unharmed = Waiting(place), Waiting(f"{place}2"), Waiting(place)
    clock.now_s += 30
    one.failed("a")
    other.failed("b")
    # It was on its way before the outage, and says nothing of it.
    unharmed.succeeded()
    other.succeeded()
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for {place} since 30 s: a",
        f"waiting for {place}2 since 30 s: b",
        f"{place}2 answers again after 30 s",
    ]
    one.gave_up()


def test_after_giving_up_the_next_outage_is_told_anew(
    clock: Clock, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        request = Waiting(place)
        clock.now_s += 30
        request.failed("down")
        request.gave_up()
    assert [record.getMessage() for record in caplog.records] == [f"waiting for {place} since 30 s: down"] * 2


def test_one_object_that_fails_beside_others_is_told_once(
    clock: Clock, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    lasting = Waiting(place)
    for _ in range(5):
        other = Waiting(place)
        clock.now_s += 12
        lasting.failed("damaged")
        other.failed("busy")
        other.succeeded()
    assert sum("damaged" in record.getMessage() for record in caplog.records) == 1
