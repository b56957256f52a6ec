"""What is known of a finished output file, and its marker in the run folder.

Owns the record, how it is gathered, and its JSON form. Pure. Legend: P points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.checkpoints.writer import WrittenFile as StoredFile
from pipeline.engine.chunk_math import MergedChunk
from pipeline.engine.solutions import Solution, solution_from_json
from pipeline.engine.system_records import SystemRecord, joined_record, record_from_json
from pipeline.numerics.exact_sum import exact_column_sums
from pipeline.planning.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """One finished output file.

    Attributes:
        squared_distances: By group, P sums over this file of ‖written − point‖².
        squared_rounding: By group, the sum over this file of ‖written − exact‖².
        replaced: By point, how many values were not finite and taken from the base.
        solutions: The groups that were solved here (a fused file).
        discarded: By tensor that is stored as factors, the squared norm that truncation cut off, and the whole.
        systems: The linear systems that were solved for it, in the order of its tensors.
    """

    file: int
    name: str
    size_bytes: int
    sha256: str
    squared_distances: Mapping[int, tuple[float, ...]]
    squared_rounding: Mapping[int, float]
    replaced: tuple[int, ...]
    solutions: tuple[Solution, ...]
    discarded: Mapping[int, tuple[float, float]]
    systems: tuple[SystemRecord, ...] = ()


class Gathered:
    """What merged chunks of one file leave behind, gathered chunk by chunk in their order.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sums: dict[int, list[tuple[float, ...]]] = {}
        self._discarded: dict[int, tuple[float, float]] = {}
        self._records: dict[int, list[SystemRecord]] = {}

    def add(self, tensor: int, merged: MergedChunk) -> None:
        """Take what one chunk of a tensor leaves behind."""
        if merged.sums:
            self._sums.setdefault(self._plan.tensors[tensor].group, []).append(merged.sums)
        if merged.discarded is not None:
            self._discarded[tensor] = merged.discarded
        if merged.record is not None:
            self._records.setdefault(tensor, []).append(merged.record)

    def written_file(self, file: int, written: StoredFile, solutions: tuple[Solution, ...]) -> WrittenFile:
        """Return the record of the file, which is whole now.

        Args:
            file: Its index.
            written: What the writer tells of it.
            solutions: The groups that were solved for it.
        """
        points = len(self._plan.points)
        sums_of = {group: exact_column_sums(np.array(values)) for group, values in self._sums.items()}
        return WrittenFile(
            file=file,
            name=self._plan.files[file].name,
            size_bytes=written.size_bytes,
            sha256=written.sha256,
            squared_distances={group: tuple(sums[:points].tolist()) for group, sums in sums_of.items()},
            squared_rounding={group: float(sums[points]) for group, sums in sums_of.items()},
            replaced=tuple(int(sum(sums[points + 1 + row] for sums in sums_of.values())) for row in range(points)),
            solutions=solutions,
            discarded=self._discarded,
            systems=tuple(joined_record(parts) for parts in self._records.values()),
        )


def marker(result: WrittenFile, fingerprint: str) -> dict[str, object]:
    """Return the JSON form of a finished file, with the fingerprint of its plan."""
    return {
        "fingerprint": fingerprint,
        "file": result.file,
        "name": result.name,
        "size_bytes": result.size_bytes,
        "sha256": result.sha256,
        "squared_distances": {str(group): list(values) for group, values in result.squared_distances.items()},
        "squared_rounding": {str(group): value for group, value in result.squared_rounding.items()},
        "replaced": list(result.replaced),
        "solutions": [solution.to_json() for solution in result.solutions],
        "discarded": {str(tensor): list(squares) for tensor, squares in result.discarded.items()},
        "systems": [record.to_json() for record in result.systems],
    }


def from_marker(data: Mapping[str, Any]) -> WrittenFile:
    """Return a finished file from its marker; one of an earlier version has no systems."""
    return WrittenFile(
        file=data["file"],
        name=data["name"],
        size_bytes=data["size_bytes"],
        sha256=data["sha256"],
        squared_distances={int(group): tuple(values) for group, values in data["squared_distances"].items()},
        squared_rounding={int(group): value for group, value in data["squared_rounding"].items()},
        replaced=tuple(data["replaced"]),
        solutions=tuple(solution_from_json(entry) for entry in data["solutions"]),
        discarded={int(tensor): (cut, whole) for tensor, (cut, whole) in data["discarded"].items()},
        systems=tuple(record_from_json(entry) for entry in data.get("systems", ())),
    )
