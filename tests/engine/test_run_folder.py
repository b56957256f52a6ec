"""What a merge leaves for a second run."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoints.tables import read_table_metadata
from pipeline.engine.run_folder import (
    MEASURED,
    WRITTEN,
    ChunkRow,
    RowsWriter,
    finished,
    group_sums,
    is_measured,
    load_checksums,
    measured_path,
    read_json,
    read_rows,
    square,
    triangle,
    write_json,
    written_path,
)
from pipeline.errors import VerificationError
from pipeline.numerics.exact_sum import ExactSum
from pipeline.storage import Store, open_store
from tests.planning.plans import plan_by_hand, tensor

FILE = "model-00001-of-00002.safetensors"


def save_rows(store: Store, file: str, rows: Iterable[ChunkRow], fingerprint: str) -> None:
    """Save the statistics of one output file."""
    with RowsWriter(store, file, fingerprint) as writer:
        for row in rows:
            writer.add(row)
        writer.finish()


def long_rows(count: int, pairs: int) -> tuple[ChunkRow, ...]:
    """Rows of a family of a thousand models, whose distances do not fit in one row group."""
    generator = np.random.default_rng(1)
    return tuple(
        ChunkRow(
            tensor=number,
            start=0,
            distances=generator.uniform(0, 1, pairs),
            unchanged=np.full(1000, number),
            checksums=np.arange(number, number + 1000),
        )
        for number in range(count)
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def rows() -> tuple[ChunkRow, ...]:
    return tuple(
        ChunkRow(
            tensor=number % 2,
            start=number << 20,
            distances=np.array([0.1 * number, 1e-300, 5e-324]),
            unchanged=np.array([1 << 20, number, 0]),
            checksums=np.array([-(1 << 63), (1 << 63) - 1, -number]),
        )
        for number in range(5)
    )


def test_rows_come_back_bit_for_bit(store: Store) -> None:
    save_rows(store, FILE, rows(), "f" * 64)
    assert tuple(read_rows(store, FILE)) == rows()
    assert read_table_metadata(store, measured_path(FILE))["fingerprint"] == "f" * 64


def test_a_file_without_chunks_has_no_rows(store: Store) -> None:
    save_rows(store, FILE, (), "f")
    assert tuple(read_rows(store, FILE)) == ()


def test_rows_of_a_single_model_have_no_distances(store: Store) -> None:
    row = ChunkRow(tensor=0, start=0, distances=np.zeros(0), unchanged=np.array([3]), checksums=np.array([1]))
    save_rows(store, FILE, (row,), "f")
    assert tuple(read_rows(store, FILE)) == (row,)


def test_rows_are_equal_by_their_numbers() -> None:
    row, same = rows()[1], rows()[1]
    assert row == same
    for name in ("distances", "unchanged", "checksums"):
        other = np.array(getattr(row, name))
        other[1] -= 1
        assert row != replace(row, **{name: other})
    assert row != replace(row, start=3)
    assert row != "row"
    with pytest.raises(TypeError, match="unhashable"):
        hash(row)


def test_checksums_come_back_without_the_distances(store: Store) -> None:
    save_rows(store, FILE, rows(), "f")
    found = load_checksums(store, FILE)
    assert list(found) == [(row.tensor, row.start) for row in rows()]
    for row in rows():
        assert found[row.tensor, row.start].tolist() == row.checksums.tolist()


def test_rows_of_another_plan_are_not_taken_for_this_ones(store: Store) -> None:
    save_rows(store, FILE, rows(), "f")
    assert is_measured(store, FILE, "f")
    assert tuple(read_rows(store, FILE, "f")) == rows()
    assert len(load_checksums(store, FILE, "f")) == 5
    assert not is_measured(store, FILE, "g")
    with pytest.raises(VerificationError, match="measured by another merge"):
        tuple(read_rows(store, FILE, "g"))
    with pytest.raises(VerificationError, match="measured by another merge"):
        load_checksums(store, FILE, "g")


def test_rows_that_are_not_finished_leave_no_marker(store: Store, tmp_path: Path) -> None:
    """A writer that has already streamed a part, and one that has not."""
    row = long_rows(1, 1 << 19)[0]

    def fail_after(count: int) -> None:
        with RowsWriter(store, FILE, "f") as writer:
            for _ in range(count):
                writer.add(row)
            raise ZeroDivisionError

    for count in (2, 9):
        with pytest.raises(ZeroDivisionError):
            fail_after(count)
        assert finished(store, MEASURED, ".parquet") == frozenset()
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_long_rows_are_saved_in_parts_and_come_back(store: Store) -> None:
    wanted = long_rows(20, 1 << 19)
    save_rows(store, FILE, iter(wanted), "f")
    assert tuple(read_rows(store, FILE)) == wanted
    assert len(load_checksums(store, FILE)) == 20
    store.write(measured_path(FILE), store.read(measured_path(FILE))[:-100])
    with pytest.raises(VerificationError, match="is no readable table"):
        tuple(read_rows(store, FILE))


def test_finished_files_are_those_with_a_marker(store: Store) -> None:
    assert finished(store, MEASURED, ".parquet") == finished(store, WRITTEN, ".json") == frozenset()
    save_rows(store, FILE, rows(), "f")
    write_json(store, written_path("other.safetensors"), {"a": 1})
    store.write(f"{MEASURED}/half.parquet.tmp", b"")
    assert finished(store, MEASURED, ".parquet") == {FILE}
    assert finished(store, WRITTEN, ".json") == {"other.safetensors"}


def test_documents_come_back_and_can_be_read_by_people(store: Store) -> None:
    document = {"fingerprint": "ü", "numbers": [0.1, 1e-300, 5], "none": None}
    assert read_json(store, "a/b.json") is None
    write_json(store, "a/b.json", document)
    assert read_json(store, "a/b.json") == document
    assert store.read("a/b.json").count(b"\n") > 4


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"a": 1'])
def test_a_damaged_document_is_an_error_that_names_it(store: Store, data: bytes) -> None:
    store.write("plan.json", data)
    with pytest.raises(VerificationError, match="damaged") as caught:
        read_json(store, "plan.json")
    assert caught.value.problems[0].where == store.location("plan.json")
    assert "--overwrite" in caught.value.problems[0].remedy


@given(st.integers(0, 8), st.data())
def test_a_triangle_and_its_square(count: int, data: st.DataObject) -> None:
    size = count * (count - 1) // 2
    values = data.draw(st.lists(st.floats(0, 1e300), min_size=size, max_size=size))
    matrix = square(values, count)
    assert matrix.shape == (count, count)
    assert matrix.dtype == np.float64
    assert np.array_equal(matrix, matrix.T)
    assert not np.diagonal(matrix).any()
    assert triangle(matrix).tolist() == values
    if count > 2:
        assert matrix[0, 1] == values[0]
        assert matrix[0, 2] == values[1]
        assert matrix[1, 2] == values[count - 1]


def test_sums_by_group_are_exact_and_leave_copied_tensors_out() -> None:
    plan = plan_by_hand([tensor("a", 9, group=1), tensor("ids", 9, dtype="I64", group=-1), tensor("b", 9)], [])
    generator = np.random.default_rng(0)
    chunks = [
        ChunkRow(
            tensor=number % 3,
            start=number,
            distances=generator.uniform(0, 1, 3) * 10.0 ** generator.integers(-20, 20, 3),
            unchanged=np.zeros(3, dtype=np.int64),
            checksums=np.zeros(3, dtype=np.int64),
        )
        for number in range(60)
    ]
    found = group_sums(plan, chunks)
    assert sorted(found) == [0, 1]
    assert group_sums(plan, ()) == {}
    for group, member in ((1, 0), (0, 2)):
        columns = zip(*(row.distances for row in chunks if row.tensor == member), strict=True)
        wanted = [math.fsum(column) for column in columns]
        assert found[group].total().tolist() == wanted
    # In any order and in parts.
    total, rest = group_sums(plan, chunks[45:])[1], group_sums(plan, chunks[:45][::-1])[1]
    total.merge(rest)
    assert np.array_equal(total.to_limbs(), found[1].to_limbs())


def test_sums_of_long_rows_do_not_depend_on_the_parts() -> None:
    """More bytes than are added at a time, of two groups in turn."""
    plan = plan_by_hand([tensor("a", 9, group=0), tensor("b", 9, group=1)], [])
    wanted = long_rows(10, 1 << 19)
    found = group_sums(plan, (replace(row, tensor=row.tensor % 2) for row in wanted))
    for group in (0, 1):
        total = ExactSum(1 << 19)
        for row in wanted[group::2]:
            total.add(row.distances)
        assert np.array_equal(found[group].total(), total.total())
