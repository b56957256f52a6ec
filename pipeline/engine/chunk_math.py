"""One chunk through the kernels: bytes to points on a device, statistics or merged bytes back.

Owns the translation between the plan's words and the kernels' arrays. Legend: P points, N models, E elements. Points
are of the kernels' device: arrays on the CPU, tensors elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.engine.loaded import Loaded
from pipeline.engine.run_folder import ChunkRow, triangle
from pipeline.engine.solutions import Solution
from pipeline.engine.system_records import SystemRecord
from pipeline.errors import CheckpointError, Problem, VerificationError
from pipeline.numerics.devices import Kernels
from pipeline.numerics.dtypes import config_name
from pipeline.planning.plan import Plan
from pipeline.planning.traffic import dense_inputs, probed_points, written_points

if TYPE_CHECKING:
    from pipeline.numerics.low_rank.factors import LowRank
    from pipeline.numerics.metric import Metric

# By input index, the updates of one tensor.
Updates = Mapping[int, "LowRank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedChunk:
    """A merged chunk's bytes and what is added up over chunks.

    Attributes:
        sums: P squared distances from the points, the squared rounding, and how many values of each of the P points
            were replaced by the base's; entries of points that the writing pass does not read are 0. Empty for a copy.
        discarded: Of stored factors, the squared norm that truncation cut off, and the whole.
        record: Of a system that was solved here, or of a part of one.
    """

    data: memoryview
    sums: tuple[float, ...]
    discarded: tuple[float, float] | None = None
    record: SystemRecord | None = None


def measure_chunk(
    plan: Plan,
    loaded: Loaded,
    updates: Updates,
    checksums: tuple[int, ...],
    kernels: Kernels,
    metric: Metric | None = None,
) -> tuple[ChunkRow, dict[int, int]]:
    """Return a chunk's statistics and, by input index, how many values are not finite.

    Where the recipe says `non_finite: base` they are replaced and not counted, except in the base itself.

    Args:
        plan: The plan.
        loaded: The chunk.
        updates: Of its tensor.
        checksums: Kept with the statistics.
        kernels: Of the device.
        metric: The chunk's; None for Euclidean distances.
    """
    chunk = loaded.chunk
    count = len(plan.points)
    if plan.tensors[chunk.tensor].group < 0:
        return chunk_row(plan, chunk.tensor, chunk.start, np.zeros((count, count)), np.zeros(count), checksums), {}
    points, _ = chunk_points(plan, loaded, plan.points, updates, kernels)
    seen, unchanged_P = (points, None) if metric is None else _images(points, metric)
    result = kernels.pairwise_distances(seen)
    bad: dict[int, int] = {}
    if not np.isfinite(result.distances_PP).all():
        bad = _not_finite_inputs(plan, loaded, plan.points, points, kernels)
        if not bad:
            remedy = "leave out the model that has values above 1e150"
            if metric is not None:
                remedy += ", or scale the metric down: its own size has no meaning"
            raise _overflow(plan, loaded, "a distance overflows float64", remedy)
    if unchanged_P is None:
        unchanged_P = result.unchanged_P
    row = chunk_row(plan, chunk.tensor, chunk.start, result.distances_PP, unchanged_P, checksums)
    return row, bad


def chunk_checksums(plan: Plan, loaded: Loaded | None, factor_sums: Mapping[int, int]) -> tuple[int, ...]:
    """Return one hash an input: of its bytes of a chunk, of its factors, or of both together; 0 where it has neither.

    Args:
        plan: The plan.
        loaded: The chunk; None where the factors tell everything.
        factor_sums: Hashes of the factors by input.
    """
    whole = {} if loaded is None else {index: loaded.checksum(index) for index in loaded.raw}
    return tuple(whole.get(index, 0) ^ factor_sums.get(index, 0) for index in range(len(plan.inputs)))


def chunk_row(
    plan: Plan,
    tensor: int,
    start: int,
    distances_PP: np.ndarray,
    unchanged_P: np.ndarray,
    checksums: tuple[int, ...],
) -> ChunkRow:
    """Return what is kept of a chunk."""
    return ChunkRow(
        tensor=tensor,
        start=start,
        distances=triangle(distances_PP),
        unchanged=unchanged_P,
        checksums=np.array(checksums, dtype=np.int64),
    )


def probe_chunk(
    plan: Plan,
    loaded: Loaded,
    updates: Updates,
    coefficients_QN: np.ndarray,
    kernels: Kernels,
    metric: Metric | None = None,
) -> np.ndarray:
    """Return Q·N squared distances and Q·Q products of one chunk, in one row."""
    points, _ = chunk_points(plan, loaded, probed_points(plan), updates, kernels)
    if metric is not None:
        points, _ = _images(points, metric)
    result = kernels.probe(points[len(points) - len(plan.models) :], coefficients_QN)
    return np.concatenate([result.squared_distances_QP.ravel(), result.products_QQ.ravel()])


def write_chunk(
    plan: Plan,
    loaded: Loaded,
    updates: Updates,
    solution: Solution | None,
    kernels: Kernels,
    metric: Metric | None = None,
) -> MergedChunk:
    """Return a merged chunk; one without a solution is copied from the donor.

    In a metric the sums are too; a chunk that takes part in no distance adds nothing to them.

    Raises:
        VerificationError: A merged value overflows the output dtype.
        CheckpointError: A model is not finite and nothing measured it before.
    """
    tensor = plan.tensors[loaded.chunk.tensor]
    if solution is None:
        # The buffer goes back to the pool with the lease, so the copy is needed.
        donor = plan.dense_input(loaded.chunk.tensor, plan.donor)
        return MergedChunk(data=loaded.raw[donor].copy().data, sums=())
    written = written_points(plan)
    skipped = len(plan.points) - len(written)
    if tensor.unchanged:
        points, replaced = chunk_points(plan, loaded, written[:1], updates, kernels)
        result = kernels.combine(points, [float(np.sum(solution.factors))], tensor.dtype)
        squared, replaced = result.squared_distances_P.tolist() * len(written), replaced * len(written)
    else:
        points, replaced = chunk_points(plan, loaded, written, updates, kernels)
        result = kernels.combine(points, solution.factors[skipped:], tensor.dtype)
        squared = result.squared_distances_P.tolist()
    squared_rounding = result.squared_rounding
    refuse_non_finite(plan, loaded, squared_rounding, points, kernels)
    if not plan.is_weighed(loaded.chunk.tensor):
        squared, squared_rounding = [0.0] * len(written), 0.0
    elif metric is not None:
        from pipeline.numerics.metric import written_distances

        squared_P, squared_rounding = written_distances(result.values_E, points, solution.factors[skipped:], metric)
        squared = squared_P.tolist()
    padding = (0.0,) * skipped
    sums = (*padding, *squared, squared_rounding, *padding, *replaced)
    return MergedChunk(data=kernels.stored(result.values_E), sums=sums)


def _images(points: Sequence[Any], metric: Metric) -> tuple[list[Any], np.ndarray]:
    """Return points in the metric, and counts of elements equal to the first's; torch is imported here."""
    from pipeline.numerics.metric import images

    return images(points, metric)


def refuse_non_finite(
    plan: Plan, loaded: Loaded, squared_rounding: float, points: Sequence[Any], kernels: Kernels
) -> None:
    """Raise when a merged chunk is not finite.

    Args:
        plan: The plan.
        loaded: The chunk.
        squared_rounding: Of the merged values; not finite where one of them is not.
        points: What was combined: the written points, or what all of them have in common.
        kernels: Of their device.
    """
    if np.isfinite(squared_rounding):
        return
    inputs = written_points(plan)
    if len(points) < len(inputs):
        inputs = dense_inputs(plan, loaded.chunk.tensor, inputs)
    if bad := _not_finite_inputs(plan, loaded, inputs, points, kernels):
        raise _not_finite(plan, loaded, bad)
    what = f"a merged value overflows {config_name(plan.tensors[loaded.chunk.tensor].dtype)}"
    raise _overflow(plan, loaded, what, "choose a wider out_dtype, or a smaller scale")


def _not_finite_inputs(
    plan: Plan, loaded: Loaded, indices: Sequence[int], points: Sequence[Any], kernels: Kernels
) -> dict[int, int]:
    """Return, by the input that is to blame, how many values of a chunk are not finite.

    A point of an adapter is not finite because of what it stands on, or because the sum with its update overflows.
    """
    bad = {}
    for index, number in zip(indices, kernels.non_finite_counts(points), strict=True):
        held = plan.dense_input(loaded.chunk.tensor, index)
        if number and held != index:
            whole = kernels.non_finite_counts([dense_values(plan, loaded, held, kernels)])[0]
            index, number = (held, whole) if whole else (index, number)
        if number:
            bad[index] = number
    return bad


def dense_values(plan: Plan, loaded: Loaded, index: int, kernels: Kernels) -> Any:
    """Return what one input holds of a chunk, on the kernels' device, cast as the recipe says."""
    source = plan.tensors[loaded.chunk.tensor].sources[index]
    if source is None:
        raise ValueError(f"input {index} does not hold the tensor")
    values_E = kernels.values(loaded.raw[index], source.dtype)
    return kernels.cast(values_E, plan.settings.cast) if plan.settings.cast else values_E


def chunk_points(
    plan: Plan, loaded: Loaded, indices: tuple[int, ...], updates: Updates, kernels: Kernels
) -> tuple[list[Any], list[float]]:
    """Return the values of a chunk by point, and how many of each were not finite and are the base's instead.

    A point of an adapter is the exact sum of the values it stands on and its update, in float64.
    """
    chunk = loaded.chunk
    columns = plan.tensors[chunk.tensor].columns
    dense = {
        held: dense_values(plan, loaded, held, kernels)
        for held in dict.fromkeys(plan.dense_input(chunk.tensor, index) for index in indices)
    }
    by_input = {}
    for index in dict.fromkeys(indices):
        values_E = dense[plan.dense_input(chunk.tensor, index)]
        if index in updates:
            rows = slice(chunk.start // columns, chunk.stop // columns)
            values_E = kernels.updated(values_E, updates[index], rows)
        by_input[index] = values_E
    replaced = dict.fromkeys(by_input, 0.0)
    if plan.settings.non_finite == "base" and plan.base in by_input:
        base_E = by_input[plan.base]
        for index, values_E in by_input.items():
            repaired_E = values_E if index == plan.base else kernels.replace_non_finite(values_E, base_E)
            if repaired_E is not values_E:
                replaced[index] = float(kernels.non_finite_counts([values_E])[0])
                by_input[index] = repaired_E
    return [by_input[index] for index in indices], [replaced[index] for index in indices]


def as_cast(plan: Plan) -> str:
    """Return a clause that names the recipe's `dtype`: a cast can overflow where the file holds finite values."""
    return f" in {config_name(plan.settings.cast)}, the recipe's dtype" if plan.settings.cast else ""


def non_finite_remedy(plan: Plan, index: int) -> str:
    """Return what helps against values of one input that are not finite."""
    if index == plan.base and index not in plan.models:
        return "repair the base model, or take another"
    if index not in plan.points:
        return "repair it, or leave out the adapters that stand on it"
    if plan.base is None:
        return "leave the model out"
    return "leave the model out, or set pipeline: {non_finite: base} to take the base's values there"


def _overflow(plan: Plan, loaded: Loaded, what: str, remedy: str) -> VerificationError:
    tensor = plan.tensors[loaded.chunk.tensor]
    return VerificationError(
        Problem(
            what=what,
            where=f"tensor {tensor.name}, elements {loaded.chunk.start} to {loaded.chunk.stop}",
            remedy=remedy,
        )
    )


def _not_finite(plan: Plan, loaded: Loaded, counts: dict[int, int]) -> CheckpointError:
    """Return the error for values that are not finite, met in the only read of a method that measures nothing."""
    tensor = plan.tensors[loaded.chunk.tensor]
    chunk = loaded.chunk
    return CheckpointError(
        *(
            Problem(
                what=f"{count} of the values {chunk.start} to {chunk.stop} are NaN or infinite{as_cast(plan)}",
                where=f"model {plan.inputs[index].name}, tensor {tensor.name}",
                remedy=non_finite_remedy(plan, index),
            )
            for index, count in counts.items()
            if count
        )
    )


def non_finite_error(plan: Plan, bad: Mapping[tuple[int, int], int]) -> CheckpointError:
    """Return the error that lists every model and tensor with values that are not finite.

    Args:
        plan: The plan.
        bad: Counts by (tensor index, input index).
    """
    return CheckpointError(
        *(
            Problem(
                what=f"{count} of {plan.tensors[tensor].elements} values are NaN or infinite{as_cast(plan)}",
                where=f"model {plan.inputs[index].name}, tensor {plan.tensors[tensor].name}",
                remedy=non_finite_remedy(plan, index),
            )
            for (tensor, index), count in sorted(bad.items())
        )
    )
