"""What a plan will move and how long that takes.

Owns the arithmetic of bytes and seconds; measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan, TensorPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes a second that all workers move together.

    Attributes:
        measure: Input bytes read, checked and reduced.
        write: Input bytes read and combined in the writing pass.
        source: Where the numbers come from: "given" or "measured".
    """

    measure: float
    write: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Projected traffic and time.

    Attributes:
        passes: How often the inputs are read; not whole when part of them is kept in memory.
        seconds: By phase; empty when no rate is known.
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


def input_bytes(tensor: TensorPlan, inputs: tuple[int, ...]) -> int:
    """Return the bytes that reading one tensor from these inputs takes, tied copies left aside."""
    return sum(tensor.elements * DTYPES[tensor.sources[index].dtype].bits // 8 for index in set(inputs))


def alias_bytes(tensor: TensorPlan) -> int:
    """Return the bytes of the tied copies of a tensor, read once to check them."""
    return sum(tensor.elements * DTYPES[s.dtype].bits // 8 * len(s.copies) for s in tensor.sources)


def written_inputs(plan: Plan) -> tuple[int, ...]:
    """Return the inputs that the writing pass combines: the models, and the base unless its coefficient is 0."""
    needs_base = plan.base is not None and (plan.settings.scale != 1.0 or plan.settings.non_finite == "base")
    return plan.points if needs_base else plan.models


def project_cost(plan: Plan, memory: Memory, *, workers: int, rates: Rates | None) -> Cost:
    """Return the projected traffic and, where rates are known, seconds.

    Args:
        plan: The plan.
        memory: What one worker may hold.
        workers: How many there are.
        rates: Bytes a second, or None.
    """
    everywhere = tuple(range(len(plan.inputs)))
    copied = sum(input_bytes(tensor, everywhere) for tensor in plan.tensors if tensor.group < 0)
    merged = [tensor for tensor in plan.tensors if tensor.group >= 0]
    aliases = sum(alias_bytes(tensor) for tensor in plan.tensors)
    second = sum(input_bytes(tensor, written_inputs(plan)) for tensor in merged)
    first = sum(input_bytes(tensor, plan.points) for tensor in merged) if plan.settings.measured else 0
    kept = min(second, memory.retained_bytes * workers) if plan.settings.measured else 0
    measure_bytes = first + aliases + copied if plan.settings.measured else 0
    reread_bytes = second - kept + copied + (0 if plan.settings.measured else aliases)
    total_input = max(1, max(first, second))
    seconds: dict[str, float] = {}
    if rates is not None:
        if plan.settings.measured:
            seconds["measure"] = measure_bytes / rates.measure
        seconds["write"] = second / rates.write
    return Cost(
        measure_bytes=measure_bytes,
        reread_bytes=reread_bytes,
        written_bytes=sum(file.size_bytes for file in plan.files),
        passes=round((first + second - kept) / total_input, 3),
        seconds=seconds,
    )
