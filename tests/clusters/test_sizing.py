"""The README's sizing table is what planning computes now."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.clusters.sizing import LARGE, ROWS, table

README = Path(__file__).parents[2] / "clusters/README.md"


def test_the_table_is_the_one_that_is_computed() -> None:
    computed = table()
    assert len(computed.splitlines()) == 2 + len(ROWS)
    assert computed in README.read_text(), f"put this into {README}:\n{computed}"


def test_workers_that_would_idle_are_refused() -> None:
    row = dataclasses.replace(ROWS[0], workers=5)
    with pytest.raises(ValueError, match="5 workers for 4 files"):
        table([row])


def test_a_node_takes_one_worker_a_core_at_most() -> None:
    assert LARGE.holds(1_000_000_000) == LARGE.cores
    assert LARGE.holds(50_000_000_000) == 2
