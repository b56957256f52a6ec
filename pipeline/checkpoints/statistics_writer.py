"""The writing of statistics: one at a time, kept file by file, complete when statistics.json is there.

Owns the dealing of statistics to files, the packing of triangles, and going on where an earlier run stopped. Must not
know what the numbers mean. Takes whatever gives its memory as a C-contiguous array of fp32 or fp64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.checkpoints.checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from pipeline.checkpoints.header import read_header
from pipeline.checkpoints.statistics import stored_entry, triangle_elements, triangle_size
from pipeline.checkpoints.statistics_facts import (
    COMPLETE_FILE,
    FORMAT,
    FORMAT_VERSION,
    SUFFIX,
    Kind,
    StatisticsFacts,
    file_metadata,
    metadata_facts,
    tensor_name,
)
from pipeline.checkpoints.writer import SafetensorsWriter, TensorSpec
from pipeline.errors import OutputError, Problem
from pipeline.storage import Store

# Small statistics are copied and wait for each other up to here; a larger one is streamed into a file of its own.
WAITING_BYTES = 32 << 20
# Rows of a triangle are gathered up to here, or else a small matrix would be thousands of writes.
_PIECE_BYTES = 1 << 20
_DTYPES = {"f": "F32", "<f": "F32", "d": "F64", "<d": "F64"}


class StatisticsWriter:
    """Writes a folder of statistics; what an interrupted run of the same facts left there is kept.

    Memory: the array that is being added, and at most `WAITING_BYTES` of small ones that wait for a file.

    Args:
        store: The folder: of its own, empty or with unfinished statistics of the same facts.
        facts: Where the statistics come from.

    Raises:
        OutputError: The folder holds a model, finished statistics, or unfinished ones of other facts.
        CheckpointError: A file in it is damaged.
    """

    def __init__(self, store: Store, facts: StatisticsFacts) -> None:
        self._store, self._facts = store, facts
        self._files: dict[str, int] = {}
        self._stored: set[str] = set()
        self._shared: dict[str, str] = {}
        self._outside: dict[str, str] = {}
        self._waiting: list[tuple[TensorSpec, bytes]] = []
        self._untold: dict[str, str] = {}
        self._refuse_folder()
        for path in store.list():
            if path.endswith(SUFFIX):
                self._take_over(path)
        # Of a file that is gone, what was to be shared is to be made again.
        self._shared = {name: stored for name, stored in self._shared.items() if stored in self._stored}

    def has(self, kind: Kind, parameter: str) -> bool:
        """Return whether a statistic was added or shared, by this run or an earlier one."""
        name = tensor_name(kind, parameter)
        return name in self._stored or name in self._shared

    def add(self, kind: Kind, parameter: str, array: Any) -> None:
        """Add one statistic.

        Args:
            kind: What it is.
            parameter: The parameter's name in the checkpoint, ".weight" included.
            array: C-contiguous fp32 or fp64 (a NumPy array): a diagonal of the parameter's shape; a symmetric matrix
                [d, d], of which the upper triangle is stored, or that triangle already packed, [d(d+1)/2]. Not kept.

        Raises:
            ValueError: The array is of another dtype, shape or layout, or the statistic is there already.
            StorageError: It could not be written.
        """
        name = tensor_name(kind, parameter)
        if self.has(kind, parameter):
            raise ValueError(f"{name} was added before")
        view = memoryview(array)
        spec = (name, *_dtype_and_shape(kind, view))
        pieces = _pieces(view, triangle=kind != "diagonal" and view.ndim == 2)
        if view.nbytes > WAITING_BYTES:
            self._write_waiting()
            self._write_file([spec], pieces)
        else:
            if sum(len(data) for _, data in self._waiting) + view.nbytes > WAITING_BYTES:
                self._write_waiting()
            self._waiting.append((spec, b"".join(pieces)))
        self._stored.add(name)

    def share(self, kind: Kind, parameter: str, stored: str) -> None:
        """Say that a parameter's statistic equals that of another, which is stored.

        Args:
            kind: What it is.
            parameter: Whose statistic is not stored.
            stored: Whose is, added before.

        Raises:
            ValueError: That statistic was not added, or the parameter has one already.
        """
        name, target = tensor_name(kind, parameter), tensor_name(kind, stored)
        if self.has(kind, parameter) or target not in self._stored:
            raise ValueError(f"{name} cannot share {target}: the first must be new, the second stored")
        self._shared[name] = self._untold[name] = target

    def outside(self, parameter: str, reason: str) -> None:
        """Say why a parameter has no statistic of the kind that is collected: it is an embedding, a norm, a bias."""
        self._outside[parameter] = reason

    def flush(self) -> None:
        """Make durable what was added and shared: a later writer of the same facts has it."""
        if self._waiting or self._untold:
            self._write_waiting(empty=True)

    def finish(self) -> None:
        """Write what waits, then the file that makes the folder complete.

        Raises:
            StorageError: It could not be written.
        """
        self._write_waiting()
        text = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "facts": self._facts.to_json(),
            "files": dict(sorted(self._files.items())),
            "shared": self._shared,
            "outside": self._outside,
        }
        self._store.write(COMPLETE_FILE, json.dumps(text, indent=1, ensure_ascii=False).encode("utf-8"))

    def _write_waiting(self, *, empty: bool = False) -> None:
        """Write the waiting statistics into one file; without any a file only if asked for."""
        if self._waiting or empty:
            waiting, self._waiting = self._waiting, []
            self._write_file([spec for spec, _ in waiting], (data for _, data in waiting))

    def _write_file(self, specs: list[TensorSpec], pieces: Iterator[bytes | memoryview]) -> None:
        number = 1 + max((int(path.removesuffix(SUFFIX)) for path in self._files), default=0)
        path = f"{number:05}{SUFFIX}"
        metadata = file_metadata(self._facts, self._untold)
        with self._store.open_writer(path) as target:
            file = SafetensorsWriter(target, specs, metadata)
            for piece in pieces:
                file.write(piece)
            self._files[path] = file.finish().size_bytes
        self._untold = {}

    def _refuse_folder(self) -> None:
        """Refuse a folder that is not for us."""
        for name in (SINGLE_FILE, INDEX_FILE, CONFIG_FILE):
            if self._store.exists(name):
                raise self._refusal(f"is a model folder: it has {name}")
        if self._store.exists(COMPLETE_FILE):
            raise self._refusal("holds finished statistics")

    def _take_over(self, path: str) -> None:
        """Count a file of an earlier, interrupted run as ours."""
        where = self._store.location(path)
        if not path.removesuffix(SUFFIX).isdecimal():
            raise self._refusal(f"has a file {path}, which no run of this program wrote")
        header = read_header(self._store, path)
        facts, shared = metadata_facts(header.metadata, where)
        if facts != self._facts:
            raise self._refusal(
                f"holds unfinished statistics of something else: {first_difference(facts, self._facts)}"
            )
        self._files[path] = header.size_bytes
        self._stored.update(tensor.name for tensor in header.tensors if stored_entry(tensor, where))
        self._shared.update(shared)

    def _refusal(self, what: str) -> OutputError:
        remedy = "choose another folder for the statistics, or delete this one"
        return OutputError(Problem(what=what, where=self._store.location(), remedy=remedy))


def _dtype_and_shape(kind: Kind, view: memoryview) -> tuple[str, tuple[int, ...]]:
    """Return dtype and stored shape of an array."""
    dtype = _DTYPES.get(view.format)
    if dtype is None or not view.c_contiguous:
        raise ValueError(f"a statistic must be a C-contiguous array of fp32 or fp64, not of format {view.format!r}")
    shape = tuple(view.shape or ())
    if kind == "diagonal":
        return dtype, shape
    if len(shape) == 2 and shape[0] == shape[1]:
        return dtype, (triangle_elements(shape[0]),)
    if len(shape) == 1 and triangle_size(shape[0]) is not None:
        return dtype, shape
    raise ValueError(f"{kind} must be a square matrix or its packed triangle, is {list(shape)}")


def _pieces(view: memoryview, *, triangle: bool) -> Iterator[bytes | memoryview]:
    """Yield what is stored of an array; of a square matrix the upper triangle, row by row."""
    if not view.nbytes:
        return
    flat = view.cast("B")
    if not triangle:
        yield flat
        return
    size, width = (view.shape or ())[0], view.itemsize
    gathered = bytearray()
    for row in range(size):
        gathered += flat[(row * size + row) * width : (row + 1) * size * width]
        if len(gathered) >= _PIECE_BYTES:
            yield bytes(gathered)
            gathered.clear()
    yield bytes(gathered)


def first_difference(found: StatisticsFacts, wanted: StatisticsFacts) -> str:
    """Return which fact differs first, and how."""
    ours: Mapping[str, object] = wanted.to_json()
    for name, value in found.to_json().items():
        if value != ours[name]:
            return f"{name} is {value!r} there, {ours[name]!r} here"
    return "nothing"
