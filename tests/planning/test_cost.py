"""Projected bytes and seconds, against the bytes of the files and those that a merge reads."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.merging import Planned, Resources, load_recipe, merge, plan_merge
from pipeline.planning.cost import Rates, project_cost
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan
from pipeline.planning.traffic import alias_bytes, input_bytes, written_points
from pipeline.storage import open_store
from tests.planning.plans import SMALL_SHAPES, plan_of, small_family, tensor
from tests.support.families import make_family

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
    assert written_points(plan) == (plan.points if factor == 4 else plan.models)
    assert project_cost(plan, memory(), workers=1, rates=None).reread_bytes == factor * MODEL_BYTES


def test_the_base_is_read_again_to_repair_models(tmp_path: Path) -> None:
    plan = plan_of(small_family(tmp_path).recipe(pipeline={"non_finite": "base"}))
    assert written_points(plan) == plan.points


def test_what_is_kept_in_memory_is_not_read_again(tmp_path: Path) -> None:
    plan = plan_of(small_family(tmp_path).recipe())
    assert [file.fused for file in plan.files] == [True]
    half = project_cost(plan, memory(MODEL_BYTES), workers=1, rates=None)
    assert half.reread_bytes == 2 * MODEL_BYTES
    assert half.passes == 1.5
    # One file is one worker's: the other's room is of no use.
    two_workers = project_cost(plan, memory(MODEL_BYTES), workers=2, rates=None)
    assert two_workers.reread_bytes == 2 * MODEL_BYTES
    all_kept = project_cost(plan, memory(10**9), workers=1, rates=None)
    assert all_kept.reread_bytes == 0
    assert all_kept.passes == 1.0
    assert all_kept.measure_bytes == 4 * MODEL_BYTES


def test_files_of_one_group_share_the_room_of_their_worker(tmp_path: Path) -> None:
    plan = plan_of(small_family(tmp_path).recipe(pipeline={"file_size": "300B"}))
    assert len(plan.files) > 2
    assert not any(file.fused for file in plan.files)
    for workers, left in ((1, 2), (2, 1), (3, 0), (9, 0)):
        cost = project_cost(plan, memory(MODEL_BYTES), workers=workers, rates=None)
        assert cost.reread_bytes == left * MODEL_BYTES
        assert cost.measure_bytes == 4 * MODEL_BYTES
        assert cost.passes == 1 + left / 4


@pytest.mark.parametrize("file_size", ["300B", "5GB"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_group_of_a_fused_file_has_the_room_to_itself(tmp_path: Path, file_size: str, workers: int) -> None:
    plan = plan_of(small_family(tmp_path).recipe(pipeline={"scope": "tensor", "file_size": file_size}))
    assert all(file.fused for file in plan.files)
    room = 200
    # Three models of four bytes an element; tensors of 64, 24, 16, 24, 16, 4 and 64 elements.
    left = sum(max(0, 3 * 4 * elements - room) for elements in (64, 24, 16, 24, 16, 4, 64))
    assert left == 2 * 568 + 2 * 88
    # A tensor of one chunk is measured and written by one read.
    assert project_cost(plan, memory(0), workers=workers, rates=None).reread_bytes == 0
    chunked = dataclasses.replace(plan, chunk_elements=8)
    cost = project_cost(chunked, memory(room), workers=workers, rates=None)
    assert cost.reread_bytes == left
    assert cost.passes == round((4 * MODEL_BYTES + left) / (4 * MODEL_BYTES), 3)


# Layers of one size, so that it does not matter which of them are kept.
LAYERS, LAYER_ELEMENTS = 6, 32 * 32
EVEN_SHAPES = {f"model.layers.{layer}.mlp.weight": (32, 32) for layer in range(LAYERS)}


def planned_with_room(recipe: Path, output: Path, room_bytes: int) -> tuple[Planned, Resources]:
    """The plan with the budget of one worker that leaves exactly this room to keep chunks in."""
    high = 700_000_000
    read, store = load_recipe(str(recipe))[0], open_store(str(output))
    roomy = plan_merge(read, store, Resources(memory_bytes=high, executor="local"), probe=False).memory
    low = roomy.total_bytes - roomy.terms["retained"]
    while low < high:
        middle = (low + high) // 2
        planned = plan_merge(read, store, Resources(memory_bytes=middle, executor="local"), probe=False)
        low, high = (middle + 1, high) if planned.memory.retained_bytes < room_bytes else (low, middle)
    resources = Resources(memory_bytes=low, executor="local")
    planned = plan_merge(read, store, resources, probe=False)
    assert planned.memory.retained_bytes == room_bytes
    return planned, resources


@pytest.mark.parametrize(
    ("keys", "kept_chunks", "at_once"),
    [
        # One group in files of its own: its chunks share the room.
        ({"scope": "model", "file_size": "9KB"}, (0, 1, 4, 6), 6),
        # One group in one file, which is measured and written in one go.
        ({"scope": "model"}, (0, 1, 4, 6), 6),
        # Each tensor is one chunk, measured and written by one read whatever the room.
        ({"scope": "tensor"}, (0, 1), 0),
        ({"scope": "tensor", "file_size": "9KB"}, (0, 1), 0),
        # The base is read again, and kept.
        ({"scope": "model", "file_size": "9KB", "scale": 0.5}, (0, 1, 4, 6), 6),
        ({"scope": "tensor", "scale": 0.5}, (0, 1), 0),
    ],
)
def test_a_merge_reads_what_was_projected(
    tmp_path: Path, keys: Mapping[str, object], kept_chunks: tuple[int, ...], at_once: int
) -> None:
    family = make_family(tmp_path, 3, shapes=EVEN_SHAPES)
    recipe = family.recipe(pipeline=keys)
    again = 4 if "scale" in keys else 3
    for chunks in kept_chunks:
        output = tmp_path / f"out{chunks}"
        planned, resources = planned_with_room(recipe, output, chunks * again * 4 * LAYER_ELEMENTS)
        reread = LAYERS * (at_once - chunks) // at_once if at_once else 0
        expected = 4 * LAYER_ELEMENTS * (4 * LAYERS + again * reread)
        assert planned.cost.read_bytes == expected
        report = merge(str(recipe), str(output), resources=resources)
        assert report["bytes_read"] == expected
        assert report["bytes_reused_from_memory"] == 4 * LAYER_ELEMENTS * again * (LAYERS - reread)
        assert report["passes"] == planned.cost.passes == round(expected / (16 * LAYERS * LAYER_ELEMENTS), 3)


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
    started = dataclasses.replace(rates, start_s=0.5)
    found = project_cost(plan, memory(), workers=1, rates=started).seconds
    assert list(found.items()) == [("start", 0.5), ("measure", 4.0), ("write", 1.0)]


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
