"""Events as data."""

from __future__ import annotations

import json

import pytest

from pipeline import events
from pipeline.events import Event, GroupSolved, Note, PassStarted, to_json


@pytest.mark.parametrize(
    ("event", "wanted"),
    [
        (Note(text="ü"), {"event": "Note", "text": "ü"}),
        (
            PassStarted(name="measure", total_bytes=5, files=2),
            {"event": "PassStarted", "name": "measure", "total_bytes": 5, "files": 2},
        ),
        (
            GroupSolved(group="all", iterations=3, relative_gap=1e-12),
            {"event": "GroupSolved", "group": "all", "iterations": 3, "relative_gap": 1e-12},
        ),
    ],
)
def test_an_event_as_json(event: Event, wanted: dict[str, object]) -> None:
    assert to_json(event) == wanted
    assert json.loads(json.dumps(to_json(event))) == wanted


def test_no_event_has_a_field_that_hides_its_name() -> None:
    kinds = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)]
    assert len(kinds) > 5
    for kind in kinds:
        assert "event" not in kind.__dataclass_fields__
