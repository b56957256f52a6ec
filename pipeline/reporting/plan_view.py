"""A plan as the document that `geomerge plan --json` prints and the terminal view is made from.

Owns its keys.
"""

from __future__ import annotations

from typing import Any

from pipeline.planning.cost import Cost, Rates
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan
from pipeline.reporting.treatments import solver_facts, treatments


def plan_summary(
    plan: Plan, memory: Memory, cost: Cost, rates: Rates | None, workers: int, seconds: float
) -> dict[str, Any]:
    """Return a plan's facts.

    Args:
        plan: The plan.
        memory: What one worker will hold.
        cost: Projected traffic and time.
        rates: What the time was reckoned with.
        workers: How many workers.
        seconds: How long planning took.
    """
    return {
        "fingerprint": plan.fingerprint,
        "method": plan.settings.method,
        "scope": plan.settings.scope,
        "models": list(plan.model_names()),
        "base_model": plan.inputs[plan.base].name if plan.base is not None else None,
        "tensors": len(plan.tensors),
        "copied_tensors": sum(tensor.group < 0 for tensor in plan.tensors),
        "elements": sum(tensor.elements for tensor in plan.tensors),
        "chunk_elements": plan.chunk_elements,
        "chunks": sum(len(plan.chunks(file)) for file in range(len(plan.files))),
        "groups": [
            {"name": group.name, "elements": group.elements}
            for group in plan.groups
            if group.coefficients is None or not plan.settings.measured
        ],
        "files": [
            {"name": file.name, "tensors": len(file.tensors), "bytes": file.size_bytes, "one_read": file.fused}
            for file in plan.files
        ],
        "bytes_to_read": cost.read_bytes,
        "bytes_to_write": cost.written_bytes,
        "passes": cost.passes,
        "workers": workers,
        "threads_per_worker": memory.threads,
        "memory_per_worker": {"total": memory.total_bytes, "terms": dict(memory.terms)},
        "seconds": {name: round(value, 2) for name, value in cost.seconds.items()},
        "rates": _rates(rates),
        "planning_seconds": round(seconds, 3),
        **({"solver": solver_facts(plan), "treatments": treatments(plan)} if plan.settings.solver else {}),
        "notes": list(plan.notes),
    }


def _rates(rates: Rates | None) -> str:
    if rates is None:
        return "unknown"
    return f"{rates.source}: measure {rates.measure / 1e9:.2f} GB/s, write {rates.write / 1e9:.2f} GB/s of input"
