"""How much memory a worker takes: a sum of named terms, and what the rest of the budget buys.

Owns the projection that is checked before work starts and measured in the tests. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.errors import BudgetError, Problem
from pipeline.numerics.kernels import work_bytes
from pipeline.planning.plan import Plan, TensorPlan
from pipeline.planning.traffic import input_bytes
from pipeline.units import format_bytes

# A Python process with torch, pyarrow, numba and Ray that has compiled the loops: 470 to 600 MB measured, rounded up.
RUNTIME_BYTES = 650_000_000
# The plan itself: per tensor and input, with its object's overhead and its second form while it is handed to a worker.
PLAN_BYTES = 1500
# A kept chunk of one input: array, dictionary entry and the allocator's rounding.
KEPT_OVERHEAD_BYTES = 500
# A remote upload holds the part that grows and the one that is sent.
UPLOAD_BYTES = 64_000_000
# One row of statistics as Python and Arrow hold it until its file is measured: overhead beside the numbers themselves.
ROW_OVERHEAD_BYTES = 600
# Copies of one number of a row alive at once: arrays, lists for the table, Arrow's buffers.
ROW_COPIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What one worker may hold.

    Attributes:
        terms: Named parts of the projection, in bytes.
        threads: Chunks that keep the cores busy; one more is read meanwhile.
        window: Chunks in flight. Any of them may be computed at a time, so each counts with its working memory.
        retained_bytes: Room for chunks kept from the measuring read; part of the terms.
    """

    terms: Mapping[str, int]
    threads: int
    window: int
    retained_bytes: int

    @property
    def total_bytes(self) -> int:
        """The projection: the sum of its terms."""
        return sum(self.terms.values())


def slot_bytes(plan: Plan) -> int:
    """Return the bytes of one chunk in flight: every input's range, tied copies, and the merged chunk."""
    length = min(plan.chunk_elements, max((tensor.elements for tensor in plan.tensors), default=1))
    widest = [0] * len(plan.inputs)
    aliased = [0] * len(plan.inputs)
    for tensor in plan.tensors:
        for index, source in enumerate(tensor.sources):
            width = DTYPES[source.dtype].bits // 8
            widest[index] = max(widest[index], width)
            if source.copies:
                aliased[index] = max(aliased[index], width)
    output = max((DTYPES[tensor.dtype].bits // 8 for tensor in plan.tensors), default=0)
    # The kernels also make a copy of each point where they are not of one dtype; 8 bytes an element bounds it.
    copies = plan.settings.cast or plan.settings.non_finite == "base" or any(map(_is_mixed, plan.tensors))
    cast = 8 * len(plan.points) if copies else 0
    return length * (sum(widest) + sum(aliased) + output + cast)


def _is_mixed(tensor: TensorPlan) -> bool:
    """Return whether a tensor's points must be widened to one dtype before the kernels take them."""
    dtypes = {source.dtype for source in tensor.sources}
    return tensor.group >= 0 and (len(dtypes) > 1 or not dtypes <= {"BF16", "F32", "F64"})


def project_memory(plan: Plan, *, budget_bytes: int, threads: int, remote_output: bool = False) -> Memory:
    """Return what a worker will hold at most, using the budget for read-ahead and retention.

    Args:
        plan: The plan.
        remote_output: Whether output files are uploaded in parts.
        budget_bytes: What one worker may take, `--memory`.
        threads: Chunks that a worker may compute at once.

    Raises:
        BudgetError: Not even one chunk in flight fits; names the budget that would.
    """
    slot = slot_bytes(plan)
    work = work_bytes(len(plan.points))
    pairs = len(plan.points) ** 2
    chunks = max((len(plan.chunks(index)) for index in range(len(plan.files))), default=0)
    statistics = chunks * ((pairs + 3 * len(plan.inputs)) * 8 * ROW_COPIES + ROW_OVERHEAD_BYTES)
    fixed = {
        "runtime": RUNTIME_BYTES,
        "plan": PLAN_BYTES * len(plan.tensors) * len(plan.inputs),
        "statistics": statistics,
        **({"upload": UPLOAD_BYTES} if remote_output else {}),
    }
    smallest = sum(fixed.values()) + slot + work
    if smallest > budget_bytes:
        raise BudgetError(
            Problem(
                what=f"a worker needs {format_bytes(smallest)}"
                f" ({_listed({**fixed, 'one chunk in flight': slot, 'work': work})}),"
                f" but may take {format_bytes(budget_bytes)}",
                where=f"{len(plan.inputs)} checkpoints, chunks of {plan.chunk_elements} elements",
                remedy=f"give at least --memory {-(-smallest // 1_000_000)}MB",
            )
        )
    # One chunk is read while the others are computed; more in flight than that only costs memory.
    window = min(threads + 1, (budget_bytes - sum(fixed.values())) // (slot + work))
    threads = max(1, window - 1)
    used = {**fixed, "chunks in flight": window * slot, "work": window * work}
    retained = max(0, budget_bytes - sum(used.values())) if plan.settings.measured else 0
    everything = sum(input_bytes(tensor, tuple(range(len(plan.inputs)))) for tensor in plan.tensors)
    pieces = sum(len(plan.chunks(index)) for index in range(len(plan.files))) * len(plan.inputs)
    retained = min(retained, everything + pieces * KEPT_OVERHEAD_BYTES)
    # Every kept piece costs its bytes and its overhead; the room that is handed out is for the bytes.
    room = retained * everything // max(1, everything + pieces * KEPT_OVERHEAD_BYTES)
    return Memory(terms={**used, "retained": retained}, threads=threads, window=window, retained_bytes=room)


def _listed(terms: Mapping[str, int]) -> str:
    return " + ".join(f"{name} {format_bytes(size)}" for name, size in terms.items())
