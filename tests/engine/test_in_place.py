"""Local inputs that are looked at where the operating system holds them: the same bits, and no file changes unseen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.engine import chunk_tasks
from pipeline.engine.source import ChunkSource
from pipeline.errors import CheckpointError, PipelineError
from pipeline.merging import Resources, merge
from pipeline.planning.grid import Chunk
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan
from pipeline.storage.bus_errors import bus_errors
from tests.planning.plans import plan_of, small_family
from tests.support.families import Family
from tests.support.reference import digests

pytestmark = pytest.mark.skipif(bus_errors() is None, reason="files are only mapped on 64-bit Linux")

# Several pages, so that some lie beyond where a file is cut.
SHAPES = {"a": (64, 128), "b": (30,)}


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return small_family(tmp_path, shapes=SHAPES)


@pytest.fixture
def plan(family: Family) -> Plan:
    return plan_of(family.recipe())


def source_of(plan: Plan, in_place_bytes: int = 1 << 20) -> ChunkSource:
    memory = Memory(terms={}, threads=1, window=1, retained_bytes=0, in_place_bytes=in_place_bytes)
    return ChunkSource(plan, memory)


def chunk(plan: Plan) -> Chunk:
    index = [item.name for item in plan.tensors].index("a")
    return Chunk(tensor=index, start=0, stop=64 * 128)


def file_of(plan: Plan, index: int) -> Path:
    return Path(plan.inputs[index].url) / plan.inputs[index].files[0].path


def test_a_lease_holds_the_files_own_bytes(family: Family, plan: Plan) -> None:
    source = source_of(plan)
    for _ in range(2):
        with source.lease(chunk(plan), plan.points) as loaded:
            values = [family.base_values, *family.values]
            assert [loaded.raw[index].tobytes() for index in range(4)] == [v["a"].numpy().tobytes() for v in values]
            assert not any(loaded.raw[index].flags.writeable for index in range(4))
    assert source.read_bytes == 2 * 4 * 4 * 64 * 128
    source.close()


def test_without_room_everything_is_read(plan: Plan) -> None:
    source = source_of(plan, in_place_bytes=0)
    with source.lease(chunk(plan), plan.points) as loaded:
        assert all(loaded.raw[index].flags.writeable for index in range(4))
    source.close()


def look(source: ChunkSource, plan: Plan, inputs: tuple[int, ...], meanwhile: Callable[[Path], None]) -> None:
    """Lease a chunk, do something to the first input's file, and look at the chunk's end."""
    with source.lease(chunk(plan), inputs) as loaded:
        meanwhile(file_of(plan, inputs[0]))
        assert not loaded.raw[inputs[0]][8192:].any()


def cut(path: Path) -> None:
    os.truncate(path, 4096)


def test_a_file_that_is_cut_short_while_it_is_looked_at_is_named(plan: Plan) -> None:
    source = source_of(plan)
    with pytest.raises(CheckpointError, match="changed since the merge was planned") as caught:
        look(source, plan, (2, 0, 1, 3), cut)
    (problem,) = caught.value.problems
    assert problem.where is not None
    assert plan.inputs[2].name in problem.where
    # With a window of one a buffer that was not given back would block this one for ever.
    with pytest.raises(CheckpointError):
        look(source, plan, (1,), cut)
    source.close()


def test_a_page_that_is_lost_without_a_change_is_told_too(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(plan)
    # As where a disk fails for a moment.
    monkeypatch.setattr(source, "check_versions", lambda _: None)
    with pytest.raises(CheckpointError, match="its disk failed") as caught:
        look(source, plan, (1, 3), cut)
    assert [problem.where for problem in caught.value.problems] == [
        f"model {plan.inputs[index].name}, file {plan.inputs[index].files[0].path}" for index in (1, 3)
    ]
    source.close()


def test_a_merge_ends_with_an_error_when_an_input_is_cut_short_under_it(
    family: Family, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, output = family.recipe(), tmp_path / "out"
    whole = chunk_tasks.chunk_checksums

    def cut_first(*args: object) -> tuple[int, ...]:
        os.truncate(file_of(plan, 3), 4096)
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(chunk_tasks, "chunk_checksums", cut_first)
    # What was still to be read tells it by itself.
    with pytest.raises(PipelineError, match=r"changed since the merge was planned|shorter than its header"):
        merge(str(recipe), str(output), resources=Resources(workers=1))
    assert not list(output.glob("*.safetensors*"))


def test_the_bits_are_those_of_reads(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = family.recipe()
    merge(str(recipe), str(tmp_path / "in_place"), resources=Resources(workers=1))
    monkeypatch.setattr("pipeline.planning.memory.IN_PLACE_BYTES", 0)
    merge(str(recipe), str(tmp_path / "read"), resources=Resources(workers=1))
    assert digests(tmp_path / "in_place") == digests(tmp_path / "read")
