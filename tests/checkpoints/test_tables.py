from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from pipeline.checkpoints.tables import read_table, read_table_metadata, write_table
from pipeline.errors import VerificationError
from pipeline.storage import MissingObject, open_store


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


def test_pyarrow_is_loaded_only_when_needed() -> None:
    code = (
        "import sys, pipeline.checkpoints.tables, pipeline.checkpoints.checkpoint; sys.exit('pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
