"""Which inputs a pass reads of a tensor, and how many bytes that is.

Owns the accounting that memory, cost and progress share. Pure arithmetic on the plan.
"""

from __future__ import annotations

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.planning.plan import Plan, TensorPlan


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


def probed_inputs(plan: Plan) -> tuple[int, ...]:
    """Return the inputs that an iteration over the parameters reads: the base only where it replaces values."""
    return plan.points if plan.settings.non_finite == "base" else plan.models
