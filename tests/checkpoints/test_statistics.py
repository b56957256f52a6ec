from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.checkpoints.statistics import (
    StatisticEntry,
    Statistics,
    open_statistics,
    triangle_elements,
    triangle_row,
    triangle_size,
)
from pipeline.checkpoints.statistics_facts import KINDS, StatisticsFacts
from pipeline.checkpoints.statistics_writer import WAITING_BYTES, StatisticsWriter
from pipeline.errors import CheckpointError, OutputError
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore

from .models import write_model

FACTS = StatisticsFacts(
    model="models/a",
    data="data/train.jsonl",
    split="train",
    examples=7,
    tokens=120,
    reduction="mean",
    labels="empirical",
    normalisation="tokens",
    extra={"seed": "0"},
)
RNG = np.random.default_rng(5)
DIAGONAL = RNG.random((3, 4)).astype(np.float32)


def gram(size: int, dtype: type = np.float32) -> np.ndarray:
    rows = np.random.default_rng(size).standard_normal((size + 3, size))
    return np.ascontiguousarray((rows.T @ rows / len(rows)).astype(dtype))


def write(folder: Path, facts: StatisticsFacts = FACTS) -> Path:
    """Statistics of all kinds, shared and absent ones among them."""
    writer = StatisticsWriter(open_store(str(folder)), facts)
    writer.add("diagonal", "layers.0.q.weight", DIAGONAL)
    writer.add("input_gram", "layers.0.q.weight", gram(4))
    writer.flush()
    writer.share("input_gram", "layers.0.k.weight", "layers.0.q.weight")
    writer.add("output_gram", "layers.0.q.weight", gram(3, np.float64))
    writer.add("block", "layers.0.ia3", gram(5))
    writer.outside("embed.weight", "an embedding")
    writer.finish()
    return folder


def stored(statistics: Statistics, entry: StatisticEntry) -> np.ndarray:
    """What lies at an entry's place, read without this package."""
    raw = Path(statistics.url, entry.file).read_bytes()[entry.start : entry.stop]
    return np.frombuffer(raw, {"F32": "<f4", "F64": "<f8"}[entry.dtype])


def found(statistics: Statistics, kind: Any, parameter: str) -> StatisticEntry:
    entry = statistics.find(kind, parameter)
    assert entry is not None
    return entry


def test_what_is_written_is_read(tmp_path: Path) -> None:
    statistics = open_statistics(str(write(tmp_path / "s")))
    assert statistics.facts == FACTS
    diagonal = found(statistics, "diagonal", "layers.0.q.weight")
    assert (diagonal.shape, diagonal.size, diagonal.elements, diagonal.dtype) == ((3, 4), 12, 12, "F32")
    assert np.array_equal(stored(statistics, diagonal).reshape(3, 4), DIAGONAL)
    for kind, parameter, matrix in (
        ("input_gram", "layers.0.q.weight", gram(4)),
        ("output_gram", "layers.0.q.weight", gram(3, np.float64)),
        ("block", "layers.0.ia3", gram(5)),
    ):
        entry = found(statistics, kind, parameter)
        size = len(matrix)
        assert (entry.kind, entry.parameter, entry.shape, entry.size) == (kind, parameter, (size, size), size)
        assert entry.size_bytes == entry.elements * matrix.itemsize
        assert np.array_equal(stored(statistics, entry), matrix[np.triu_indices(size)])
    assert statistics.find("output_gram", "layers.0.ia3") is None
    assert statistics.outside("embed.weight") == "an embedding"
    assert statistics.outside("layers.0.q.weight") is None


def test_a_shared_statistic_is_stored_once(tmp_path: Path) -> None:
    statistics = open_statistics(str(write(tmp_path / "s")))
    assert statistics.find("input_gram", "layers.0.k.weight") is statistics.find("input_gram", "layers.0.q.weight")
    assert statistics.find("output_gram", "layers.0.k.weight") is None
    assert statistics.parameters("input_gram") == ("layers.0.q.weight", "layers.0.k.weight")
    assert sum(entry.size_bytes for entry in statistics.entries.values()) == 4 * 12 + 4 * 10 + 8 * 6 + 4 * 15


def test_files_are_safetensors_of_another_name_and_carry_the_facts(tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    statistics = open_statistics(str(folder))
    assert sorted(os.listdir(folder)) == ["00001.statistics", "00002.statistics", "statistics.json"]  # noqa: PTH208
    assert [file.path for file in statistics.files] == ["00001.statistics", "00002.statistics"]
    for file in statistics.files:
        stat = statistics.store.stat(file.path)
        assert (file.size_bytes, file.version) == (stat.size_bytes, stat.version)
        with safe_open(folder / file.path, framework="np") as official:
            metadata = official.metadata()
            assert all(name.partition(":")[0] in KINDS for name in official.keys())  # noqa: SIM118
        assert metadata["format"] == "geomerge-statistics"
        assert metadata["version"] == "1"
        assert json.loads(metadata["facts"])["examples"] == 7


def test_a_remote_folder_is_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    store = open_store("memory://statistics-test/s")
    for name in os.listdir(folder):  # noqa: PTH208
        store.write(name, (folder / name).read_bytes())
    assert open_statistics(store.url).entries == open_statistics(str(folder)).entries


def test_only_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StatisticsWriter(open_store(str(tmp_path)), FACTS)
    for number in range(3):
        writer.add("diagonal", f"t{number}", np.zeros(200_000, np.float32))
        writer.flush()
    writer.finish()
    real, total = LocalStore.read, []

    def read(store: LocalStore, path: str, start: int = 0, stop: int | None = None) -> bytes:
        data = real(store, path, start, stop)
        total.append(len(data))
        return data

    monkeypatch.setattr(LocalStore, "read", read)
    assert len(open_statistics(str(tmp_path)).entries) == 3
    assert sum(total) <= 3 * (256 << 10) + (tmp_path / "statistics.json").stat().st_size


def test_packed_triangles_and_full_matrices_are_the_same(tmp_path: Path) -> None:
    matrix = gram(6)
    for name, array in (("full", matrix), ("packed", matrix[np.triu_indices(6)])):
        writer = StatisticsWriter(open_store(str(tmp_path / name)), FACTS)
        writer.add("input_gram", "w", array)
        writer.finish()
    assert (tmp_path / "full" / "00001.statistics").read_bytes() == (
        tmp_path / "packed" / "00001.statistics"
    ).read_bytes()


def test_a_large_statistic_gets_a_file_of_its_own(tmp_path: Path) -> None:
    size = math.isqrt(WAITING_BYTES // 4) + 8
    large = gram(1) * np.ones((size, size), np.float32)
    large[0, size - 1], large[size - 1, 0] = 3, 4
    writer = StatisticsWriter(open_store(str(tmp_path)), FACTS)
    writer.add("diagonal", "before", DIAGONAL)
    writer.add("input_gram", "large", large)
    writer.add("diagonal", "after", DIAGONAL)
    writer.finish()
    statistics = open_statistics(str(tmp_path))
    assert [entry.file for entry in statistics.entries.values()] == [f"0000{n}.statistics" for n in (1, 2, 3)]
    values = stored(statistics, found(statistics, "input_gram", "large"))
    assert values[size - 1] == 3
    assert values.size == triangle_elements(size)
    assert np.array_equal(np.delete(values, size - 1), np.full(values.size - 1, large[0, 0]))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(0, 10**6), row=st.integers(0, 10**6))
def test_the_arithmetic_of_triangles(size: int, row: int) -> None:
    assert triangle_size(triangle_elements(size)) == size
    if size > 1:
        assert triangle_size(triangle_elements(size) - 1) is None
    row = min(row, size)
    assert triangle_row(size, row) + triangle_elements(size - row) == triangle_elements(size)


# An interrupted run.


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    writer = StatisticsWriter(open_store(str(tmp_path)), FACTS)
    writer.add("input_gram", "q", gram(4))
    writer.share("input_gram", "k", "q")
    writer.flush()
    writer.add("input_gram", "lost", gram(3))
    refused(tmp_path, "unfinished", "go")
    writer = StatisticsWriter(open_store(str(tmp_path)), FACTS)
    assert [writer.has("input_gram", name) for name in ("q", "k", "lost")] == [True, True, False]
    writer.add("input_gram", "lost", gram(3))
    writer.share("input_gram", "v", "q")
    writer.finish()
    statistics = open_statistics(str(tmp_path))
    assert statistics.parameters("input_gram") == ("q", "lost", "k", "v")
    assert np.array_equal(stored(statistics, found(statistics, "input_gram", "v")), gram(4)[np.triu_indices(4)])


def test_a_share_alone_outlives_an_interruption(tmp_path: Path) -> None:
    writer = StatisticsWriter(open_store(str(tmp_path)), FACTS)
    writer.add("input_gram", "q", gram(4))
    writer.flush()
    writer.share("input_gram", "k", "q")
    writer.flush()
    writer.flush()
    again = StatisticsWriter(open_store(str(tmp_path)), FACTS)
    assert again.has("input_gram", "k")
    again.finish()
    assert open_statistics(str(tmp_path)).parameters("input_gram") == ("q", "k")


def test_a_share_of_what_was_lost_is_made_again(tmp_path: Path) -> None:
    writer = StatisticsWriter(open_store(str(tmp_path)), FACTS)
    writer.add("input_gram", "q", gram(4))
    writer.flush()
    writer.share("input_gram", "k", "q")
    writer.flush()
    (tmp_path / "00001.statistics").unlink()
    again = StatisticsWriter(open_store(str(tmp_path)), FACTS)
    assert not again.has("input_gram", "k")
    again.add("input_gram", "q", gram(4))
    again.share("input_gram", "k", "q")
    again.finish()
    assert open_statistics(str(tmp_path)).parameters("input_gram") == ("q", "k")


def test_folders_that_are_not_for_statistics(tmp_path: Path) -> None:
    def refuses(folder: Path, *words: str, facts: StatisticsFacts = FACTS) -> None:
        with pytest.raises(OutputError) as caught:
            StatisticsWriter(open_store(str(folder)), facts)
        assert all(word in str(caught.value) for word in ("choose another folder", *words))

    refuses(write_model(tmp_path / "model"), "is a model folder", "model.safetensors")
    refuses(write(tmp_path / "done"), "finished statistics")
    (tmp_path / "done" / "statistics.json").unlink()
    other = StatisticsFacts(**{**FACTS.to_json(), "examples": 8})  # type: ignore[arg-type]
    refuses(tmp_path / "done", "something else: examples is 7 there, 8 here", facts=other)
    (tmp_path / "done" / "mine.statistics").write_bytes(b"")
    refuses(tmp_path / "done", "mine.statistics")


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        ("diagonal", np.zeros(3, np.float16)),
        ("diagonal", np.zeros(3, np.int32)),
        ("diagonal", np.zeros((4, 4), np.float32).T[::2]),
        ("input_gram", np.zeros((3, 4), np.float32)),
        ("input_gram", np.zeros(5, np.float32)),
        ("input_gram", np.zeros((2, 2, 2), np.float32)),
        ("fisher", np.zeros(3, np.float32)),
    ],
)
def test_arrays_that_are_no_statistic(tmp_path: Path, kind: Any, array: np.ndarray) -> None:
    writer = StatisticsWriter(open_store(str(tmp_path)), FACTS)
    with pytest.raises(ValueError, match=r"fp32|square|none of"):
        writer.add(kind, "w", array)
    writer.finish()
    assert not open_statistics(str(tmp_path)).entries


def test_a_statistic_comes_once(tmp_path: Path) -> None:
    writer = StatisticsWriter(open_store(str(tmp_path)), FACTS)
    writer.add("input_gram", "q", gram(2))
    with pytest.raises(ValueError, match="before"):
        writer.add("input_gram", "q", gram(2))
    for name, target in (("q", "q"), ("k", "v")):
        with pytest.raises(ValueError, match="cannot share"):
            writer.share("input_gram", name, target)


def test_empty_arrays(tmp_path: Path) -> None:
    writer = StatisticsWriter(open_store(str(tmp_path)), FACTS)
    writer.add("diagonal", "none", np.zeros((0, 4), np.float32))
    writer.add("diagonal", "scalar", np.float32(2).reshape(()))
    writer.finish()
    statistics = open_statistics(str(tmp_path))
    assert found(statistics, "diagonal", "none").shape == (0, 4)
    assert stored(statistics, found(statistics, "diagonal", "scalar")).tolist() == [2]


# What is refused.


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_statistics(str(folder))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_model_is_no_statistics(tmp_path: Path) -> None:
    refused(write_model(tmp_path / "m"), "is a model, not statistics", "geomerge calibrate")
    refused(tmp_path / "absent", "does not exist")


def test_statistics_are_no_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    (renamed / "model.safetensors").write_bytes((folder / "00001.statistics").read_bytes())
    for url in (folder, folder / "00001.statistics", renamed, renamed / "model.safetensors"):
        with pytest.raises(CheckpointError, match="statistics, which are no weights"):
            open_checkpoint(str(url))
    (folder / "statistics.json").unlink()
    with pytest.raises(CheckpointError, match="statistics, which are no weights"):
        open_checkpoint(str(folder))


def change(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "statistics.json"
        found = json.loads(path.read_text())
        edit(found)
        path.write_text(json.dumps(found))

    return apply


def rewrite(arrays: dict[str, np.ndarray], **metadata: str) -> Callable[[Path], None]:
    """Put another file in the place of the first, of the official writer, and tell its size."""

    def apply(folder: Path) -> None:
        path = folder / "00001.statistics"
        with safe_open(path, framework="np") as official:
            kept = official.metadata()
        save_file(arrays, path, metadata={**kept, **metadata})
        change(lambda found: found["files"].update({path.name: path.stat().st_size}))(folder)

    return apply


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "format": (change(lambda found: found.update(format="pt")), ("no file of statistics", "'pt'")),
    "version": (change(lambda found: found.update(version="2")), ("version '2'", "reads 1")),
    "no facts": (change(lambda found: found.pop("facts")), ("no facts",)),
    "a fact missing": (change(lambda found: found["facts"].pop("labels")), ("missing: ['labels']",)),
    "a fact unknown": (change(lambda found: found["facts"].update(x=1)), ("unknown: ['x']",)),
    "a fact wrong": (change(lambda found: found["facts"].update(labels="true")), ("fact labels cannot be 'true'",)),
    "a count wrong": (change(lambda found: found["facts"].update(examples=True)), ("fact examples cannot be True",)),
    "extra wrong": (change(lambda found: found["facts"].update(extra={"a": 1})), ("fact extra",)),
    "other facts": (
        change(lambda found: found["facts"].update(examples=8)),
        ("00001.statistics", "other facts than statistics.json"),
    ),
    "files": (change(lambda found: found.update(files=["00001.statistics"])), ("files must map",)),
    "a path outside": (change(lambda found: found["files"].update({"../x.statistics": 1})), ("files must map",)),
    "a file missing": (lambda folder: (folder / "00002.statistics").unlink(), ("00002.statistics", "does not exist")),
    "size": (
        change(lambda found: found["files"].update({"00001.statistics": 9})),
        ("statistics.json says 9", "copy the whole folder"),
    ),
    "shared": (
        change(lambda found: found.update(shared={"block:x": "block:y"})),
        ("'block:x' cannot share 'block:y'",),
    ),
    "shared kinds": (
        change(lambda found: found.update(shared={"block:x": "diagonal:layers.0.q.weight"})),
        ("'block:x' cannot share",),
    ),
    "outside": (change(lambda found: found.update(outside=["x"])), ("outside must map",)),
    "not JSON": (lambda folder: (folder / "statistics.json").write_text("{"), ("not valid JSON",)),
    "coarse": (
        rewrite({"diagonal:w": np.zeros(3, np.float16)}),
        ("diagonal:w", "F16, too coarse", "F32 or F64"),
    ),
    "no triangle": (rewrite({"input_gram:w": np.zeros(5, np.float32)}), ("input_gram:w", "no triangle")),
    "square": (rewrite({"input_gram:w": np.zeros((3, 1), np.float32)}), ("input_gram:w", "no triangle")),
    "kind": (rewrite({"model.w": np.zeros(3, np.float32)}), ("'model.w' is of no known kind",)),
    "twice": (
        rewrite({"block:layers.0.ia3": np.zeros(3, np.float32)}),
        ("block:layers.0.ia3", "is also in 00001.statistics"),
    ),
    "a weights file": (rewrite({"diagonal:w": np.zeros(3, np.float32)}, format="pt"), ("no file of statistics",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_statistics(tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path / "s")
    apply, words = DAMAGES[damage]
    apply(folder)
    refused(folder, *words)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 2000))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = write(tmp_path_factory.mktemp("s"))
    path = folder / "00002.statistics"
    data = path.read_bytes()
    path.write_bytes(data[: min(cut, len(data) - 1)])
    refused(folder, "00002.statistics")
