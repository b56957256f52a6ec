"""Statistics of a model, opened: second moments that a method weighs parameters by, known from headers alone.

Owns what a folder of statistics must look like and where each statistic lies. Must not read statistics, nor know what
methods make of them. `docs/statistics.md` describes the format; `statistics_writer` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

from pipeline.checkpoints.checkpoint import INDEX_FILE, SINGLE_FILE, SourceFile, read_object
from pipeline.checkpoints.header import Header, TensorEntry, read_header
from pipeline.checkpoints.json_text import is_plain_text, refusal, short
from pipeline.checkpoints.statistics_facts import (
    ALLOWED_DTYPES,
    COMPLETE_FILE,
    SUFFIX,
    Kind,
    StatisticsFacts,
    check_format,
    facts_from_json,
    metadata_facts,
    split_name,
    tensor_name,
    text_pairs,
)
from pipeline.errors import CheckpointError
from pipeline.storage import Store, is_path, open_store

# Requests in flight for headers: enough to hide the latency of an object store, few for a disk.
_HEADERS_AT_ONCE = 8
_REMEDY = "write the statistics again by `geomerge calibrate`"


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticEntry:
    """Where one statistic's bytes are.

    Attributes:
        kind: What it is; matrices (all but "diagonal") are stored as their upper triangle, row by row.
        parameter: Whose it was when it was stored; parameters that share it have the same entry.
        dtype: "F32" or "F64".
        shape: Of the statistic: of a diagonal its parameter's, of a matrix (d, d).
        file: The path of its file inside the store.
        start: Offset of its first byte in the file.
        stop: Offset behind its last byte.
    """

    kind: Kind
    parameter: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The d of a d×d matrix; the number of elements of a diagonal."""
        return math.prod(self.shape) if self.kind == "diagonal" else self.shape[0]

    @property
    def elements(self) -> int:
        """The number of stored elements."""
        return self.size if self.kind == "diagonal" else triangle_elements(self.size)

    @property
    def size_bytes(self) -> int:
        """The number of stored bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """All statistics of a folder and where their bytes are.

    Attributes:
        url: What was opened, without credentials.
        store: Its folder.
        files: In the order of their names.
        facts: Where they come from.
        entries: By stored name ("KIND:PARAMETER"), ordered by file, then offset.
        shared: Name -> the stored name that it equals.
        reasons: Parameter -> why there is no statistic for it.
    """

    url: str
    store: Store
    files: tuple[SourceFile, ...]
    facts: StatisticsFacts
    entries: Mapping[str, StatisticEntry]
    shared: Mapping[str, str]
    reasons: Mapping[str, str]

    def find(self, kind: Kind, parameter: str) -> StatisticEntry | None:
        """Return the statistic of a parameter, its own or one that it shares; None when there is none.

        Args:
            kind: Which statistic.
            parameter: The parameter's name in the checkpoint, ".weight" included.
        """
        name = tensor_name(kind, parameter)
        return self.entries.get(self.shared.get(name, name))

    def outside(self, parameter: str) -> str | None:
        """Return why a parameter has no statistic; None when the files do not say that it has none."""
        return self.reasons.get(parameter)

    def parameters(self, kind: Kind) -> tuple[str, ...]:
        """Return the parameters that have a statistic of a kind, own or shared, in stored order, shared ones last."""
        prefix = tensor_name(kind, "")
        return tuple(name.removeprefix(prefix) for name in (*self.entries, *self.shared) if name.startswith(prefix))


def open_statistics(url: str, options: Mapping[str, object] | None = None) -> Statistics:
    """Return the statistics of a folder, from their headers; no statistic is read.

    Args:
        url: A folder, or a URL prefix.
        options: Storage options.

    Raises:
        CheckpointError: The folder is a model, unfinished, or its files are damaged or contradict each other.
        StorageError: They could not be read.
    """
    store = open_store(url, options)
    try:
        return _open(store)
    finally:
        store.close()


def triangle_elements(size: int) -> int:
    """Return how many elements the upper triangle of a d×d matrix has, the diagonal included."""
    return size * (size + 1) // 2


def triangle_size(elements: int) -> int | None:
    """Return the d of the d×d matrix whose upper triangle has so many elements; None when there is none."""
    size = (math.isqrt(8 * elements + 1) - 1) // 2
    return size if triangle_elements(size) == elements else None


def triangle_row(size: int, row: int) -> int:
    """Return how many stored elements precede a row of the upper triangle of a d×d matrix."""
    return row * size - row * (row - 1) // 2


def stored_entry(tensor: TensorEntry, where: str) -> StatisticEntry:
    """Return what a tensor of a file of statistics is.

    Raises:
        CheckpointError: It is of no known kind, too coarse, or no triangle.
    """
    kind, parameter = split_name(tensor.name, where)
    where = f"{where}: tensor {short(tensor.name)}"
    if tensor.dtype not in ALLOWED_DTYPES:
        raise refusal(where, f"is {tensor.dtype}, too coarse for a statistic", f"store {' or '.join(ALLOWED_DTYPES)}")
    shape = tensor.shape
    if kind != "diagonal":
        size = triangle_size(tensor.elements)
        if len(shape) != 1 or size is None:
            raise refusal(where, f"has the shape {list(shape)}, which is no triangle of a square matrix", _REMEDY)
        shape = (size, size)
    return StatisticEntry(
        kind=kind,
        parameter=parameter,
        dtype=tensor.dtype,
        shape=shape,
        file=tensor.file,
        start=tensor.start,
        stop=tensor.stop,
    )


def _open(store: Store) -> Statistics:
    """Return the statistics in a folder."""
    complete = read_object(store, COMPLETE_FILE, strict=True)
    if complete is None:
        raise _no_statistics(store)
    where = store.location(COMPLETE_FILE)
    check_format(complete, where)
    facts = facts_from_json(complete.get("facts"), where)
    sizes = _file_sizes(complete.get("files"), where)
    with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
        headers = tuple(pool.map(lambda path: read_header(store, path), sizes))
    entries = _entries(store, facts, dict(zip(sizes, headers, strict=True)), sizes)
    shared = text_pairs(complete.get("shared"), "shared", where)
    for name, stored in shared.items():
        if name in entries or stored not in entries or split_name(name, where)[0] != entries[stored].kind:
            raise refusal(where, f"{short(name)} cannot share {short(stored)}, as it says", _REMEDY)
    return Statistics(
        url=store.location(),
        store=store,
        files=tuple(
            SourceFile(path=path, size_bytes=head.size_bytes, version=head.version, header_bytes=head.header_bytes)
            for path, head in zip(sizes, headers, strict=True)
        ),
        facts=facts,
        entries=MappingProxyType(entries),
        shared=MappingProxyType(shared),
        reasons=MappingProxyType(text_pairs(complete.get("outside"), "outside", where)),
    )


def _file_sizes(found: object, where: str) -> dict[str, int]:
    """Return path -> bytes of all files, sorted by path."""
    if not isinstance(found, dict) or not all(
        is_plain_text(path) and is_path(path) and path.endswith(SUFFIX) and type(size) is int
        for path, size in found.items()
    ):
        raise refusal(where, f"files must map names ending in {SUFFIX} to sizes", _REMEDY)
    return dict(sorted(found.items()))


def _entries(
    store: Store, facts: StatisticsFacts, headers: Mapping[str, Header], sizes: Mapping[str, int]
) -> dict[str, StatisticEntry]:
    """Return all statistics, the files checked against what the folder says of them."""
    entries: dict[str, StatisticEntry] = {}
    for path, header in headers.items():
        where = store.location(path)
        if metadata_facts(header.metadata, where)[0] != facts:
            raise refusal(where, f"has other facts than {COMPLETE_FILE}: it belongs to other statistics", _REMEDY)
        if header.size_bytes != sizes[path]:
            what = f"has {header.size_bytes} bytes, {COMPLETE_FILE} says {sizes[path]}"
            raise refusal(where, what, "copy the whole folder again")
        for tensor in header.tensors:
            if tensor.name in entries:
                raise refusal(where, f"tensor {short(tensor.name)} is also in {entries[tensor.name].file}", _REMEDY)
            entries[tensor.name] = stored_entry(tensor, where)
    return entries


def _no_statistics(store: Store) -> CheckpointError:
    """Return what to say of a folder without statistics."""
    if any(store.exists(name) for name in (SINGLE_FILE, INDEX_FILE)):
        return refusal(
            store.location(), "is a model, not statistics", "collect statistics of it by `geomerge calibrate`"
        )
    if any(path.endswith(SUFFIX) for path in store.list()):
        what = f"holds unfinished statistics: there is no {COMPLETE_FILE}"
        return refusal(store.location(), what, "run `geomerge calibrate` again, it goes on where it stopped")
    return refusal(
        store.location(),
        f"has no {COMPLETE_FILE}: it holds no statistics, or does not exist",
        "point to the folder that `geomerge calibrate` wrote, not to a file in it",
    )
