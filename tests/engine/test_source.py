"""Chunks from real files: what is read, what is kept, and what is refused."""

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from pipeline.engine.read_checks import check_agreement, check_sums
from pipeline.engine.source import ChunkSource
from pipeline.errors import CheckpointError, StorageError, VerificationError
from pipeline.planning.grid import Chunk
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan
from pipeline.storage.local import LocalStore
from tests.planning.plans import plan_of, small_family
from tests.support.families import Family, save_model

SHAPES = {"a": (10, 10), "b": (30,)}


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return small_family(tmp_path, shapes=SHAPES)


@pytest.fixture
def plan(family: Family) -> Plan:
    return plan_of(family.recipe())


def source_of(plan: Plan, *, window: int = 2, retained_bytes: int = 0) -> ChunkSource:
    return ChunkSource(plan, Memory(terms={}, threads=1, window=window, retained_bytes=retained_bytes))


def chunk(plan: Plan, name: str, start: int = 0, stop: int = 30) -> Chunk:
    index = [item.name for item in plan.tensors].index(name)
    return Chunk(tensor=index, start=start, stop=stop)


def wanted(family: Family, name: str, start: int, stop: int) -> list[bytes]:
    """The bytes of a chunk by input, from the values the files were made of."""
    values = [family.base_values, *family.values]
    return [value[name].flatten()[start:stop].numpy().tobytes() for value in values]


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (0, 1), (17, 18), (99, 100), (3, 64)])
def test_a_lease_holds_the_bytes_of_its_range(family: Family, plan: Plan, start: int, stop: int) -> None:
    source = source_of(plan)
    with source.lease(chunk(plan, "a", start, stop), plan.points) as loaded:
        assert sorted(loaded.raw) == [0, 1, 2, 3]
        assert [loaded.raw[index].tobytes() for index in range(4)] == wanted(family, "a", start, stop)
    assert source.read_bytes == 4 * 4 * (stop - start)
    assert source.reused_bytes == 0
    source.close()


def test_only_the_inputs_that_were_asked_for_are_read_and_each_once(family: Family, plan: Plan) -> None:
    source = source_of(plan)
    with source.lease(chunk(plan, "b"), (2, 1, 2, 2)) as loaded:
        assert list(loaded.raw) == [2, 1]
        assert loaded.raw[2].tobytes() == wanted(family, "b", 0, 30)[2]
    assert source.read_bytes == 2 * 120


def test_arrays_are_aligned_disjoint_and_their_buffer_comes_back(plan: Plan) -> None:
    source = source_of(plan, window=1)
    for stop in (3, 7, 30):
        # With a window of one a buffer that is not given back would block the next lease for ever.
        with source.lease(chunk(plan, "b", 0, stop), plan.points) as loaded:
            places = sorted((array.ctypes.data, array.nbytes) for array in loaded.raw.values())
            assert all(address % 64 == 0 for address, _ in places)
            assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(places))
            assert all(torch.from_numpy(array).view(torch.float32).numel() == stop for array in loaded.raw.values())


def test_a_lease_waits_for_a_buffer(plan: Plan) -> None:
    source = source_of(plan, window=1)
    entered = threading.Event()

    def second() -> None:
        with source.lease(chunk(plan, "b"), (0,)):
            entered.set()

    with ThreadPoolExecutor(1) as pool:
        with source.lease(chunk(plan, "a"), (0,)):
            future = pool.submit(second)
            assert not entered.wait(0.05)
        future.result(timeout=30)
    assert entered.is_set()


def test_a_failing_body_gives_the_buffer_back(plan: Plan) -> None:
    source = source_of(plan, window=1)
    for _ in range(3):
        with pytest.raises(KeyError), source.lease(chunk(plan, "b"), (0,)):
            raise KeyError
    assert source.read_bytes == 3 * 120


def test_what_is_kept_is_not_read_again(family: Family, plan: Plan) -> None:
    source = source_of(plan, retained_bytes=3 * 120)  # the base is not read again, and not kept
    with source.lease(chunk(plan, "b"), plan.points, keep=True) as loaded:
        assert source.read_bytes == 4 * 120
        assert list(loaded.raw) == [0, 1, 2, 3]
        assert [loaded.raw[index].tobytes() for index in range(4)] == wanted(family, "b", 0, 30)
    with source.lease(chunk(plan, "b"), plan.models, drop=True) as loaded:
        assert [loaded.raw[index].tobytes() for index in (1, 2, 3)] == wanted(family, "b", 0, 30)[1:]
    assert (source.read_bytes, source.reused_bytes) == (4 * 120, 3 * 120)
    # Dropped: the next is read again.
    with source.lease(chunk(plan, "b"), plan.models):
        pass
    assert (source.read_bytes, source.reused_bytes) == (7 * 120, 3 * 120)


def test_kept_bytes_survive_other_leases(family: Family, plan: Plan) -> None:
    source = source_of(plan, window=1, retained_bytes=3 * 120)
    with source.lease(chunk(plan, "b"), plan.points, keep=True):
        pass
    for start in range(0, 90, 10):
        with source.lease(chunk(plan, "a", start, start + 10), plan.points):
            pass
    with source.lease(chunk(plan, "b"), plan.points) as loaded:
        assert [loaded.raw[index].tobytes() for index in range(4)] == wanted(family, "b", 0, 30)
    assert source.reused_bytes == 3 * 120


@pytest.mark.parametrize(
    ("keys", "kept"), [({}, 3), ({"scale": 0.5}, 4), ({"scale": "norm"}, 4), ({"non_finite": "base"}, 4)]
)
def test_the_base_is_kept_only_where_it_is_read_again(family: Family, keys: dict[str, object], kept: int) -> None:
    plan = plan_of(family.recipe(pipeline=keys))
    source = source_of(plan, window=1, retained_bytes=kept * 120)
    for _ in range(2):
        with source.lease(chunk(plan, "b"), plan.points, keep=True) as loaded:
            assert [loaded.raw[index].tobytes() for index in range(4)] == wanted(family, "b", 0, 30)
    assert (source.read_bytes, source.reused_bytes) == ((8 - kept) * 120, kept * 120)
    # One byte less is no room for the chunk.
    source = source_of(plan, window=1, retained_bytes=kept * 120 - 1)
    for _ in range(2):
        with source.lease(chunk(plan, "b"), plan.points, keep=True):
            pass
    assert (source.read_bytes, source.reused_bytes) == (8 * 120, 0)


def test_a_lease_yields_only_what_is_asked_for_of_what_is_kept(family: Family, plan: Plan) -> None:
    source = source_of(plan, retained_bytes=3 * 120)
    with source.lease(chunk(plan, "b"), plan.points, keep=True):
        pass
    with source.lease(chunk(plan, "b"), (3, 0)) as loaded:
        assert list(loaded.raw) == [3, 0]
        assert [loaded.raw[index].tobytes() for index in (0, 3)] == wanted(family, "b", 0, 30)[::3]
    assert (source.read_bytes, source.reused_bytes) == (5 * 120, 120)
    # What was not asked for is dropped with the rest, and its room comes back.
    for drop in (True, False):
        with source.lease(chunk(plan, "b"), (3,), drop=drop):
            pass
    assert (source.read_bytes, source.reused_bytes) == (6 * 120, 2 * 120)
    for _ in range(2):
        with source.lease(chunk(plan, "b"), plan.models, keep=True):
            pass
    assert (source.read_bytes, source.reused_bytes) == (9 * 120, 5 * 120)


def test_no_more_is_kept_than_there_is_room_for(plan: Plan) -> None:
    """Room for two chunks of ten elements of three models; a third is read each time, and the base always."""
    source = source_of(plan, retained_bytes=2 * 120 + 119)
    starts = range(0, 50, 10)

    def read_all(**how: bool) -> int:
        before = source.read_bytes
        for start in starts:
            with source.lease(chunk(plan, "a", start, start + 10), plan.points, **how):
                pass
        return source.read_bytes - before

    assert read_all(keep=True) == 5 * 160
    assert read_all(keep=True) == 5 * 160 - 2 * 120
    assert source.reused_bytes == 2 * 120
    assert read_all(drop=True) == 5 * 160 - 2 * 120
    # The room is free again, and not larger than before.
    assert read_all(keep=True) == 5 * 160
    assert read_all(keep=True) == 5 * 160 - 2 * 120


def test_nothing_is_kept_without_room_or_without_being_told(plan: Plan) -> None:
    for source, keep in ((source_of(plan), True), (source_of(plan, retained_bytes=10**6), False)):
        for _ in range(2):
            with source.lease(chunk(plan, "b"), plan.points, keep=keep):
                pass
        assert (source.read_bytes, source.reused_bytes) == (2 * 480, 0)


def test_inputs_that_join_later_are_kept_beside_the_others(plan: Plan) -> None:
    source = source_of(plan, retained_bytes=360)
    with source.lease(chunk(plan, "b"), (1, 2), keep=True):
        pass
    with source.lease(chunk(plan, "b"), (0, 1, 2, 3), keep=True) as loaded:
        assert sorted(loaded.raw) == [0, 1, 2, 3]
    assert source.read_bytes == 480
    with source.lease(chunk(plan, "b"), (0, 1, 2, 3), drop=True):
        pass
    assert source.read_bytes == 480 + 120  # the base, which is never kept
    assert source.reused_bytes == 240 + 360
    with source.lease(chunk(plan, "a", 0, 30), plan.points, keep=True):
        pass
    with source.lease(chunk(plan, "a", 0, 30), plan.points):
        pass
    assert source.read_bytes == 2 * (480 + 120)
    assert source.reused_bytes == 240 + 2 * 360


def test_a_read_that_fails_leaves_no_buffer_and_no_room_behind(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(plan, window=1, retained_bytes=360)

    def broken(*_: object) -> None:
        raise StorageError

    for keep in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "read_into", broken)
            with pytest.raises(StorageError), source.lease(chunk(plan, "b"), plan.points, keep=keep):
                pass
    for _ in range(2):
        with source.lease(chunk(plan, "b"), plan.points, keep=True):
            pass
    assert (source.read_bytes, source.reused_bytes) == (480 + 120, 360)


def test_checksums_are_xxh3_as_a_table_can_hold_them(family: Family, plan: Plan) -> None:
    source = source_of(plan)
    with source.lease(chunk(plan, "a", 0, 100), plan.points) as loaded:
        for index, data in enumerate(wanted(family, "a", 0, 100)):
            assert loaded.checksum(index) % (1 << 64) == xxhash.xxh3_64_intdigest(data)
            assert -(1 << 63) <= loaded.checksum(index) < 1 << 63


def test_bytes_that_differ_from_the_first_read_are_found(family: Family, plan: Plan) -> None:
    source = source_of(plan)
    place = chunk(plan, "a", 10, 30)
    with source.lease(place, plan.points) as loaded:
        sums = [loaded.checksum(index) for index in range(4)]
        check_sums(plan, loaded, sums, {})
    path = family.models[1] / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[plan.tensors[place.tensor].sources[2].start + 4 * 29] ^= 1
    path.write_bytes(raw)
    with source.lease(place, plan.points) as loaded, pytest.raises(VerificationError) as caught:
        check_sums(plan, loaded, sums, {})
    (problem,) = caught.value.problems
    assert problem.where == f"model {family.models[1]}, tensor a, file model.safetensors"
    assert "elements 10 to 30" in problem.what
    # The neighbouring chunk is as it was, and an input that is not loaded is not asked for.
    with source.lease(chunk(plan, "a", 0, 10), (0, 1)) as loaded:
        check_sums(plan, loaded, [loaded.checksum(0), loaded.checksum(1), 0, 0], {})


@pytest.fixture
def integers(tmp_path: Path) -> Family:
    """Models whose integer tensor agrees; the caller may change one."""
    family = Family(root=tmp_path, base=tmp_path / "base")
    for folder in (family.base, tmp_path / "m0", tmp_path / "m1"):
        save_model(folder, {"w": torch.ones(4), "ids": torch.arange(8)})
    family.models = [tmp_path / "m0", tmp_path / "m1"]
    return family


def test_integers_are_kept_of_every_input(integers: Family) -> None:
    plan = plan_of(integers.recipe())
    source = source_of(plan, retained_bytes=3 * 64)
    for _ in range(2):
        with source.lease(chunk(plan, "ids", 0, 8), (0, 1, 2), keep=True) as loaded:
            check_agreement(plan, loaded)
    assert (source.read_bytes, source.reused_bytes) == (3 * 64, 3 * 64)


def test_integers_must_agree(integers: Family) -> None:
    plan = plan_of(integers.recipe())
    with source_of(plan).lease(chunk(plan, "ids", 0, 8), (0, 1, 2)) as loaded:
        check_agreement(plan, loaded)
    ids = torch.arange(8)
    ids[7] = 9
    save_model(integers.models[1], {"w": torch.ones(4), "ids": ids})
    plan = plan_of(integers.recipe())
    source = source_of(plan)
    with source.lease(chunk(plan, "ids", 0, 7), (0, 1, 2)) as loaded:
        check_agreement(plan, loaded)
    with source.lease(chunk(plan, "ids", 0, 8), (0, 1, 2)) as loaded, pytest.raises(CheckpointError) as caught:
        check_agreement(plan, loaded)
    (problem,) = caught.value.problems
    assert problem.where == f"model {integers.models[1]}, tensor ids"
    assert f"differs from the same tensor of {integers.base}" in problem.what
    assert "I64" in problem.what


def tied(root: Path, heads: list[torch.Tensor | None]) -> Plan:
    """A tied family; None stores no head, as transformers does."""
    embedding = torch.arange(32, dtype=torch.float32).reshape(8, 4)
    folders = []
    for number, head in enumerate(heads):
        weights = {"model.embed_tokens.weight": embedding, "w": torch.ones(3)}
        if head is not None:
            weights["lm_head.weight"] = head
        folders.append(save_model(root / f"m{number}", weights, config={"tie_word_embeddings": True}))
    return plan_of(Family(root=root, base=folders[0], models=folders[1:]).recipe())


def test_a_tied_copy_is_compared_and_counted(tmp_path: Path) -> None:
    same = torch.arange(32, dtype=torch.float32).reshape(8, 4)
    plan = tied(tmp_path, [None, same, same])
    source = source_of(plan)
    with source.lease(chunk(plan, "model.embed_tokens.weight", 5, 20), (0, 1, 2)) as loaded:
        before = source.read_bytes
        source.check_copies(loaded)
        assert source.read_bytes - before == 2 * 15 * 4
    with source.lease(chunk(plan, "w", 0, 3), (0, 1, 2)) as loaded:
        before = source.read_bytes
        source.check_copies(loaded)
        assert source.read_bytes == before
    with source.lease(chunk(plan, "model.embed_tokens.weight", 5, 20), (0,)) as loaded:
        before = source.read_bytes
        source.check_copies(loaded)
        assert source.read_bytes == before


def test_a_tied_copy_with_other_bytes_is_refused(tmp_path: Path) -> None:
    other = torch.arange(32, dtype=torch.float32).reshape(8, 4)
    other[7, 3] += 1e-5
    plan = tied(tmp_path, [None, None, other])
    source = source_of(plan)
    with source.lease(chunk(plan, "model.embed_tokens.weight", 0, 31), (0, 1, 2)) as loaded:
        source.check_copies(loaded)
    last = chunk(plan, "model.embed_tokens.weight", 31, 32)
    with source.lease(last, (0, 1, 2)) as loaded, pytest.raises(CheckpointError) as caught:
        source.check_copies(loaded)
    assert caught.value.problems[0].where == f"model {tmp_path / 'm2'}, tensor model.embed_tokens.weight"


def test_every_file_that_changed_since_planning_is_named(family: Family, plan: Plan) -> None:
    source = source_of(plan)
    everything = range(len(plan.tensors))
    source.check_versions(everything)
    os.utime(family.base / "model.safetensors", ns=(1, 1))
    grown = family.models[1] / "model.safetensors"
    grown.write_bytes(grown.read_bytes() + b"x")
    (family.models[2] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        source.check_versions(everything)
    places = [problem.where for problem in caught.value.problems]
    assert places == [f"model {path}, file model.safetensors" for path in (family.base, *family.models[1:])]
    assert f"{grown.stat().st_size} now" in caught.value.problems[1].what
    assert "absent now" in caught.value.problems[2].what


def test_only_the_files_that_hold_the_tensors_are_looked_at(tmp_path: Path) -> None:
    family = small_family(tmp_path, shapes={**SHAPES, "c": (7,)}, shards=3)
    plan = plan_of(family.recipe())
    source = source_of(plan)
    a, b, c = (chunk(plan, name).tensor for name in "abc")
    # Files lie in the order of the names: a in the first, b in the second, c in the third.
    touched = family.models[1] / "model-00002-of-00003.safetensors"
    gone = family.base / "model-00003-of-00003.safetensors"
    os.utime(touched, ns=(1, 1))
    gone.unlink()
    source.check_versions([])
    source.check_versions([a])
    for tensors, wanted_places in (
        ([b], [f"model {family.models[1]}, file {touched.name}"]),
        ([a, c], [f"model {family.base}, file {gone.name}"]),
        ([c, b, b], [f"model {family.base}, file {gone.name}", f"model {family.models[1]}, file {touched.name}"]),
    ):
        with pytest.raises(CheckpointError) as caught:
            source.check_versions(tensors)
        assert [problem.where for problem in caught.value.problems] == wanted_places


def test_concurrent_leases_get_their_own_bytes(family: Family, plan: Plan) -> None:
    source = source_of(plan, window=3, retained_bytes=500)
    truth = {start: wanted(family, "a", start, start + 10) for start in range(0, 100, 10)}

    def work(number: int) -> bool:
        start = number * 10 % 100
        with source.lease(chunk(plan, "a", start, start + 10), plan.points) as loaded:
            return [loaded.raw[index].tobytes() for index in range(4)] == truth[start]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    assert source.read_bytes == 200 * 160


def test_buffers_hold_the_widest_chunk_of_a_plan(tmp_path: Path) -> None:
    wide = save_model(tmp_path / "m0", {"w": torch.ones(1000, dtype=torch.float64)}, dtype=torch.float64)
    narrow = save_model(tmp_path / "m1", {"w": torch.ones(1000)}, dtype=torch.bfloat16)
    plan = plan_of(Family(root=tmp_path, base=narrow, models=[wide, narrow]).recipe())
    with source_of(plan).lease(chunk(plan, "w", 0, 1000), plan.points) as loaded:
        assert [loaded.raw[index].nbytes for index in (0, 1)] == [2000, 8000]
        assert np.all(loaded.raw[1].view(np.float64) == 1.0)
