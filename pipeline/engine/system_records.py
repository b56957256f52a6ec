"""What is kept of a solved system: how it ended, and how much each model's moments weigh in it.

Owns the record and its JSON form, and the refusal of norms that nothing can be divided by. Pure. Legend: N models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CheckpointError, Problem
from pipeline.planning.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemRecord:
    """One tensor's system, or a part of an elementwise one.

    Attributes:
        tensor: Index in the plan.
        traces: N traces of the models' moments, weights included; of K-FAC the products of both traces.
        null_directions: Directions that no moment sees: they keep the start's values. Of K-FAC and other iterated
            systems those along single inputs and outputs.
        iterations: 0 of what was solved directly.
        converged: Whether the tolerance was reached.
        relative_residual: Of an iterated system, the last true one; None of others.
        stopped: Why the iterations ended; "" of what was solved directly.
    """

    tensor: int
    traces: tuple[float, ...]
    null_directions: int
    iterations: int = 0
    converged: bool = True
    relative_residual: float | None = None
    stopped: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "tensor": self.tensor,
            "traces": list(self.traces),
            "null_directions": self.null_directions,
            "iterations": self.iterations,
            "converged": self.converged,
            "relative_residual": self.relative_residual,
            "stopped": self.stopped,
        }


def record_from_json(data: Mapping[str, Any]) -> SystemRecord:
    """Return a record saved by `SystemRecord.to_json`."""
    return SystemRecord(**{**data, "traces": tuple(data["traces"])})


def joined_record(parts: Sequence[SystemRecord]) -> SystemRecord:
    """Return the record of a tensor from those of its parts, at least one: of one part, that part itself."""
    if len(parts) == 1:
        return parts[0]
    return SystemRecord(
        tensor=parts[0].tensor,
        # Exactly rounded, so in any order the same.
        traces=tuple(math.fsum(column) for column in zip(*(part.traces for part in parts), strict=True)),
        null_directions=sum(part.null_directions for part in parts),
    )


def refuse_zero_norms(plan: Plan, norms_N: Sequence[float]) -> None:
    """Raise when diagonals are to be divided by a norm of zero.

    Raises:
        CheckpointError: Names the models.
    """
    problems = [
        Problem(
            what="all of its diagonals are zero, or so small that their squares are, so that they cannot be normalized",
            where=f"model {name}",
            remedy="collect its statistics again, or leave parameters.normalize out",
        )
        for name, norm in zip(plan.model_names(), norms_N, strict=True)
        if norm == 0.0
    ]
    if problems:
        raise CheckpointError(*problems)
