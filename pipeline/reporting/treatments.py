"""What became of every parameter under a method that solves systems, as documents.

Owns the keys about treatments and systems in plan and report. Legend: N models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.engine.system_records import SystemRecord
from pipeline.planning.plan import Plan

# Names in one sentence before the rest is counted.
_SHOWN = 4
# Ratio of the models' traces from which on one of them hardly has a say.
_LOPSIDED = 1e3


def treatments(plan: Plan) -> dict[str, Any] | None:
    """Return how many tensors are solved, averaged and copied, and the names of the latter two; None elsewhere."""
    if plan.settings.solver is None:
        return None
    names: dict[str, list[str]] = {"solved": [], "averaged": [], "copied": []}
    elements = dict.fromkeys(names, 0)
    for tensor in plan.tensors:
        names[tensor.treatment].append(tensor.name)
        elements[tensor.treatment] += tensor.elements
    return {kind: {"tensors": len(names[kind]), "elements": elements[kind], "names": names[kind]} for kind in names}


def solver_facts(plan: Plan) -> dict[str, Any] | None:
    """Return how the systems of a plan are solved; None under a method without any."""
    solver = plan.settings.solver
    if solver is None:
        return None
    objectives = {tensor.system.objective for tensor in plan.tensors if tensor.system is not None}
    iterative = solver.rule == "iterative"
    facts = {
        "objective": min(objectives) if objectives else None,
        "rule": solver.rule,
        "start": solver.start if solver.start_input is None else plan.inputs[solver.start_input].name,
        "start_scale": solver.start_scale if solver.start == "task_arithmetic" else None,
        "iterations": solver.iterations if iterative else None,
        "tolerance": solver.tolerance if iterative else None,
        "off_diagonal": solver.off_diagonal,
        "normalize": solver.normalize,
        "prior": solver.prior if solver.rule == "gradient_matching" else None,
    }
    return {**facts, "statistics": [item.name for item in plan.statistics]}


def system_entries(plan: Plan, records: Iterable[SystemRecord]) -> list[dict[str, Any]]:
    """Return an entry for every solved tensor, in the order of the plan.

    `traces` has each model's, weights included: how much its moments weigh, which is a hidden weight of the model.
    """
    return [
        {
            "tensor": plan.tensors[record.tensor].name,
            "shape": list(plan.tensors[record.tensor].shape),
            "iterations": record.iterations,
            "converged": record.converged,
            "relative_residual": record.relative_residual,
            "stopped": record.stopped or "solved",
            "null_directions": record.null_directions,
            "traces": list(record.traces),
        }
        for record in sorted(records, key=lambda record: record.tensor)
    ]


def system_notes(plan: Plan, records: Sequence[SystemRecord]) -> list[str]:
    """Return what a user should know of the solved systems: null directions, and what did not converge."""
    notes = []
    null = [record for record in records if record.null_directions]
    solver = plan.settings.solver
    if solver is not None and null:
        kept = "are averaged" if solver.rule == "quotient" and solver.start == "average" else "keep the start's values"
        if solver.rule == "gradient_matching":
            kept = "are task arithmetic's"
        total = sum(record.null_directions for record in null)
        notes.append(f"{total} directions that no model's statistics see {kept}, in {_listed(plan, null)}")
    open_ends = [record for record in records if not record.converged]
    if open_ends:
        worst = max((record.relative_residual or 0.0 for record in open_ends), default=0.0)
        notes.append(
            f"{len(open_ends)} of {len(records)} systems ended before the tolerance was reached, with relative"
            f" residuals of up to {worst:.1e}: start and iterations are part of the result ({_listed(plan, open_ends)})"
        )
    silent = [record for record in records if max(record.traces) > 0.0 == min(record.traces)]
    if silent:
        rows = {row for record in silent for row, trace in enumerate(record.traces) if trace == 0.0}
        names = ", ".join(plan.inputs[plan.models[row]].name for row in sorted(rows))
        notes.append(f"the statistics of {names} are zero everywhere, and so is their say, in {_listed(plan, silent)}")
    lopsided = [record for record in records if _spread(record.traces) > _LOPSIDED]
    if lopsided:
        notes.append(
            f"the models' moments weigh more than {_LOPSIDED:g} times differently in {_listed(plan, lopsided)}: the"
            " largest decide nearly alone; `traces` in the report has them, and `weight` evens them out"
        )
    return notes


def _spread(traces: Sequence[float]) -> float:
    """Return the ratio of the largest trace to the smallest that is not zero."""
    some = [trace for trace in traces if trace > 0.0]
    return max(some) / min(some) if some else 1.0


def _listed(plan: Plan, records: Sequence[SystemRecord]) -> str:
    names = [plan.tensors[record.tensor].name for record in records]
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
