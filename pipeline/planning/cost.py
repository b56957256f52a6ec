"""What a plan will move and how long that takes.

Owns the arithmetic of bytes and seconds; measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan
from pipeline.planning.system_work import matrix_operations, streamed_bytes
from pipeline.planning.traffic import (
    alias_bytes,
    kept_bytes,
    measured_bytes,
    merged_bytes,
    one_read_bytes,
    statistics_bytes,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes a second that all workers move together.

    Attributes:
        measure: Input bytes read, checked and reduced.
        write: Input bytes read again and combined in the writing pass, its output written.
        source: Where the numbers come from: "given" or "measured".
        start_s: Seconds that go by before the first chunk, whatever the size; 0 when they are not known.
        operations: Floating-point operations of matrix products a second; 0 when they are not known.
    """

    measure: float
    write: float
    source: str
    start_s: float = 0.0
    operations: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Projected traffic and time.

    Attributes:
        passes: How often the inputs are read; not whole when part of them is kept in memory.
        seconds: By phase, "start" and "solve" only where they are known; empty when no rate is known. To solve takes
            that long if all iterations are made.
    """

    measure_bytes: int
    reread_bytes: int
    written_bytes: int
    passes: float
    seconds: Mapping[str, float]

    @property
    def read_bytes(self) -> int:
        """All bytes read."""
        return self.measure_bytes + self.reread_bytes


def project_cost(plan: Plan, memory: Memory, *, workers: int, rates: Rates | None) -> Cost:
    """Return the projected traffic and, where rates are known, seconds.

    Args:
        plan: The plan.
        memory: What one worker may hold.
        workers: How many there are.
        rates: Bytes a second, or None.
    """
    tensors = range(len(plan.tensors))
    copied = sum(merged_bytes(plan, index) for index in tensors if plan.tensors[index].group < 0)
    merged = [index for index in tensors if plan.tensors[index].group >= 0]
    aliases = sum(alias_bytes(tensor) for tensor in plan.tensors)
    second = sum(merged_bytes(plan, index) for index in merged)
    first = sum(measured_bytes(plan, index) for index in merged) if plan.settings.measured else 0
    kept = _kept_bytes(plan, memory, workers) if plan.settings.measured else 0
    measure_bytes = first + aliases + copied if plan.settings.measured else 0
    reread_bytes = second + copied - kept + (0 if plan.settings.measured else aliases)
    # Of moments that every iteration reads anew, all but the first reading.
    again = sum(streamed_bytes(plan, index, memory.systems_bytes) for index in tensors)
    solver = plan.settings.solver
    weighed = sum(map(statistics_bytes, plan.tensors)) if solver is not None and solver.normalize else 0
    reread_bytes += again + weighed
    seconds: dict[str, float] = {}
    if rates is not None:
        if rates.start_s:
            seconds["start"] = rates.start_s
        if plan.settings.measured:
            seconds["measure"] = measure_bytes / rates.measure
        if weighed:
            seconds["weigh"] = weighed / rates.write
        seconds["write"] = (second + again) / rates.write
        operations = sum(matrix_operations(plan, index) for index in tensors)
        if rates.operations and operations:
            seconds["solve"] = operations / rates.operations
    return Cost(
        measure_bytes=measure_bytes,
        reread_bytes=reread_bytes,
        written_bytes=sum(file.size_bytes for file in plan.files),
        passes=round((measure_bytes + reread_bytes) / max(1, one_read_bytes(plan)), 3),
        seconds=seconds,
    )


def _kept_bytes(plan: Plan, memory: Memory, workers: int) -> int:
    """Return how much of the second read is served from memory.

    Of a fused file each group has a worker's room to itself, and one of a single chunk needs none; all other files of a
    worker share it.
    """
    fused: dict[int, int] = {}
    shared = alone = 0
    for file in plan.files:
        for index in file.tensors:
            tensor = plan.tensors[index]
            size = kept_bytes(plan, index)
            if file.fused and plan.is_one_chunk(index):
                alone += size
            elif file.fused:
                fused[tensor.group] = fused.get(tensor.group, 0) + size
            else:
                shared += size
    alone += sum(min(size, memory.retained_bytes) for size in fused.values())
    # A worker without a file keeps nothing.
    return alone + min(shared, memory.retained_bytes * min(workers, len(plan.files)))
