"""Rows of a file of examples: JSON lines, or Parquet.

Owns the two forms and how the first rows are read without the rest. Must not know what the fields mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from pipeline.checkpoints.tables import read_first_rows
from pipeline.errors import CalibrationError, Problem, VerificationError
from pipeline.storage import MissingObject, Store, open_store, shown_url, split_url

PARQUET = ".parquet"
# Read at a time: a thousand texts take one or two requests.
_PIECE_BYTES = 4 << 20
# A line longer than this is no example, and must not fill the memory.
_LONGEST_LINE_BYTES = 64 << 20

Row = Mapping[str, object]


def read_rows(url: str, limit: int) -> tuple[tuple[Row, ...], str]:
    """Return the first rows of a file and the file's version; what follows them is not read.

    Args:
        url: Path or URL of a file that ends in ".parquet", or of one with a JSON object in every line.
        limit: At most so many rows.

    Raises:
        CalibrationError: There is no such file, it holds no row, or a line is no JSON object.
        StorageError: It could not be read.
    """
    folder, name = split_url(url)
    where = f"data {shown_url(url)}"
    store = open_store(folder)
    try:
        stat = store.stat(name)
        if name.partition("?")[0].endswith(PARQUET):
            rows: tuple[Row, ...] = tuple(read_first_rows(store, name, limit))
        else:
            rows = tuple(_json_rows(store, name, stat.size_bytes, limit, where))
    except MissingObject as error:
        raise CalibrationError(Problem(what="is no file", where=where, remedy="name one existing file")) from error
    except VerificationError as error:
        remedy = "fetch or write it again; JSON lines are named .jsonl"
        raise CalibrationError(Problem(what="is no readable Parquet file", where=where, remedy=remedy)) from error
    finally:
        store.close()
    if not rows:
        raise CalibrationError(Problem(what="holds no example", where=where))
    return rows, stat.version


def _json_rows(store: Store, name: str, size_bytes: int, limit: int, where: str) -> Iterator[Row]:
    """Yield the first objects of a file of JSON lines; empty lines are none."""
    found = 0
    for number, line in enumerate(_lines(store, name, size_bytes, where), start=1):
        if not line.strip():
            continue
        if found == limit:
            return
        found += 1
        yield _object(line, f"{where}, line {number}")


def _lines(store: Store, name: str, size_bytes: int, where: str) -> Iterator[bytes]:
    """Yield the lines of a file, read piece by piece."""
    rest = b""
    for start in range(0, size_bytes, _PIECE_BYTES):
        *lines, rest = (rest + store.read(name, start, min(size_bytes, start + _PIECE_BYTES))).split(b"\n")
        yield from lines
        if len(rest) > _LONGEST_LINE_BYTES:
            raise CalibrationError(Problem(what=f"has a line of more than {_LONGEST_LINE_BYTES} bytes", where=where))
    yield rest


def _object(line: bytes, where: str) -> Row:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = "is no JSON object"
        raise CalibrationError(Problem(what=what, where=where, remedy="one JSON object a line, or Parquet")) from error
    if not isinstance(found, dict):
        raise CalibrationError(Problem(what=f"must be a JSON object, is {type(found).__name__}", where=where))
    return found
