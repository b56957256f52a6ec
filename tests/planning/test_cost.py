"""Projected bytes and seconds, against the bytes of the files."""

from pathlib import Path

import pytest

from pipeline.planning.cost import Rates, alias_bytes, input_bytes, project_cost, written_inputs
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan
from tests.planning.plans import SMALL_SHAPES, plan_of, small_family, tensor

# Elements of a model of the family, all of them float32.
ELEMENTS = sum(int(rows) * (columns[0] if columns else 1) for rows, *columns in SMALL_SHAPES.values())
MODEL_BYTES = 4 * ELEMENTS


def memory(retained_bytes: int = 0) -> Memory:
    return Memory(terms={}, threads=1, window=2, retained_bytes=retained_bytes)


def test_the_family_is_as_reckoned() -> None:
    assert ELEMENTS == 64 + 24 + 16 + 24 + 16 + 4 + 64


def test_bytes_of_one_tensor() -> None:
    item = tensor("t", 10, inputs=("BF16", "F32", "F64"))
    assert input_bytes(item, (0, 1, 2)) == 10 * (2 + 4 + 8)
    assert input_bytes(item, (1, 1, 0, 1)) == 10 * (2 + 4)  # an input that plays two parts is read once
    assert input_bytes(item, ()) == 0
    assert alias_bytes(item) == 0


def test_a_median_reads_twice_and_writes_once(tmp_path: Path) -> None:
    plan = plan_of(small_family(tmp_path).recipe())
    cost = project_cost(plan, memory(), workers=1, rates=None)
    assert cost.measure_bytes == 4 * MODEL_BYTES  # base and three models
    assert cost.reread_bytes == 3 * MODEL_BYTES  # the base has coefficient 0
    assert cost.read_bytes == 7 * MODEL_BYTES
    assert cost.written_bytes == MODEL_BYTES
    assert cost.passes == 1.75
    assert cost.seconds == {}


@pytest.mark.parametrize(("scale", "factor"), [(1.0, 3), (0.5, 4), ("norm", 4), ("median_norm", 4)])
def test_the_base_is_read_again_only_when_it_is_written(tmp_path: Path, scale: object, factor: int) -> None:
    plan = plan_of(small_family(tmp_path).recipe(pipeline={"scale": scale}))
    assert written_inputs(plan) == (plan.points if factor == 4 else plan.models)
    assert project_cost(plan, memory(), workers=1, rates=None).reread_bytes == factor * MODEL_BYTES


def test_the_base_is_read_again_to_repair_models(tmp_path: Path) -> None:
    plan = plan_of(small_family(tmp_path).recipe(pipeline={"non_finite": "base"}))
    assert written_inputs(plan) == plan.points


def test_what_is_kept_in_memory_is_not_read_again(tmp_path: Path) -> None:
    plan = plan_of(small_family(tmp_path).recipe())
    half = project_cost(plan, memory(MODEL_BYTES), workers=1, rates=None)
    assert half.reread_bytes == 2 * MODEL_BYTES
    assert half.passes == 1.5
    two_workers = project_cost(plan, memory(MODEL_BYTES), workers=2, rates=None)
    assert two_workers.reread_bytes == MODEL_BYTES
    all_kept = project_cost(plan, memory(10**9), workers=1, rates=None)
    assert all_kept.reread_bytes == 0
    assert all_kept.passes == 1.0
    assert all_kept.measure_bytes == 4 * MODEL_BYTES


def test_an_average_reads_once(tmp_path: Path) -> None:
    plan = plan_of(small_family(tmp_path).recipe("linear"))
    cost = project_cost(plan, memory(10**9), workers=1, rates=None)
    assert (cost.measure_bytes, cost.reread_bytes, cost.passes) == (0, 3 * MODEL_BYTES, 1.0)
    rates = Rates(measure=1.0, write=MODEL_BYTES / 2, source="given")
    assert project_cost(plan, memory(), workers=1, rates=rates).seconds == {"write": 6.0}


def test_seconds_follow_from_the_rates(tmp_path: Path) -> None:
    plan = plan_of(small_family(tmp_path).recipe())
    rates = Rates(measure=MODEL_BYTES, write=3 * MODEL_BYTES, source="given")
    assert project_cost(plan, memory(), workers=1, rates=rates).seconds == {"measure": 4.0, "write": 1.0}


def test_tied_copies_are_read_once_more_and_not_written(tmp_path: Path) -> None:
    family = small_family(tmp_path, config={"tie_word_embeddings": True})
    embedding = 4 * 64
    for method, first in (("geometric_median", True), ("linear", False)):
        plan: Plan = plan_of(family.recipe(method))
        cost = project_cost(plan, memory(), workers=1, rates=None)
        # An average never reads the base's data, its tied copy is counted all the same: an upper bound.
        assert cost.measure_bytes == (4 * MODEL_BYTES if first else 0)
        assert cost.reread_bytes == 3 * (MODEL_BYTES - embedding) + (0 if first else 4 * embedding)
        assert cost.written_bytes == MODEL_BYTES - embedding
