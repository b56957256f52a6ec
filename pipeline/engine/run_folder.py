"""The run folder ``_geomerge/`` inside an output: what has been done, so that a second run need not do it again.

Owns names and formats of plan, statistics, solutions and markers. Every file is written atomically; a marker is written
after what it marks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.checkpoints.tables import read_table, write_table
from pipeline.errors import Problem, VerificationError
from pipeline.numerics.exact_sum import ExactSum
from pipeline.planning.plan import Plan
from pipeline.storage import Store

FOLDER = "_geomerge"
PLAN = f"{FOLDER}/plan.json"
SOLUTIONS = f"{FOLDER}/solutions.json"
MEASURED = f"{FOLDER}/measured"
WRITTEN = f"{FOLDER}/written"
SIDE_FILES = f"{FOLDER}/side_files.json"
DISTANCES = f"{FOLDER}/distances.parquet"
ITERATIONS = f"{FOLDER}/iterations.parquet"
# The commit: transformers finds no weights in the folder before this file exists.
INDEX = "model.safetensors.index.json"
REPORT = "geomerge_report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRow:
    """What the first read of a chunk leaves behind. Legend: P points, I inputs.

    Attributes:
        distances: P·(P−1)/2 squared distances, the upper triangle row by row.
        unchanged: P counts of elements that equal the first point's.
        checksums: I signed 64-bit hashes of the bytes read.
    """

    tensor: int
    start: int
    distances: tuple[float, ...]
    unchanged: tuple[int, ...]
    checksums: tuple[int, ...]


def write_json(store: Store, path: str, value: object) -> None:
    """Write a JSON document atomically, readable by people."""
    store.write(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(store: Store, path: str) -> dict[str, Any] | None:
    """Return a JSON document, or None when it does not exist.

    Raises:
        VerificationError: It is damaged.
    """
    if not store.exists(path):
        return None
    try:
        document = json.loads(store.read(path))
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


def save_rows(store: Store, file: str, rows: Sequence[ChunkRow], fingerprint: str) -> None:
    """Save the statistics of one output file: at once the result and the marker of its measuring."""
    columns: dict[str, Sequence[object]] = {
        "tensor": [row.tensor for row in rows],
        "start": [row.start for row in rows],
        "distances": [list(row.distances) for row in rows],
        "unchanged": [list(row.unchanged) for row in rows],
        "checksums": [list(row.checksums) for row in rows],
    }
    write_table(store, measured_path(file), columns, {"fingerprint": fingerprint})


def load_rows(store: Store, file: str) -> tuple[ChunkRow, ...]:
    """Return the saved statistics of one output file.

    Raises:
        VerificationError: The file is damaged.
    """
    table = read_table(store, measured_path(file))
    columns = (table["tensor"], table["start"], table["distances"], table["unchanged"], table["checksums"])
    return tuple(
        ChunkRow(
            tensor=tensor,
            start=start,
            distances=tuple(distances),
            unchanged=tuple(unchanged),
            checksums=tuple(checksums),
        )
        for tensor, start, distances, unchanged, checksums in zip(*columns, strict=True)
    )


def finished(store: Store, folder: str, suffix: str) -> frozenset[str]:
    """Return the output files that have a marker below `folder`, by one listing."""
    return frozenset(
        path.removeprefix(f"{folder}/").removesuffix(suffix) for path in store.list(folder) if path.endswith(suffix)
    )


def group_sums(plan: Plan, rows: Sequence[ChunkRow]) -> dict[int, np.ndarray]:
    """Return, by group, the exact sums of the rows' distances as limbs: to be added up over files in any order.

    Args:
        plan: The plan.
        rows: Statistics of some chunks.
    """
    by_group: dict[int, list[tuple[float, ...]]] = {}
    for row in rows:
        group = plan.tensors[row.tensor].group
        if group >= 0:
            by_group.setdefault(group, []).append(row.distances)
    sums = {}
    for group, distances in by_group.items():
        total = ExactSum(len(distances[0]))
        total.add(np.array(distances))
        sums[group] = total.to_limbs()
    return sums


def triangle(matrix_PP: np.ndarray) -> tuple[float, ...]:
    """Return the upper triangle of a symmetric matrix, row by row."""
    return tuple(matrix_PP[np.triu_indices(len(matrix_PP), k=1)].tolist())


def square(values: Sequence[float] | float, points: int) -> np.ndarray:
    """Return the symmetric matrix (points × points, float64, zero diagonal) of an upper triangle, or of one number."""
    matrix_PP = np.zeros((points, points))
    matrix_PP[np.triu_indices(points, k=1)] = values
    return matrix_PP + matrix_PP.T
