"""The document of `geomerge plan`."""

import json
from pathlib import Path

import pytest

from pipeline.planning.cost import Rates, project_cost
from pipeline.planning.memory import project_memory
from pipeline.reporting.plan_view import plan_summary
from tests.planning.plans import SMALL_SHAPES, plan_of, small_family

KEYS = {
    "fingerprint", "method", "scope", "models", "base_model", "tensors", "copied_tensors", "elements",
    "chunk_elements", "chunks", "groups", "files", "bytes_to_read", "bytes_to_write", "passes", "workers",
    "threads_per_worker", "memory_per_worker", "seconds", "rates", "planning_seconds", "notes",
}  # fmt: skip


@pytest.mark.parametrize("base", [True, False])
def test_the_document_is_the_plan(tmp_path: Path, base: bool) -> None:
    family = small_family(tmp_path)
    plan = plan_of(family.recipe(base=base, pipeline={"scope": "block", "file_size": "400B"}))
    memory = project_memory(plan, budget_bytes=800_000_000, threads=2)
    rates = Rates(measure=2e9, write=1.5e9, source="given")
    cost = project_cost(plan, memory, workers=2, rates=rates)
    found = plan_summary(plan, memory, cost, rates, 2, 0.123456)
    assert set(found) == KEYS
    assert json.loads(json.dumps(found)) == found
    assert found["fingerprint"] == plan.fingerprint
    assert found["models"] == [str(path) for path in family.models]
    assert found["base_model"] == (str(family.base) if base else None)
    assert (found["tensors"], found["copied_tensors"]) == (len(SMALL_SHAPES), 0)
    assert found["elements"] == sum(group["elements"] for group in found["groups"]) == 212
    assert found["chunks"] == len(SMALL_SHAPES)  # all shorter than a chunk
    assert len(found["files"]) == len(plan.files) > 1
    assert sum(file["bytes"] for file in found["files"]) == found["bytes_to_write"] == 4 * 212
    assert sum(file["tensors"] for file in found["files"]) == len(SMALL_SHAPES)
    assert [file["one_read"] for file in found["files"]] == [file.fused for file in plan.files]
    assert found["memory_per_worker"]["total"] == sum(found["memory_per_worker"]["terms"].values())
    assert found["bytes_to_read"] == cost.read_bytes
    assert found["passes"] == cost.passes
    assert set(found["seconds"]) == {"measure", "write"}
    assert found["rates"] == "given: measure 2.00 GB/s, write 1.50 GB/s of input"
    assert found["planning_seconds"] == 0.123
    assert found["workers"] == 2
    assert found["notes"] == list(plan.notes)


def test_without_rates_there_are_no_seconds(tmp_path: Path) -> None:
    plan = plan_of(small_family(tmp_path).recipe())
    memory = project_memory(plan, budget_bytes=800_000_000, threads=1)
    found = plan_summary(plan, memory, project_cost(plan, memory, workers=1, rates=None), None, 1, 0.0)
    assert (found["seconds"], found["rates"]) == ({}, "unknown")
