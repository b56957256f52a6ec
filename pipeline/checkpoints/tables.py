"""Small tables as Parquet files.

Owns the dealings with pyarrow, which is loaded when a table is written or read. Must not know what the columns mean.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import Problem, VerificationError
from pipeline.storage import Store


def write_table(store: Store, path: str, columns: Mapping[str, Sequence[Any]], metadata: Mapping[str, str]) -> None:
    """Write a table in one step.

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


def read_table(store: Store, path: str) -> dict[str, list[Any]]:
    """Return the columns of a table.

    Raises:
        MissingObject: There is no such file.
        VerificationError: It is no readable Parquet file.
    """
    columns: dict[str, list[Any]] = _read(store, path).to_pydict()
    return columns


def read_table_metadata(store: Store, path: str) -> dict[str, str]:
    """Return the text pairs kept with a table; raises as `read_table` does."""
    found = _read(store, path).schema.metadata or {}
    return {key.decode("utf-8"): value.decode("utf-8") for key, value in found.items()}


def _read(store: Store, path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    raw = store.read(path)
    try:
        return pyarrow.parquet.read_table(pyarrow.BufferReader(raw))
    except (pyarrow.ArrowException, OSError) as error:
        problem = Problem(
            what=f"is no readable table: {error}", where=store.location(path), remedy="delete it and run again"
        )
        raise VerificationError(problem) from error
