"""Tables as Parquet files, small ones and those whose rows hold a million numbers each.

Owns the dealings with pyarrow, which is loaded when a table is written or read. Must not know what the columns mean.
A table is written and read some rows at a time, so that a long one is in memory only as what its owner holds of it.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from pipeline.errors import Problem, VerificationError
from pipeline.storage import ObjectWriter, Store

# Numbers of one row group: small beside a long table, large enough for few requests.
GROUP_BYTES = 32_000_000
# What the objects around a row's numbers take.
_ROW_BYTES = 500
# Up to here a file is read in one request; a longer one is read by the columns and row groups that are asked for.
_WHOLE_BYTES = 16_000_000


def write_table(store: Store, path: str, columns: Mapping[str, Sequence[Any]], metadata: Mapping[str, str]) -> None:
    """Write a small table in one step.

    Args:
        store: Where to.
        path: The file's path there.
        columns: Name -> values, all of one length.
        metadata: Text pairs kept with the schema.

    Raises:
        ValueError: The columns differ in length or hold values that no column type fits.
        StorageError: It could not be written.
    """
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(dict(columns)).replace_schema_metadata(dict(metadata))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    store.write(path, buffer.getvalue())


class TableWriter:
    """A table that grows row by row, a row group of it in memory; invisible until `finish`.

    As a context manager it aborts unless `finish` was called.

    Args:
        store: Where to.
        path: The file's path there.
        names: The columns.
        metadata: Text pairs kept with the schema.
    """

    def __init__(self, store: Store, path: str, names: Sequence[str], metadata: Mapping[str, str]) -> None:
        self._store, self._path, self._metadata = store, path, dict(metadata)
        self._columns: dict[str, list[Any]] = {name: [] for name in names}
        self._waiting_bytes = 0
        self._sink: _Sink | None = None
        self._writer: Any = None

    def append(self, *values: Any) -> None:
        """Add a row.

        Args:
            values: One a column: a number, a text, or a one-dimensional NumPy array, of the same dtype in all rows. An
                array is not copied, and must not change before the table is finished.

        Raises:
            ValueError: There are more or fewer values than columns.
            StorageError: A row group could not be written.
        """
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
            self._waiting_bytes += getattr(value, "nbytes", 0)
        self._waiting_bytes += _ROW_BYTES
        if self._waiting_bytes >= GROUP_BYTES:
            if self._sink is None:
                self._sink = _Sink(self._store.open_writer(self._path))
            self._write_group(self._sink)

    def finish(self) -> None:
        """Write what is left and make the table visible.

        Raises:
            StorageError: It could not be written.
        """
        if self._sink is None:
            # One request, with the store's retries.
            buffer = io.BytesIO()
            self._write_group(buffer)
            self._writer.close()
            self._store.write(self._path, buffer.getvalue())
            return
        if any(self._columns.values()):
            self._write_group(self._sink)
        self._writer.close()
        self._sink.target.commit()

    def _write_group(self, sink: Any) -> None:
        """Write the waiting rows; the first group opens the Parquet file in the sink."""
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({name: _column(values) for name, values in self._columns.items()})
        if self._writer is None:
            # A dictionary of numbers that are all different is work for nothing.
            repeated = [field.name for field in table.schema if not pyarrow.types.is_list(field.type)]
            schema = table.schema.with_metadata(self._metadata)
            self._writer = pyarrow.parquet.ParquetWriter(sink, schema, compression="zstd", use_dictionary=repeated)
        self._writer.write_table(table.replace_schema_metadata(self._metadata))
        self._columns = {name: [] for name in self._columns}
        self._waiting_bytes = 0

    def abort(self) -> None:
        """Forget everything written; does nothing after `finish`."""
        if self._sink is not None:
            # Closing a Parquet file writes its footer, which now goes nowhere.
            self._sink.discard = True
            self._writer.close()
            self._sink.target.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


def read_table(store: Store, path: str) -> dict[str, list[Any]]:
    """Return the columns of a table.

    Raises:
        MissingObject: There is no such file.
        VerificationError: It is no readable Parquet file.
    """
    with _Reading(store, path) as file:
        columns: dict[str, list[Any]] = file.read(use_threads=False).to_pydict()
    return columns


def read_arrays(store: Store, path: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield some columns of a table, a row group at a time, without a Python object a number.

    Args:
        store: Where from.
        path: The file's path there.
        columns: The names of columns of numbers, or of lists of numbers.

    Yields:
        Name -> a NumPy array, or a list of read-only NumPy arrays, one a row. They keep their row group in memory.

    Raises:
        MissingObject: There is no such file.
        VerificationError: It is no readable Parquet file, or a column is missing.
    """
    with _Reading(store, path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=list(columns), use_threads=False).combine_chunks()
            if table.num_rows:
                yield {name: _arrays(table[name].chunk(0)) for name in columns}


def read_first_rows(store: Store, path: str, limit: int) -> Iterator[dict[str, Any]]:
    """Yield the first rows of a table as column -> value; row groups behind them are not read.

    Args:
        store: Where from.
        path: The file's path there.
        limit: At most so many rows.

    Raises:
        MissingObject: There is no such file.
        VerificationError: It is no readable Parquet file.
    """
    with _Reading(store, path) as file:
        for group in range(file.num_row_groups):
            if limit <= 0:
                return
            rows = file.read_row_group(group, use_threads=False).slice(0, limit).to_pylist()
            limit -= len(rows)
            yield from rows


def read_table_metadata(store: Store, path: str) -> dict[str, str]:
    """Return the text pairs kept with a table; raises as `read_table` does."""
    with _Reading(store, path) as file:
        found = file.schema_arrow.metadata or {}
    return {key.decode("utf-8"): value.decode("utf-8") for key, value in found.items()}


def _column(values: Sequence[Any]) -> Any:
    """Return the values of a column, rows of numbers as one list array."""
    import pyarrow

    if not values or getattr(values[0], "ndim", 0) != 1:
        return pyarrow.array(values)
    offsets = list(itertools.accumulate(map(len, values), initial=0))
    flat = pyarrow.concat_arrays([pyarrow.array(value) for value in values])
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), flat)


def _arrays(column: Any) -> Any:
    """Return a column of numbers as a NumPy array, one of lists as a list of them, without a copy."""
    import pyarrow

    if not pyarrow.types.is_list(column.type):
        return column.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_pylist()
    flat = column.values.to_numpy(zero_copy_only=False)
    return [flat[start:stop] for start, stop in itertools.pairwise(offsets)]


class _Reading:
    """A Parquet file open for reading; a context that turns pyarrow's errors into ours."""

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path

    def __enter__(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        size_bytes = self._store.stat(self._path).size_bytes
        if size_bytes <= _WHOLE_BYTES:
            source = pyarrow.BufferReader(self._store.read(self._path))
        else:
            source = pyarrow.PythonFile(_Ranges(self._store, self._path, size_bytes), mode="r")
        try:
            return pyarrow.parquet.ParquetFile(source)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        import pyarrow

        # A column that is not there is a KeyError.
        if isinstance(error, (pyarrow.ArrowException, OSError, KeyError)):
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> VerificationError:
        problem = Problem(
            what=f"is no readable table: {error}",
            where=self._store.location(self._path),
            remedy="delete it and run again",
        )
        return VerificationError(problem)


class _Ranges(io.RawIOBase):
    """An object of a store as a file that is read by byte ranges."""

    def __init__(self, store: Store, path: str, size_bytes: int) -> None:
        self._store, self._path, self._size_bytes, self._position = store, path, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._size_bytes if size < 0 else min(self._size_bytes, self._position + size)
        start, self._position = self._position, max(self._position, stop)
        return self._store.read(self._path, start, stop) if start < stop else b""


class _Sink(io.RawIOBase):
    """A streamed object of a store as a file that is written."""

    def __init__(self, target: ObjectWriter) -> None:
        self.target, self._position = target, 0
        self.discard = False

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        if not self.discard:
            self.target.write(data)
        self._position += len(data)
        return len(data)
