"""`geomerge_report.json`: what went in, what was found, what came out, in one document.

Owns the report's schema. Keys are only ever added within one schema number. Legend: N models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline import __version__
from pipeline.engine.driver import Outcome, written_distances
from pipeline.engine.solutions import Solution, geometry
from pipeline.planning.plan import Plan
from pipeline.planning.solving import AVERAGED
from pipeline.reporting.observations import discarded_share, observations
from pipeline.reporting.treatments import solver_facts, system_entries, treatments

# Raised when a key changes its meaning or goes away.
REPORT_SCHEMA = 1


def build_report(
    plan: Plan, outcome: Outcome, *, input_bytes: int, unchanged_shares: Sequence[float] | None
) -> dict[str, Any]:
    """Return the report of a finished merge.

    Args:
        plan: What was planned.
        outcome: What was done.
        input_bytes: Bytes of one full read of all inputs, the unit of `passes`.
        unchanged_shares: By model, the share of elements that equal the base's, where that was measured.
    """
    discarded = {tensor: squares for record in outcome.written for tensor, squares in record.discarded.items()}
    whole = [math.fsum(column) for column in zip(*discarded.values(), strict=True)] if discarded else [0.0, 0.0]
    return {
        "schema": REPORT_SCHEMA,
        "version": __version__,
        "fingerprint": plan.fingerprint,
        "method": plan.settings.method,
        "scope": plan.settings.scope,
        "distances": plan.settings.distances,
        "output": plan.settings.output,
        "base_model": plan.inputs[plan.base].name if plan.base is not None else None,
        "models": [
            {
                "model": plan.inputs[index].name,
                "url": plan.inputs[index].url,
                "bytes": sum(file.size_bytes for file in plan.inputs[index].files),
                "unchanged_share": unchanged_shares[row] if unchanged_shares else None,
            }
            for row, index in enumerate(plan.models)
        ],
        "weights": list(plan.weights),
        "groups": [_group(plan, outcome, solution) for solution in outcome.solutions if _has_say(plan, solution)],
        "rank": plan.settings.rank,
        # Of the squared norm of the merged update; 0 unless the recipe truncates.
        "discarded_energy": discarded_share(whole),
        "modules": [
            {
                "tensor": tensor.name,
                "rank": tensor.merged_rank,
                "discarded_energy": discarded_share(discarded[index]),
            }
            for index, tensor in enumerate(plan.tensors)
            if tensor.merged_rank
        ],
        **(_systems(plan, outcome) if plan.settings.solver is not None else {}),
        "notes": [*plan.notes, *observations(plan, outcome)],
        "recipe": plan.recipe,
        "bytes_read": outcome.usage.read_bytes,
        "bytes_reused_from_memory": outcome.usage.reused_bytes,
        "bytes_written": sum(record.size_bytes for record in outcome.written),
        "passes": round(outcome.usage.read_bytes / max(1, input_bytes), 3),
        "iterations_over_parameters": outcome.stream_passes,
        "resumed_files": outcome.resumed,
        "executor": outcome.executor,
        "workers": outcome.workers,
        "seconds": {name: round(seconds, 3) for name, seconds in outcome.seconds.items()},
        "peak_memory_bytes": outcome.usage.peak_memory_bytes,
        "files": [
            {"name": record.name, "bytes": record.size_bytes, "sha256": record.sha256} for record in outcome.written
        ],
    }


def _systems(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """Return what a method that solves systems adds: how, for which tensors, and how each of them ended."""
    records = [record for written in outcome.written for record in written.systems]
    return {
        "solver": solver_facts(plan),
        "treatments": treatments(plan),
        "systems": system_entries(plan, records),
    }


def _has_say(plan: Plan, solution: Solution) -> bool:
    """Return whether a group depends on the method: what no adapter touches is the base's under any."""
    if plan.settings.solver is not None:
        # Solved tensors have no coefficients of models.
        return plan.groups[solution.group].name == AVERAGED
    return solution.median is not None or not plan.settings.measured


def _group(plan: Plan, outcome: Outcome, solution: Solution) -> dict[str, Any]:
    """Return one group's entry; what was not measured is null."""
    group, median = plan.groups[solution.group], solution.median
    norms, cosines = geometry(plan, solution)
    measured_P, rounding = written_distances(outcome.written, solution.group, len(plan.points))
    written = measured_P[plan.offset :].tolist()
    objective = sum(weight * distance for weight, distance in zip(plan.weights, written, strict=True))
    return {
        "name": group.name,
        "elements": group.elements,
        "coefficients": list(solution.coefficients),
        "scale": solution.scale,
        "objective": median.objective if median else None,
        "lower_bound": median.lower_bound if median else None,
        "relative_gap": median.relative_gap if median else None,
        "iterations": median.iterations if median else None,
        "optimum": median.optimum if median else None,
        "unique": median.unique if median else None,
        "distances": list(median.distances) if median else None,
        "norms": norms,
        "cosines": cosines,
        # Taken from the values that were written, after their rounding to the output dtype.
        "written": {"distances": written, "objective": objective, "rounding": rounding},
    }
