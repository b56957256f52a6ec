"""Range reads together: what is asked for, what arrives, and what happens when one fails."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine import fetch as fetch_module
from pipeline.engine.fetch import Fetcher, Want, coalesce
from pipeline.errors import Problem, StorageError
from pipeline.planning.memory import REQUEST_BYTES
from pipeline.storage import Store
from pipeline.storage.local import LocalStore

RANGES = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 60)).map(lambda pair: (pair[0], sum(pair))), max_size=12
)


@given(RANGES, st.integers(0, 40), st.integers(1, 100))
def test_requests_hold_every_wanted_byte_once_within_the_limits(
    ranges: list[tuple[int, int]], gap: int, most: int
) -> None:
    spans = coalesce(ranges, gap_bytes=gap, most_bytes=most)
    wanted = {byte for start, stop in ranges for byte in range(start, stop)}
    read = [byte for span in spans for byte in range(span.start, span.stop)]
    assert wanted <= set(read)
    assert read == sorted(set(read))  # in order, and none twice
    assert all(0 < span.nbytes <= most for span in spans)
    for span in spans:
        assert {span.start, span.stop - 1} <= wanted
    # What nobody wants lies in gaps that are short enough.
    extra = sorted(set(read) - wanted)
    runs = "".join("x" if byte in set(extra) else " " for byte in range(400)).split()
    assert all(len(run) <= gap for run in runs)


@given(RANGES, st.integers(0, 40), st.integers(1, 100))
def test_no_two_requests_could_have_been_one(ranges: list[tuple[int, int]], gap: int, most: int) -> None:
    spans = coalesce(ranges, gap_bytes=gap, most_bytes=most)
    for first, second in itertools.pairwise(spans):
        assert second.start - first.stop > gap or second.start - first.start >= most or first.nbytes == most


@given(RANGES)
def test_the_order_of_the_ranges_does_not_matter(ranges: list[tuple[int, int]]) -> None:
    assert coalesce(ranges, gap_bytes=3, most_bytes=50) == coalesce(ranges[::-1], gap_bytes=3, most_bytes=50)


def test_neighbours_are_joined_and_long_ranges_cut() -> None:
    def plain(*ranges: tuple[int, int], gap: int = 0) -> list[tuple[int, int]]:
        return [(span.start, span.stop) for span in coalesce(ranges, gap_bytes=gap, most_bytes=100)]

    assert plain((10, 20), (20, 50)) == [(10, 50)]
    assert plain((10, 20), (21, 50)) == [(10, 20), (21, 50)]
    assert plain((10, 20), (21, 50), gap=1) == [(10, 50)]
    assert plain((0, 250)) == [(0, 100), (100, 200), (200, 250)]
    # Filled up to the limit, so that the number of requests is small.
    assert plain((0, 60), (60, 150)) == [(0, 100), (100, 150)]
    assert plain((5, 5), (7, 7)) == []


class Recorded:
    """A store whose requests are counted and may fail; everything else is the folder's."""

    def __init__(self, folder: Path, *, is_local: bool = False, broken: Sequence[int] = ()) -> None:
        self._store = LocalStore(folder)
        self.is_local = is_local
        self.requests: list[tuple[str, int, int]] = []
        self._broken = broken
        self._lock = threading.Lock()

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        assert stop is not None
        self._note(path, start, stop)
        return self._store.read(path, start, stop)

    def read_into(self, path: str, start: int, *buffers: memoryview) -> None:
        self._note(path, start, start + sum(buffer.nbytes for buffer in buffers))
        self._store.read_into(path, start, *buffers)

    def _note(self, path: str, start: int, stop: int) -> None:
        with self._lock:
            self.requests.append((path, start, stop))
            number = len(self.requests) - 1
        if number in self._broken:
            raise StorageError(Problem(what=f"request {number} failed", where=path))


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    made = Fetcher(8)
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        (tmp_path / f"f{number}").write_bytes(content(number))
    return tmp_path


def content(number: int, size: int = 100_000) -> bytes:
    return np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8).tobytes()


def want(store: object, path: str, start: int, stop: int) -> Want:
    made: Store = store  # type: ignore[assignment]
    return Want(store=made, path=path, start=start, buffer=np.zeros(stop - start, dtype=np.uint8))


@pytest.mark.parametrize("is_local", [True, False])
@given(ranges=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 90_000), st.integers(0, 9_000)), max_size=10))
def test_every_buffer_gets_its_bytes(
    is_local: bool, ranges: list[tuple[int, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / "both"
    if not root.exists():
        root.mkdir()
        for number in range(2):
            (root / f"f{number}").write_bytes(content(number))
    store = Recorded(root, is_local=is_local)
    wants = [want(store, f"f{file}", start, start + size) for file, start, size in ranges]
    fetcher = Fetcher(4)
    fetcher.fetch(wants)
    fetcher.close()
    for (file, start, size), filled in zip(ranges, wants, strict=True):
        assert filled.buffer.tobytes() == content(file)[start : start + size]


def test_neighbours_cost_one_request_and_files_are_asked_in_the_order_of_the_wants(
    folder: Path, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "REQUEST_BYTES", 1000)
    store = Recorded(folder)
    one = Fetcher(1)
    one.fetch([want(store, "f1", 5000, 5100), want(store, "f0", 200, 300), want(store, "f0", 0, 200)])
    assert store.requests == [("f1", 5000, 5100), ("f0", 0, 300)]
    store.requests.clear()
    long = want(store, "f0", 10, 2510)
    one.fetch([long])
    assert store.requests == [("f0", 10, 1010), ("f0", 1010, 2010), ("f0", 2010, 2510)]
    assert long.buffer.tobytes() == content(0)[10:2510]
    one.close()


def test_a_request_is_never_longer_than_its_limit(tmp_path: Path, fetcher: Fetcher) -> None:
    size = 2 * REQUEST_BYTES + 5
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)
    store = Recorded(tmp_path)
    fetcher.fetch([want(store, "large", 0, size)])
    assert sorted(store.requests) == [
        ("large", 0, REQUEST_BYTES),
        ("large", REQUEST_BYTES, 2 * REQUEST_BYTES),
        ("large", 2 * REQUEST_BYTES, size),
    ]


def test_the_first_error_is_raised_as_it_is_and_ends_the_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "GAP_BYTES", 0)
    store = Recorded(folder, broken=[1])
    fetcher = Fetcher(1)
    wants = [want(store, f"f{number % 2}", 20_000 * number, 20_000 * number + 10) for number in range(4)]
    wants += [want(store, "f0", 99_000, 100_001)]
    with pytest.raises(StorageError, match="request 1 failed") as caught:
        fetcher.fetch(wants)
    assert type(caught.value) is StorageError
    assert len(store.requests) == 2
    # The fetcher goes on.
    again = want(store, "f0", 0, 10)
    fetcher.fetch([again])
    assert again.buffer.tobytes() == content(0)[:10]
    fetcher.close()


def test_a_file_that_ends_early_is_an_error(folder: Path, fetcher: Fetcher) -> None:
    with pytest.raises(StorageError, match="wanted"):
        fetcher.fetch([want(Recorded(folder), "f0", 99_990, 100_001)])


def test_wants_of_one_fetch_are_waited_for_one_by_one(folder: Path, fetcher: Fetcher) -> None:
    gate = threading.Event()

    class Gated(Recorded):
        def read_into(self, path: str, start: int, *buffers: memoryview) -> None:
            if path == "f1":
                assert gate.wait(30)
            super().read_into(path, start, *buffers)

    store = Gated(folder)
    first, second = want(store, "f0", 0, 50), want(store, "f1", 0, 50)
    started = fetcher.start([second, first])
    started.wait([first])
    assert first.buffer.tobytes() == content(0)[:50]
    assert not second.buffer.any()
    gate.set()
    started.wait([second])
    assert second.buffer.tobytes() == content(1)[:50]


def test_a_cancelled_fetch_begins_no_request_and_ends_with_the_reason(folder: Path) -> None:
    entered, gate = threading.Event(), threading.Event()

    class Gated(Recorded):
        def read_into(self, path: str, start: int, *buffers: memoryview) -> None:
            super().read_into(path, start, *buffers)
            entered.set()
            assert gate.wait(30)

    store = Gated(folder)
    fetcher = Fetcher(1)
    wants = [want(store, "f0", 0, 10), want(store, "f1", 0, 10)]
    started = fetcher.start(wants)
    assert entered.wait(30)
    threading.Timer(0.05, gate.set).start()
    started.cancel(KeyError("reason"))
    assert gate.is_set()  # it waited for the request under way
    assert store.requests == [("f0", 0, 10)]
    started.wait(wants[:1])
    with pytest.raises(KeyError, match="reason"):
        started.wait(wants[1:])
    fetcher.close()
