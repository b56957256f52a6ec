"""The run folder ``_geomerge/`` inside an output: what has been done, so that a second run need not do it again.

Owns names and formats of plan, statistics, solutions and markers. Every file is written atomically; a marker is written
after what it marks. Statistics, solutions and markers carry the plan's fingerprint, and those of another plan count for
nothing: they come from a worker of an earlier merge that nobody could stop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from pipeline.checkpoints.tables import TableWriter, read_arrays, read_table_metadata
from pipeline.errors import Problem, VerificationError
from pipeline.numerics.exact_sum import ExactSum
from pipeline.planning.plan import Plan
from pipeline.storage import MissingObject, Store

T = TypeVar("T")

FOLDER = "_geomerge"
PLAN = f"{FOLDER}/plan.json"
# What `geomerge status` needs of the plan, which itself may be hundreds of megabytes.
SUMMARY = f"{FOLDER}/summary.json"
SOLUTIONS = f"{FOLDER}/solutions.json"
# What iterations over the parameters have measured so far.
REDUCTIONS = f"{FOLDER}/reductions"
MEASURED = f"{FOLDER}/measured"
WRITTEN = f"{FOLDER}/written"
# The global norms of the models' diagonals, where a method divides by them.
NORMS = f"{FOLDER}/norms.json"
SIDE_FILES = f"{FOLDER}/side_files.json"
DISTANCES = f"{FOLDER}/distances.parquet"
ITERATIONS = f"{FOLDER}/iterations.parquet"
# The commit: transformers finds no weights in the folder before this file exists.
INDEX = "model.safetensors.index.json"
REPORT = "geomerge_report.json"
# The columns of a file's statistics.
_ROW = ("tensor", "start", "distances", "unchanged", "checksums")
# Small requests at a time: thirty files are asked for in the time of two, and no server takes this for an attack.
_REQUESTS = 16
# Distances added at a time: enough rows for the sums to be worth touching, few enough not to matter.
_SUMMED_BYTES = 32_000_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkRow:
    """What the first read of a chunk leaves behind; equal to a row of the same numbers. Legend: P points, I inputs.

    Attributes:
        distances: P·(P−1)/2 float64 squared distances, the upper triangle row by row: half a million for 1000 models.
        unchanged: P int64 counts of elements that equal the first point's.
        checksums: I int64 hashes of the bytes read.
    """

    tensor: int
    start: int
    distances: np.ndarray
    unchanged: np.ndarray
    checksums: np.ndarray

    def __post_init__(self) -> None:
        for name, dtype in (("distances", np.float64), ("unchanged", np.int64), ("checksums", np.int64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChunkRow):
            return NotImplemented
        return (
            (self.tensor, self.start) == (other.tensor, other.start)
            and np.array_equal(self.distances, other.distances)
            and np.array_equal(self.unchanged, other.unchanged)
            and np.array_equal(self.checksums, other.checksums)
        )


def write_json(store: Store, path: str, value: object) -> None:
    """Write a JSON document atomically, readable by people."""
    store.write(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(store: Store, path: str) -> dict[str, Any] | None:
    """Return a JSON document, or None when it does not exist.

    Raises:
        VerificationError: It is damaged.
    """
    try:
        data = store.read(path)
    except MissingObject:
        return None
    try:
        document = json.loads(data)
    except ValueError:  # no UTF-8, or no JSON
        document = None
    if not isinstance(document, dict):
        raise VerificationError(
            Problem(
                what="is damaged: it holds no JSON object",
                where=store.location(path),
                remedy="choose another folder, or give --overwrite to start again",
            )
        )
    return document


def measured_path(file: str) -> str:
    """Return where the statistics of an output file's tensors lie."""
    return f"{MEASURED}/{file}.parquet"


def written_path(file: str) -> str:
    """Return where the marker of an output file lies."""
    return f"{WRITTEN}/{file}.json"


class RowsWriter(TableWriter):
    """The statistics of one output file as they are measured; once finished they mark the file as measured.

    Args:
        store: The output.
        file: The output file's name.
        fingerprint: The plan's.
    """

    def __init__(self, store: Store, file: str, fingerprint: str) -> None:
        super().__init__(store, measured_path(file), _ROW, {"fingerprint": fingerprint})

    def add(self, row: ChunkRow) -> None:
        """Add a chunk's statistics."""
        self.append(*(getattr(row, name) for name in _ROW))


def is_measured(store: Store, file: str, fingerprint: str) -> bool:
    """Return whether the saved statistics of one output file, which are there, were measured by a plan.

    Raises:
        VerificationError: The file is damaged.
    """
    return read_table_metadata(store, measured_path(file)).get("fingerprint") == fingerprint


def _refuse_foreign_rows(store: Store, file: str, fingerprint: str | None) -> None:
    if fingerprint is None or is_measured(store, file, fingerprint):
        return
    raise VerificationError(
        Problem(
            what="was measured by another merge, which still wrote here when this one had begun",
            where=store.location(measured_path(file)),
            remedy="end whatever else writes there, and start again with --overwrite",
        )
    )


def read_rows(store: Store, file: str, fingerprint: str | None = None) -> Iterator[ChunkRow]:
    """Yield the saved statistics of one output file, a part of them in memory at a time.

    Args:
        store: The output.
        file: The output file's name.
        fingerprint: Of the plan that must have measured them; None for any.

    Raises:
        VerificationError: The file is damaged, or was measured by another plan.
    """
    _refuse_foreign_rows(store, file, fingerprint)
    for part in read_arrays(store, measured_path(file), _ROW):
        for tensor, start, distances, unchanged, checksums in zip(*(part[name] for name in _ROW), strict=True):
            yield ChunkRow(
                tensor=int(tensor), start=int(start), distances=distances, unchanged=unchanged, checksums=checksums
            )


def load_checksums(store: Store, file: str, fingerprint: str | None = None) -> dict[tuple[int, int], np.ndarray]:
    """Return, by tensor and start, the hashes (I, int64) of a file's chunks, without reading their distances.

    Args:
        store: The output.
        file: The output file's name.
        fingerprint: Of the plan that must have measured them; None for any.

    Raises:
        VerificationError: The file is damaged, or was measured by another plan.
    """
    _refuse_foreign_rows(store, file, fingerprint)
    return {
        (int(tensor), int(start)): checksums
        for part in read_arrays(store, measured_path(file), ("tensor", "start", "checksums"))
        for tensor, start, checksums in zip(part["tensor"], part["start"], part["checksums"], strict=True)
    }


def finished(store: Store, folder: str, suffix: str) -> frozenset[str]:
    """Return the output files that have a marker below `folder`, by one listing."""
    return marked(store.list(folder), folder, suffix)


def marked(paths: Iterable[str], folder: str, suffix: str) -> frozenset[str]:
    """Return the output files that have a marker below `folder` among the paths of a listing."""
    start = f"{folder}/"
    return frozenset(
        path.removeprefix(start).removesuffix(suffix)
        for path in paths
        if path.startswith(start) and path.endswith(suffix)
    )


def at_once(store: Store, request: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """Return what a request to a store gives for each of some names, in their order.

    Args:
        store: One of this machine is asked one by one; another many times at once, for each answer takes a while.
        request: Asks for one name.
        names: Paths, or what paths are made of.
    """
    if store.is_local or len(names) < 2:
        return [request(name) for name in names]
    with ThreadPoolExecutor(min(_REQUESTS, len(names)), thread_name_prefix="request") as pool:
        return list(pool.map(request, names))


class GroupSums:
    """The exact sums of rows' distances by group, from rows that need not be in memory together.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sums: dict[int, ExactSum] = {}
        self._waiting: dict[int, list[np.ndarray]] = {}
        self._waiting_bytes = 0

    def add(self, row: ChunkRow) -> None:
        """Add a chunk's distances; those of a tensor that is only copied count for nothing."""
        group = self._plan.tensors[row.tensor].group
        if group < 0:
            return
        self._waiting.setdefault(group, []).append(row.distances)
        self._waiting_bytes += row.distances.nbytes
        if self._waiting_bytes > _SUMMED_BYTES:
            self._add_waiting()

    def totals(self) -> dict[int, ExactSum]:
        """Return the sums by group: to be merged over files in any order."""
        self._add_waiting()
        return self._sums

    def _add_waiting(self) -> None:
        for group, rows in self._waiting.items():
            self._sums.setdefault(group, ExactSum(len(rows[0]))).add(rows)
        self._waiting = {}
        self._waiting_bytes = 0


def group_sums(plan: Plan, rows: Iterable[ChunkRow]) -> dict[int, ExactSum]:
    """Return, by group, the exact sums of the rows' distances: to be merged over files in any order.

    Args:
        plan: The plan.
        rows: Statistics of some chunks.
    """
    sums = GroupSums(plan)
    for row in rows:
        sums.add(row)
    return sums.totals()


def triangle(matrix_PP: np.ndarray) -> np.ndarray:
    """Return the upper triangle of a symmetric matrix, row by row."""
    return np.asarray(matrix_PP[np.triu(np.ones(matrix_PP.shape, dtype=bool), k=1)])


def square(values: np.ndarray | Sequence[float] | float, points: int) -> np.ndarray:
    """Return the symmetric matrix (points × points, float64, zero diagonal) of an upper triangle, or of one number."""
    matrix_PP = np.zeros((points, points))
    matrix_PP[np.triu(np.ones((points, points), dtype=bool), k=1)] = values
    matrix_PP += matrix_PP.T
    return matrix_PP
