from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from pipeline.checkpoints.tables import (
    GROUP_BYTES,
    TableWriter,
    read_arrays,
    read_table,
    read_table_metadata,
    write_table,
)
from pipeline.errors import VerificationError
from pipeline.storage import MissingObject, Store, open_store


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    columns = {
        "chunk": [0, 2**62, -1],
        "value": np.array([0.1, -0.0, 5e-324]),
        "name": ["a", "", "ü"],
        "limbs": [[1, 2], [], [3]],
        "raw": [b"\x00", b"", b"\xff"],
    }
    write_table(store, "statistics/part.parquet", columns, {"plan": "abc", "ü": "é"})
    found = read_table(store, "statistics/part.parquet")
    assert list(found) == list(columns)
    assert all(list(found[name]) == list(columns[name]) for name in columns)
    assert np.array(found["value"]).tobytes() == columns["value"].tobytes()
    assert read_table_metadata(store, "statistics/part.parquet") == {"plan": "abc", "ü": "é"}
    assert store.list() == ("statistics/part.parquet",)
    assert pyarrow.parquet.read_table(tmp_path / "statistics" / "part.parquet").num_rows == 3


def test_empty_tables(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_table(store, "a", {"x": []}, {})
    assert read_table(store, "a") == {"x": []}
    assert read_table_metadata(store, "a") == {}


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="length"):
        write_table(open_store(str(tmp_path)), "a", {"x": [1], "y": [1, 2]}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"no table at all"])
def test_damage_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "a").write_bytes(damage)
    with pytest.raises(VerificationError, match=r"a: is no readable table: .*\(delete it and run again\)"):
        read_table(open_store(str(tmp_path)), "a")


def test_a_table_cut_short_is_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_table(store, "a", {"x": list(range(1000))}, {})
    store.write("a", store.read("a")[:-20])
    with pytest.raises(VerificationError, match="is no readable table"):
        read_table(store, "a")


def test_absence_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingObject):
        read_table(open_store(str(tmp_path)), "a")


@pytest.mark.parametrize("rows", [0, 1, 3, 50])
def test_rows_of_numbers_come_back_bit_for_bit(tmp_path: Path, rows: int) -> None:
    """From nothing to several row groups, one that is not full among them."""
    store = open_store(str(tmp_path))
    wanted = [np.random.default_rng(row).standard_normal(GROUP_BYTES // 8 // 20) for row in range(rows)]
    with TableWriter(store, "a/b", ("name", "row", "values", "counts"), {"k": "v"}) as table:
        for row, values in enumerate(wanted):
            table.append(f"n{row}", row, values, np.arange(row))
        table.finish()
    assert store.list() == ("a/b",)
    assert read_table_metadata(store, "a/b") == {"k": "v"}
    found: list[np.ndarray] = []
    for part in read_arrays(store, "a/b", ("values", "counts", "row")):
        assert list(part) == ["values", "counts", "row"]
        assert [len(counts) for counts in part["counts"]] == part["row"].tolist()
        found += part["values"]
    assert len(found) == rows
    assert all(one.tobytes() == other.tobytes() for one, other in zip(found, wanted, strict=True))
    assert pyarrow.parquet.ParquetFile(tmp_path / "a" / "b").num_row_groups == max(1, -(-rows // 20))
    if rows:
        names = read_table(store, "a/b")
        assert names["name"] == [f"n{row}" for row in range(rows)]


def test_one_column_of_a_long_table_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    with TableWriter(store, "a", ("row", "values"), {}) as table:
        for row in range(50):
            table.append(row, np.random.default_rng(row).standard_normal(GROUP_BYTES // 8 // 20))
        table.finish()
    sizes: list[int] = []
    read = type(store).read

    def counted(self: Store, path: str, start: int = 0, stop: int | None = None) -> bytes:
        data = read(self, path, start, stop)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(type(store), "read", counted)
    assert [int(row) for part in read_arrays(store, "a", ("row",)) for row in part["row"]] == list(range(50))
    assert 0 < sum(sizes) < 1_000_000 < 70_000_000 < store.stat("a").size_bytes


def test_a_column_that_is_not_there_is_damage(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_table(store, "a", {"x": [1]}, {})
    with pytest.raises(VerificationError, match="a: is no readable table"):
        list(read_arrays(store, "a", ("y",)))


def test_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    table = TableWriter(open_store(str(tmp_path)), "a", ("x", "y"), {})
    with pytest.raises(ValueError, match="shorter"):
        table.append(1)


def test_pyarrow_is_loaded_only_when_needed() -> None:
    code = (
        "import sys, pipeline.checkpoints.tables, pipeline.checkpoints.checkpoint; sys.exit('pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
