"""One chunk through the kernels: bytes to points on a device, statistics or merged bytes back.

Owns the translation between the plan's words and the kernels' arrays. Legend: P points, N models, E elements.
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.engine.run_folder import ChunkRow, triangle
from pipeline.engine.solutions import Solution
from pipeline.engine.source import Loaded
from pipeline.errors import CheckpointError, Problem, VerificationError
from pipeline.numerics.dtypes import config_name, torch_dtype
from pipeline.numerics.kernels import combine, non_finite_counts, pairwise_distances, probe, replace_non_finite
from pipeline.planning.plan import Plan
from pipeline.planning.traffic import probed_inputs, written_inputs


def measure_chunk(plan: Plan, loaded: Loaded, device: torch.device) -> tuple[ChunkRow, dict[int, int]]:
    """Return a chunk's statistics and, by input index, how many values are not finite.

    Where the recipe says `non_finite: base` they are replaced and not counted, except in the base itself.
    """
    chunk = loaded.chunk
    checksums = tuple(loaded.checksum(index) if index in loaded.raw else 0 for index in range(len(plan.inputs)))
    count = len(plan.points)
    if plan.tensors[chunk.tensor].group < 0:
        zeros = (0.0,) * (count * (count - 1) // 2)
        return ChunkRow(
            tensor=chunk.tensor, start=chunk.start, distances=zeros, unchanged=(0,) * count, checksums=checksums
        ), {}
    points = _points(plan, loaded, plan.points, device)
    result = pairwise_distances(points)
    bad: dict[int, int] = {}
    if not np.isfinite(result.distances_PP).all():
        counts = non_finite_counts(points)
        bad = {index: number for index, number in zip(plan.points, counts, strict=True) if number}
        if not bad:
            remedy = "leave out the model that has values above 1e150"
            raise _overflow(plan, loaded, "a distance overflows float64", remedy)
    row = ChunkRow(
        tensor=chunk.tensor,
        start=chunk.start,
        distances=triangle(result.distances_PP),
        unchanged=tuple(result.unchanged_P.tolist()),
        checksums=checksums,
    )
    return row, bad


def probe_chunk(plan: Plan, loaded: Loaded, coefficients_QN: np.ndarray, device: torch.device) -> np.ndarray:
    """Return Q·N squared distances and Q·Q products of one chunk, in one row."""
    points = _points(plan, loaded, probed_inputs(plan), device)
    result = probe(points[len(points) - len(plan.models) :], coefficients_QN)
    return np.concatenate([result.squared_distances_QP.ravel(), result.products_QQ.ravel()])


def write_chunk(
    plan: Plan, loaded: Loaded, solution: Solution | None, device: torch.device
) -> tuple[memoryview, tuple[float, ...]]:
    """Return a merged chunk's bytes and a row of sums over it.

    The row holds P squared distances from the points, the squared rounding, and how many values of each of the P points
    were replaced by the base's; entries of points that the writing pass does not read are 0. A chunk without a solution
    is copied from the donor and has no row.

    Raises:
        VerificationError: A merged value overflows the output dtype.
        CheckpointError: A model is not finite and nothing measured it before.
    """
    tensor = plan.tensors[loaded.chunk.tensor]
    if solution is None:
        # The buffer goes back to the pool with the lease, so the copy is needed.
        return loaded.raw[plan.donor].copy().data, ()
    inputs = written_inputs(plan)
    skipped = len(plan.points) - len(inputs)
    points = _points(plan, loaded, inputs, device)
    result = combine(points, solution.factors[skipped:], torch_dtype(tensor.dtype))
    padding = (0.0,) * skipped
    replaced = _replaced(plan, loaded, inputs, points) if plan.settings.non_finite == "base" else (0.0,) * len(inputs)
    sums = (*padding, *result.squared_distances_P.tolist(), result.squared_rounding, *padding, *replaced)
    if not np.isfinite(result.squared_rounding):
        counts = non_finite_counts(points)
        if any(counts):
            raise _not_finite(plan, loaded, dict(zip(inputs, counts, strict=True)))
        what = f"a merged value overflows {config_name(tensor.dtype)}"
        raise _overflow(plan, loaded, what, "choose a wider out_dtype, or a smaller scale")
    return result.values_E.cpu().view(torch.uint8).numpy().data, sums


def _points(plan: Plan, loaded: Loaded, indices: tuple[int, ...], device: torch.device) -> list[torch.Tensor]:
    """Return the tensors of a chunk by point, on the device, cast as the recipe says."""
    sources = plan.tensors[loaded.chunk.tensor].sources
    cast = torch_dtype(plan.settings.cast) if plan.settings.cast else None
    by_input = {}
    for index in dict.fromkeys(indices):
        values_E = torch.from_numpy(loaded.raw[index]).view(torch_dtype(sources[index].dtype)).to(device)
        by_input[index] = values_E.to(cast) if cast is not None else values_E
    if plan.settings.non_finite == "base" and plan.base in by_input:
        base_E = by_input[plan.base]
        by_input = {i: v if i == plan.base else replace_non_finite(v, base_E) for i, v in by_input.items()}
    return [by_input[index] for index in indices]


def _replaced(plan: Plan, loaded: Loaded, indices: tuple[int, ...], points: list[torch.Tensor]) -> tuple[float, ...]:
    """Return, by point, how many of its values were replaced; only a point that was touched is counted again."""
    sources = plan.tensors[loaded.chunk.tensor].sources
    counts = []
    for index, point in zip(indices, points, strict=True):
        dtype = torch_dtype(plan.settings.cast or sources[index].dtype)
        # `replace_non_finite` widens what it changes; a float64 model may have been changed all the same.
        touched = point.dtype != dtype or dtype == torch.float64
        raw_E = torch.from_numpy(loaded.raw[index]).view(torch_dtype(sources[index].dtype)).to(dtype)
        counts.append(float(non_finite_counts([raw_E])[0]) if touched and index != plan.base else 0.0)
    return tuple(counts)


def as_cast(plan: Plan) -> str:
    """Return a clause that names the recipe's `dtype`: a cast can overflow where the file holds finite values."""
    return f" in {config_name(plan.settings.cast)}, the recipe's dtype" if plan.settings.cast else ""


def non_finite_remedy(plan: Plan, index: int) -> str:
    """Return what helps against values of one input that are not finite."""
    if index == plan.base and index not in plan.models:
        return "repair the base model, or take another"
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
