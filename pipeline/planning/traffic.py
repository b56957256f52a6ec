"""Which inputs a pass reads of a tensor, and how many bytes that is.

Owns the accounting that memory, cost and progress share. Pure arithmetic on the plan.
"""

from __future__ import annotations

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.planning.plan import Plan, TensorPlan


def dense_inputs(plan: Plan, tensor: int, points: tuple[int, ...]) -> tuple[int, ...]:
    """Return the distinct inputs that hold the values of these points before their updates, in the points' order."""
    shared = plan.tensors[tensor].shared
    if shared is not None:
        return (shared,) if points else ()
    return tuple(dict.fromkeys(plan.dense_input(tensor, index) for index in points))


def measured_inputs(plan: Plan, tensor: int) -> tuple[int, ...]:
    """Return the inputs that the measuring pass reads whole: none where nothing, or the factors, tell the distances."""
    if plan.tensors[tensor].group < 0:
        return plan.tensors[tensor].holders
    unread = plan.tensors[tensor].shared is not None or not plan.is_weighed(tensor)
    return () if unread else dense_inputs(plan, tensor, plan.points)


def merged_inputs(plan: Plan, tensor: int) -> tuple[int, ...]:
    """Return the inputs that the writing pass reads whole: none where factors are written."""
    if plan.tensors[tensor].group < 0:
        return plan.tensors[tensor].holders
    if plan.tensors[tensor].system is not None:
        return system_inputs(plan, tensor)
    return () if plan.tensors[tensor].merged_rank is not None else dense_inputs(plan, tensor, written_points(plan))


def system_points(plan: Plan) -> tuple[int, ...]:
    """Return the inputs that a system is written in: first the one that task vectors start from, then the models."""
    solver = plan.settings.solver
    quotient = solver is not None and solver.rule == "quotient" and solver.start == "average"
    # A quotient is the same from wherever its differences are taken; reading the base for it would be in vain.
    idle = quotient and plan.settings.non_finite != "base"
    first = plan.models[0] if plan.base is None or idle else plan.base
    start = () if solver is None or solver.start_input is None else (solver.start_input,)
    return tuple(dict.fromkeys((first, *plan.models, *start)))


def system_inputs(plan: Plan, tensor: int) -> tuple[int, ...]:
    """Return the distinct inputs that hold the values of a system's points before their updates."""
    return tuple(dict.fromkeys(plan.dense_input(tensor, index) for index in system_points(plan)))


def statistics_bytes(tensor: TensorPlan) -> int:
    """Return the bytes of one read of the second moments of a tensor's system."""
    return 0 if tensor.system is None else sum(statistic.size_bytes for statistic in tensor.system.statistics)


def metric_bytes(tensor: TensorPlan) -> int:
    """Return the bytes of one read of what a tensor's distances are measured in: each pass needs it."""
    return 0 if tensor.metric is None else tensor.metric.size_bytes


def input_bytes(tensor: TensorPlan, inputs: tuple[int, ...]) -> int:
    """Return the bytes that reading one tensor whole from these inputs takes, tied copies left aside."""
    sources = [tensor.sources[index] for index in set(inputs)]
    return sum(tensor.elements * DTYPES[source.dtype].bits // 8 for source in sources if source is not None)


def factor_bytes(tensor: TensorPlan) -> int:
    """Return the bytes of all factors of a tensor's updates."""
    return sum(
        tensor.rows * update.rank * DTYPES[update.left.dtype].bits // 8
        + (tensor.columns * update.rank * DTYPES[update.right.dtype].bits // 8 if update.right is not None else 0)
        for update in tensor.updates
    )


def measured_bytes(plan: Plan, tensor: int) -> int:
    """Return the bytes that the measuring pass reads of a tensor, tied copies left aside."""
    planned = plan.tensors[tensor]
    return input_bytes(planned, measured_inputs(plan, tensor)) + factor_bytes(planned) + metric_bytes(planned)


def merged_bytes(plan: Plan, tensor: int) -> int:
    """Return the bytes that the writing pass reads of a tensor, tied copies left aside."""
    planned = plan.tensors[tensor]
    read = input_bytes(planned, merged_inputs(plan, tensor)) + factor_bytes(planned)
    return read + statistics_bytes(planned) + metric_bytes(planned)


def one_read_bytes(plan: Plan) -> int:
    """Return the bytes of one full read of everything that a merge needs of its inputs: the unit of passes."""
    return sum(
        input_bytes(tensor, (*measured_inputs(plan, index), *merged_inputs(plan, index)))
        + factor_bytes(tensor)
        + metric_bytes(tensor)
        + alias_bytes(tensor)
        if plan.settings.measured
        else merged_bytes(plan, index) + alias_bytes(tensor)
        for index, tensor in enumerate(plan.tensors)
    )


def kept_inputs(plan: Plan, tensor: int) -> tuple[int, ...]:
    """Return the inputs that both passes read whole."""
    again = merged_inputs(plan, tensor)
    return tuple(index for index in measured_inputs(plan, tensor) if index in again)


def kept_bytes(plan: Plan, tensor: int) -> int:
    """Return the bytes of the measuring read that the writing pass needs again: what is worth keeping in memory."""
    return input_bytes(plan.tensors[tensor], kept_inputs(plan, tensor)) + factor_bytes(plan.tensors[tensor])


def alias_bytes(tensor: TensorPlan) -> int:
    """Return the bytes of the tied copies of a tensor, read once to check them."""
    return sum(
        tensor.elements * DTYPES[source.dtype].bits // 8 * len(source.copies)
        for source in tensor.sources
        if source is not None
    )


def written_points(plan: Plan) -> tuple[int, ...]:
    """Return the points that the writing pass combines: the models, and the base unless its coefficient is 0."""
    needs_base = plan.base is not None and (plan.settings.scale != 1.0 or plan.settings.non_finite == "base")
    return plan.points if needs_base else plan.models


def probed_points(plan: Plan) -> tuple[int, ...]:
    """Return the points that an iteration over the parameters reads: the base only where it replaces values."""
    return plan.points if plan.settings.non_finite == "base" else plan.models
