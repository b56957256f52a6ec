"""One tensor's factors through the kernels: distances from them, and what they add to the base or to one another.

Owns the translation between the plan's words and the arithmetic of low-rank updates, which is torch on any device.
Legend: P points, N models, M × K the tensor's matrix, R a rank.
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.engine.chunk_math import MergedChunk, Updates, chunk_row, dense_values, refuse_non_finite
from pipeline.engine.loaded import Loaded, LoadedFactors
from pipeline.engine.run_folder import ChunkRow
from pipeline.engine.solutions import Solution
from pipeline.errors import CheckpointError, Problem, VerificationError
from pipeline.numerics.dtypes import config_name
from pipeline.numerics.low_rank.distances import pairwise_low_rank
from pipeline.numerics.low_rank.factors import LowRank
from pipeline.numerics.low_rank.output import LowRankCombination, measured_factors, merged_factors
from pipeline.numerics.torch_dtypes import round_once, torch_dtype
from pipeline.numerics.torch_kernels import TorchKernels, non_finite_counts
from pipeline.planning.plan import Plan, TensorPlan, Update
from pipeline.planning.traffic import written_points


def low_ranks(plan: Plan, loaded: LoadedFactors, device: str) -> dict[int, LowRank]:
    """Return a tensor's updates by input index.

    Raises:
        CheckpointError: A factor is not finite; names every such model.
    """
    tensor = plan.tensors[loaded.tensor]
    problems = []
    result = {}
    for update in tensor.updates:
        sides = _sides(tensor, update, loaded)
        bad = sum(non_finite_counts(sides))
        if bad:
            problems.append(
                Problem(
                    what=f"{bad} values of its factors are NaN or infinite",
                    where=f"model {plan.inputs[update.input].name}, tensor {tensor.name}",
                    remedy="leave the adapter out",
                )
            )
        left_MR, right_RK = (side.to(device) for side in sides)
        result[update.input] = LowRank(left_MR=left_MR, right_RK=right_RK, scale=update.scale)
    if problems:
        raise CheckpointError(*problems)
    return result


def _sides(tensor: TensorPlan, update: Update, loaded: LoadedFactors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors as M × R and R × K, views of the bytes read."""
    left, *rest = loaded.raw[update.input]
    left_MR = torch.from_numpy(left).view(torch_dtype(update.left.dtype))
    if update.right is None:
        return left_MR.reshape(tensor.rows, 1), torch.ones((1, 1), dtype=left_MR.dtype)
    right_RK = torch.from_numpy(rest[0]).view(torch_dtype(update.right.dtype))
    if update.transposed:
        return left_MR.reshape(update.rank, tensor.rows).T, right_RK.reshape(tensor.columns, update.rank).T
    return left_MR.reshape(tensor.rows, update.rank), right_RK.reshape(update.rank, tensor.columns)


def measure_factors(plan: Plan, tensor: int, updates: Updates, checksums: tuple[int, ...]) -> ChunkRow:
    """Return the statistics of a whole tensor from its updates; the values that they are added to cancel.

    Raises:
        VerificationError: A distance overflows.
    """
    distances_PP = pairwise_low_rank([updates.get(index) for index in plan.points])
    planned = plan.tensors[tensor]
    if not np.isfinite(distances_PP).all():
        raise VerificationError(
            Problem(
                what="a distance overflows float64",
                where=f"tensor {planned.name}",
                remedy="leave out the adapter that has factors above 1e75",
            )
        )
    unchanged_P = np.array([_untouched(planned, updates.get(index)) for index in plan.points])
    if plan.points[0] in updates:
        # Against a point with an update of its own, elements that are equal are not worth finding.
        unchanged_P = np.where(distances_PP[0] == 0.0, planned.elements, 0)
    return chunk_row(plan, tensor, 0, distances_PP, unchanged_P, checksums)


def _untouched(tensor: TensorPlan, update: LowRank | None) -> int:
    """Return how many elements an update leaves as they are: those of rows and columns where a factor is zero."""
    if update is None:
        return tensor.elements
    rows = int((update.left_MR != 0).any(dim=1).sum())
    columns = int((update.right_RK != 0).any(dim=0).sum())
    return tensor.elements - rows * columns


def probe_factors(plan: Plan, updates: Updates, coefficients_QN: np.ndarray) -> np.ndarray:
    """Return Q·N squared distances and Q·Q products of one tensor, in one row.

    They follow from the distances of the models, which are taken from the factors again each time. The distance from
    model k is formed without its own coefficient, as sums over the others relative to k: nothing cancels near it.
    """
    distances_NN = pairwise_low_rank([updates.get(index) for index in plan.models])
    squared_QN = np.empty_like(coefficients_QN)
    for squared_N, coefficients_N in zip(squared_QN, coefficients_QN, strict=True):
        others_NN = np.tile(coefficients_N, (len(coefficients_N), 1))
        np.fill_diagonal(others_NN, 0.0)
        reached_NN = others_NN @ distances_NN
        pulls_N = np.diagonal(reached_NN) * others_NN.sum(axis=1)
        squared_N[:] = np.maximum(pulls_N - 0.5 * (reached_NN * others_NN).sum(axis=1), 0.0)
    steps_QN = coefficients_QN - coefficients_QN[0]
    products_QQ = -0.5 * steps_QN @ distances_NN @ steps_QN.T
    return np.concatenate([squared_QN.ravel(), products_QQ.ravel()])


def write_panel(plan: Plan, loaded: Loaded, combination: LowRankCombination, device: str) -> MergedChunk:
    """Return some rows of a tensor whose points differ by updates alone.

    Raises:
        VerificationError: A merged value overflows the output dtype.
        CheckpointError: What the adapters stand on is not finite.
    """
    chunk = loaded.chunk
    tensor = plan.tensors[chunk.tensor]
    (held,) = loaded.raw
    kernels = TorchKernels(device)
    base_E = dense_values(plan, loaded, held, kernels)
    rows = slice(chunk.start // tensor.columns, chunk.stop // tensor.columns)
    result = combination.panel(base_E, rows, torch_dtype(tensor.dtype))
    refuse_non_finite(plan, loaded, result.squared_rounding, [base_E], kernels)
    return MergedChunk(
        data=kernels.stored(result.values_E),
        sums=_sums(plan, result.squared_distances_P, result.squared_rounding),
    )


def write_factors(plan: Plan, index: int, updates: Updates, solution: Solution) -> MergedChunk:
    """Return the merged update of a tensor as the bytes of its two factors, left before right, each rounded once.

    Raises:
        VerificationError: A factor overflows the output dtype.
    """
    tensor = plan.tensors[index]
    dtype = torch_dtype(tensor.dtype)
    points = [updates.get(point) for point in plan.points]
    try:
        merged = merged_factors(points, solution.factors, rank=plan.settings.rank)
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise _overflowing(tensor, "the merged update overflows float64") from error
    exact = merged if plan.settings.rank is None else merged_factors(points, solution.factors, rank=None)
    left_MR, right_RK = merged.left_MR, merged.right_RK
    if tensor.merged_rank == 0:
        # A bias is the sum of its columns; the row that they are multiplied by is one.
        left_MR, right_RK = exact.left_MR.sum(dim=1, keepdim=True), exact.right_RK[:1]
    left_MR, right_RK = round_once(left_MR, dtype), round_once(right_RK, dtype)
    written = LowRank(left_MR=left_MR, right_RK=right_RK, scale=1.0)
    measured = measured_factors(written, exact, points)
    if not (np.isfinite(measured.squared_rounding) and np.isfinite(measured.squared_distances_P).all()):
        raise _overflowing(tensor, f"a factor of the merged update overflows {config_name(tensor.dtype)}")
    transposed = tensor.updates[0].transposed
    sides = (left_MR,) if tensor.merged_rank == 0 else (left_MR, right_RK)
    stored = [(side.T if transposed else side).flatten().contiguous().cpu().view(torch.uint8).numpy() for side in sides]
    return MergedChunk(
        data=np.concatenate(stored).data,
        sums=_sums(plan, measured.squared_distances_P, measured.squared_rounding),
        discarded=(merged.discarded_square, merged.square),
    )


def _sums(plan: Plan, squared_P: np.ndarray, squared_rounding: float) -> tuple[float, ...]:
    """Return a row of sums in the order of `MergedChunk`; no value of an update is ever replaced."""
    skipped = len(plan.points) - len(written_points(plan))
    squared = (0.0,) * skipped + tuple(squared_P[skipped:].tolist())
    return (*squared, squared_rounding, *(0.0,) * len(plan.points))


def _overflowing(tensor: TensorPlan, what: str) -> VerificationError:
    remedy = "choose a wider out_dtype, or a smaller scale, or leave out the adapter that has huge factors"
    return VerificationError(Problem(what=what, where=f"tensor {tensor.name}", remedy=remedy))
