"""What is known of a finished output file, and its marker in the run folder.

Owns the record and its JSON form. Pure. Legend: P points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.engine.solutions import Solution, solution_from_json
from pipeline.engine.system_records import SystemRecord, record_from_json


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
