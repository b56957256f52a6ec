"""Reading ahead: bounded, in order, everything announced is used, and the same bits as reading one by one."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import merging
from pipeline.engine.fetch import Fetch, Fetcher, Want
from pipeline.engine.read_ahead import ALIGNMENT, Held, Need, ReadAhead, Ring
from pipeline.errors import Problem, StorageError, WorkerError
from pipeline.merging import merge
from pipeline.planning.memory import project_memory
from pipeline.storage import open_store
from pipeline.storage.remote import FsspecStore
from tests.support.adapters import Layout, linears, make_adapters
from tests.support.families import Family, make_family


@given(st.integers(1, 20), st.lists(st.tuples(st.booleans(), st.integers(1, 400)), max_size=60))
def test_a_ring_hands_out_disjoint_aligned_parts_within_its_size(lines: int, steps: list[tuple[bool, int]]) -> None:
    ring = Ring(lines * ALIGNMENT)
    out = []
    for takes, number in steps:
        if takes:
            fits = ring.fits(number)
            place = ring.take(number)
            assert (place is not None) == fits
            # An empty ring has room for anything up to its size.
            assert fits or out or number > lines * ALIGNMENT
            if place is not None:
                out.append(place)
                view = ring.view(place)
                assert view.ctypes.data % ALIGNMENT == 0
                assert number <= view.nbytes <= max(number + ALIGNMENT - 1, ALIGNMENT)
        elif out:
            ring.give_back(out.pop(number % len(out)))
        places = sorted((place.start, place.stop) for place in out)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(places))
        assert all(0 <= start < stop <= lines * ALIGNMENT for start, stop in places)


class Shelf:
    """A holder of needs of one size each, with room for so many bytes."""

    def __init__(self, size_bytes: int, room_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.room_bytes = room_bytes
        self.held: list[int] = []
        self.lock = threading.Lock()

    def missing_bytes(self, need: Need) -> dict[int, int]:
        return {0: self.size_bytes}

    def fits(self, size_bytes: int) -> bool:
        return size_bytes <= self.room_bytes

    def hold(self, need: Need) -> Held | None:
        with self.lock:
            if self.size_bytes > self.room_bytes:
                return None
            self.room_bytes -= self.size_bytes
            self.held.append(need.tensor)
        buffer = np.zeros(self.size_bytes, dtype=np.uint8)
        want = Want(store=Still(), path="f", start=need.tensor * 10_000_000, buffer=buffer)  # type: ignore[arg-type]
        return Held(need=need, raw={0: (buffer,)}, wants=[want])

    def let_go(self, held: Held) -> None:
        with self.lock:
            self.room_bytes += self.size_bytes


class Still:
    """A store that reads nothing."""

    is_local = True

    def read_into(self, path: str, start: int, *buffers: memoryview) -> None:
        pass


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    made = Fetcher(2)
    yield made
    made.close()


def needs(count: int) -> list[Need]:
    return [Need(tensor=number) for number in range(count)]


def test_no_more_is_started_than_the_bound_allows(fetcher: Fetcher) -> None:
    shelf = Shelf(100, room_bytes=10_000)
    ahead = ReadAhead(needs(50), holder=shelf, fetcher=fetcher, most_bytes=1000)
    # Batches of half the bound.
    assert shelf.held == list(range(10))
    taken = [ahead.take((number, -1)) for number in range(5)]
    assert shelf.held == list(range(15))
    # What tasks hold does not count, but room does.
    for number in range(5, 50):
        taken.append(ahead.take((number, -1)))
    assert shelf.held == list(range(50))
    assert [held.need.tensor for held in taken if held is not None] == list(range(50))
    ahead.stop()


def test_a_need_larger_than_the_bound_is_started_when_nothing_else_is(fetcher: Fetcher) -> None:
    shelf = Shelf(5000, room_bytes=15_000)
    ahead = ReadAhead(needs(4), holder=shelf, fetcher=fetcher, most_bytes=1000)
    assert shelf.held == [0]
    for number in range(4):
        held = ahead.take((number, -1))
        assert held is not None
        assert shelf.held == list(range(min(4, number + 2, 3 + number)))
        shelf.let_go(held)
        ahead.go_on()


def test_who_asks_too_early_waits_for_room(fetcher: Fetcher) -> None:
    shelf = Shelf(100, room_bytes=100)
    ahead = ReadAhead(needs(2), holder=shelf, fetcher=fetcher, most_bytes=1000)
    first = ahead.take((0, -1))
    assert first is not None
    found: list[Held | None] = []
    waiting = threading.Thread(target=lambda: found.append(ahead.take((1, -1))))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    shelf.let_go(first)
    ahead.go_on()
    waiting.join(30)
    assert found[0] is not None


def test_nobody_announced_it(fetcher: Fetcher) -> None:
    ahead = ReadAhead(needs(1), holder=Shelf(1, 1), fetcher=fetcher, most_bytes=1)
    assert ahead.take((7, -1)) is None
    assert ahead.take((0, -1)) is not None
    assert ahead.take((0, -1)) is None  # each need is announced for one task


def test_stopping_wakes_those_who_wait_and_gives_everything_back(fetcher: Fetcher) -> None:
    shelf = Shelf(100, room_bytes=300)
    ahead = ReadAhead(needs(5), holder=shelf, fetcher=fetcher, most_bytes=1000)
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            ahead.take((4, -1))
        except WorkerError as error:
            failed.append(error)

    waiting = threading.Thread(target=ask)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    ahead.stop()
    waiting.join(30)
    assert len(failed) == 1
    assert shelf.room_bytes == 300


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 3)


def moved(recipe: Path, folders: list[Path]) -> Path:
    """The recipe with its models in fsspec's memory."""
    place = f"memory://{uuid.uuid4().hex}"
    text = recipe.read_text()
    for folder in sorted(folders, key=lambda folder: -len(str(folder))):
        store = open_store(f"{place}/{folder.name}")
        for file in folder.iterdir():
            store.write(file.name, file.read_bytes())
        text = text.replace(f'"{folder}"', f'"{place}/{folder.name}"')
    assert text.count("memory://") == len(folders)
    path = recipe.with_name(f"moved-{recipe.name}")
    path.write_text(text)
    return path


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read though nobody announced it, and what is announced though nobody asks."""
    odd: list[str] = []
    stop, fetch = ReadAhead.stop, Fetcher.fetch

    def stopped(self: ReadAhead) -> None:
        odd.extend(f"unused {key}" for key in self._announced)
        stop(self)

    def fetched(self: Fetcher, wants: Any) -> None:
        odd.extend(f"unannounced {want.path} {want.start}" for want in wants)
        fetch(self, wants)

    monkeypatch.setattr(ReadAhead, "stop", stopped)
    monkeypatch.setattr(Fetcher, "fetch", fetched)
    return odd


@pytest.mark.parametrize("ahead_bytes", [0, 5_000, 10**9])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"scope": "tensor"},
        {"scope": "block", "file_size": "20KB"},
        {"distances": "stream", "tolerance": 1e-6},
    ],
)
def test_every_pass_announces_what_it_reads_and_gives_the_same_bits(
    family: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watched: list[str],
    ahead_bytes: int,
    keys: dict[str, object],
) -> None:
    recipe = family.recipe(pipeline=keys)
    merge(str(recipe), str(tmp_path / "local"))
    monkeypatch.setattr(merging, "project_memory", bounded(ahead_bytes))
    report = merge(str(moved(recipe, [family.base, *family.models])), str(tmp_path / "remote"))
    assert weights(tmp_path / "remote") == weights(tmp_path / "local")
    assert watched == []
    assert report["bytes_read"] > 0


@pytest.mark.parametrize("ahead_bytes", [0, 5_000, 10**9])
@pytest.mark.parametrize("keys", [{}, {"output": "adapter"}, {"scope": "tensor"}, {"distances": "stream"}])
def test_factors_are_announced_too(
    family: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watched: list[str],
    ahead_bytes: int,
    keys: dict[str, object],
) -> None:
    modules = linears(family.base_values, "q_proj", "v_proj")
    adapters = make_adapters(tmp_path, family.base, [Layout(modules=modules, rank=rank) for rank in (2, 3, 4)])
    recipe = adapters.recipe(pipeline=keys)
    merge(str(recipe), str(tmp_path / "local"))
    monkeypatch.setattr(merging, "project_memory", bounded(ahead_bytes))
    merge(str(moved(recipe, [family.base, *adapters.models])), str(tmp_path / "remote"))
    assert weights(tmp_path / "remote") == weights(tmp_path / "local")
    assert watched == []


def bounded(ahead_bytes: int) -> Any:
    """The projection with so much read-ahead, and a window of three."""

    def project(*positional: Any, **words: Any) -> Any:
        memory = project_memory(*positional, **words)
        return dataclasses.replace(memory, window=3, requests=2, ahead_bytes=ahead_bytes)

    return project


def test_neighbouring_factors_and_chunks_share_requests(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small adapter or model is read by a request or two, however many tensors it has."""
    requests: list[tuple[str, int]] = []
    read, read_into = FsspecStore.read, FsspecStore.read_into

    def counted(self: FsspecStore, path: str, start: int = 0, stop: int | None = None) -> bytes:
        requests.append((path, start))
        return read(self, path, start, stop)

    def counted_into(self: FsspecStore, path: str, start: int, *buffers: memoryview) -> None:
        requests.append((path, start))
        read_into(self, path, start, *buffers)

    recipe = moved(family.recipe(), [family.base, *family.models])
    monkeypatch.setattr(FsspecStore, "read", counted)
    monkeypatch.setattr(FsspecStore, "read_into", counted_into)
    started: list[int] = []
    monkeypatch.setattr(Fetch, "__init__", _counting(started, Fetch.__init__))
    merge(str(recipe), str(tmp_path / "out"))
    weights_read = [(path, start) for path, start in requests if path == "model.safetensors" and start > 8]
    # All the tensors of four models in one batch a pass, one request a model; headers aside.
    assert sum(started) > 100
    assert len(weights_read) <= 4 * 3


def _counting(started: list[int], initialise: Any) -> Any:
    def counted(self: Fetch, pool: Any, wants: Any) -> None:
        started.append(len(wants))
        initialise(self, pool, wants)

    return counted


def test_a_failing_read_ends_the_merge_with_its_own_error(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = moved(family.recipe(), [family.base, *family.models])
    fail = threading.Event()
    read_into = FsspecStore.read_into

    def broken(self: FsspecStore, path: str, start: int, *buffers: memoryview) -> None:
        if fail.is_set() and path == "model.safetensors":
            raise StorageError(Problem(what="the store is gone", where=path))
        read_into(self, path, start, *buffers)

    monkeypatch.setattr(FsspecStore, "read_into", broken)
    monkeypatch.setattr(merging, "project_memory", _then(fail))
    with pytest.raises(StorageError, match="the store is gone"):
        merge(str(recipe), str(tmp_path / "out"))


def _then(fail: threading.Event) -> Any:
    def project(*positional: Any, **words: Any) -> Any:
        fail.set()
        return project_memory(*positional, **words)

    return project
