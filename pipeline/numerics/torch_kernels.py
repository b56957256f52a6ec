"""The arithmetic of `kernels` in torch: for points on a device that is not the CPU, and to test the compiled loops by.

Owns the same sums in the same float64, as products of blocks. Importing this module imports torch. Legend: P points, E
elements of the chunk, K elements of a block, Q combinations. Points are one-dimensional tensors of any float dtype on
one device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pipeline.numerics.kernels import (
    BLOCK_ELEMENTS,
    ChunkDistances,
    ChunkProbe,
    Combined,
    anchored,
    distances_by,
)
from pipeline.numerics.low_rank.factors import LowRank, dense_rows
from pipeline.numerics.torch_dtypes import round_once, tensor_over, torch_dtype


class TorchKernels:
    """`devices.Kernels` on tensors of one device.

    Args:
        device: torch's name of it, such as "cuda:0".
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def values(self, raw_B: np.ndarray, dtype: str) -> torch.Tensor:
        """Return bytes as elements, on the device."""
        # torch gives an empty array the stride 0, which it then refuses to view.
        return tensor_over(raw_B).as_strided(raw_B.shape, (1,)).view(torch_dtype(dtype)).to(self._device)

    def cast(self, values_E: torch.Tensor, dtype: str) -> torch.Tensor:
        """Return values in another dtype, by way of float32 if it is a narrow one."""
        return values_E.to(torch_dtype(dtype))

    def stored(self, values_E: torch.Tensor) -> memoryview:
        """Return elements as the bytes of a file."""
        return values_E.cpu().view(torch.uint8).numpy().data

    def updated(self, values_E: torch.Tensor, update: LowRank, rows: slice) -> torch.Tensor:
        """Return the exact sums of some whole rows and an update, in float64."""
        # torch adds the eight-bit floats to nothing.
        added_E = values_E.to(torch.float32) if values_E.element_size() == 1 else values_E
        return dense_rows(update, rows.start, rows.stop).flatten().add_(added_E)

    def pairwise_distances(self, points: Sequence[torch.Tensor]) -> ChunkDistances:
        """Return all pairwise squared distances of a chunk."""
        return pairwise_distances(points)

    def combine(self, points: Sequence[torch.Tensor], coefficients_P: Sequence[float], dtype: str) -> Combined:
        """Return Σ c_p x_p rounded once, with its distance from every point."""
        return combine(points, coefficients_P, torch_dtype(dtype))

    def probe(self, points: Sequence[torch.Tensor], coefficients_QP: np.ndarray) -> ChunkProbe:
        """Return the distances from given affine combinations to all points."""
        return probe(points, coefficients_QP)

    def non_finite_counts(self, points: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """Return how many elements of each point are NaN or infinite."""
        return non_finite_counts(points)

    def replace_non_finite(self, values_E: torch.Tensor, base_E: torch.Tensor) -> torch.Tensor:
        """Return values with every NaN and infinity replaced by the base's value."""
        return replace_non_finite(values_E, base_E)


def pairwise_distances(points: Sequence[torch.Tensor]) -> ChunkDistances:
    """Return what `kernels.pairwise_distances` does.

    Args:
        points: P tensors of shape (E,); the first is the reference.
    """
    return distances_by(lambda reference: gram(points, reference))


def combine(points: Sequence[torch.Tensor], coefficients_P: Sequence[float], dtype: torch.dtype) -> Combined:
    """Return what `kernels.combine` does.

    Args:
        points: P tensors of shape (E,).
        coefficients_P: One factor a point.
        dtype: Output float type.
    """
    factors, anchor, anchor_factor = anchored(coefficients_P)
    device = points[0].device
    factors_P = torch.from_numpy(factors).to(device)
    values_E = torch.empty_like(points[0], dtype=dtype)
    squared_P = torch.zeros(len(points), dtype=torch.float64, device=device)
    rounding = torch.zeros((), dtype=torch.float64, device=device)
    for start, differences_PK in _difference_blocks(points, anchor):
        block = slice(start, start + differences_PK.shape[1])
        anchor_K = points[anchor][block].to(torch.float64)
        shift_K = factors_P @ differences_PK
        # x + (-0.0) is x, whereas -0.0 + 0.0 would lose the sign of a zero that the points share.
        exact_K = anchor_factor * anchor_K + torch.where(shift_K == 0, -0.0, shift_K)
        rounded_K = round_once(exact_K, dtype)
        values_E[block] = rounded_K
        written_K = rounded_K.to(torch.float64)
        rounding += (written_K - exact_K).square().sum()
        squared_P += differences_PK.sub_(written_K - anchor_K).square_().sum(dim=1)
    return Combined(
        values_E=values_E, squared_distances_P=squared_P.cpu().numpy(), squared_rounding=float(rounding.cpu())
    )


def probe(points: Sequence[torch.Tensor], coefficients_QP: np.ndarray) -> ChunkProbe:
    """Return what `kernels.probe` does.

    Args:
        points: P tensors of shape (E,).
        coefficients_QP: float64; each row sums to 1.
    """
    device = points[0].device
    factors_QP = torch.from_numpy(np.ascontiguousarray(coefficients_QP)).to(device)
    squared_QP = torch.zeros(factors_QP.shape, dtype=torch.float64, device=device)
    products_QQ = torch.zeros((len(factors_QP), len(factors_QP)), dtype=torch.float64, device=device)
    for _, differences_PK in _difference_blocks(points, 0):
        combinations_QK = factors_QP @ differences_PK
        for row, combination_K in enumerate(combinations_QK):
            squared_QP[row] += (differences_PK - combination_K).square_().sum(dim=1)
        steps_QK = combinations_QK - combinations_QK[0]
        products_QQ += steps_QK @ steps_QK.T
    return ChunkProbe(squared_distances_QP=squared_QP.cpu().numpy(), products_QQ=products_QQ.cpu().numpy())


def gram(points: Sequence[torch.Tensor], reference: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the products of the differences from one point, symmetric, and the counts of elements equal to its.

    Args:
        points: P tensors of shape (E,).
        reference: The point that is subtracted.
    """
    count = len(points)
    gram_PP = torch.zeros((count, count), dtype=torch.float64, device=points[0].device)
    unchanged_P = torch.zeros(count, dtype=torch.int64, device=points[0].device)
    for _, differences_PK in _difference_blocks(points, reference):
        gram_PP += differences_PK @ differences_PK.T
        unchanged_P += (differences_PK == 0).sum(dim=1)
    return gram_PP.cpu().numpy(), unchanged_P.cpu().numpy()


def non_finite_counts(points: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return how many elements of each point are NaN or infinite."""
    return tuple(int((~_finite(point)).sum()) for point in points)


def replace_non_finite(values_E: torch.Tensor, base_E: torch.Tensor) -> torch.Tensor:
    """Return `values_E` with every NaN and infinity replaced by the base's value (float64 then, else unchanged)."""
    finite_E = _finite(values_E)
    if bool(finite_E.all()):
        return values_E
    return torch.where(finite_E, values_E.to(torch.float64), base_E.to(torch.float64))


def _finite(values_E: torch.Tensor) -> torch.Tensor:
    """Return a mask of the finite elements; torch has no such test for the eight-bit floats."""
    return torch.isfinite(values_E.to(torch.float32) if values_E.element_size() == 1 else values_E)


def _difference_blocks(points: Sequence[torch.Tensor], reference: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (start, float64 differences from points[reference] of shape (P, K)); the buffer is reused."""
    elements = points[0].numel()
    size = min(BLOCK_ELEMENTS, elements)
    buffer = torch.empty((len(points), size), dtype=torch.float64, device=points[0].device)
    for start in range(0, elements, BLOCK_ELEMENTS):
        stop = min(start + BLOCK_ELEMENTS, elements)
        # A short last block gets a buffer of its own: a strided view would take another path through the product.
        block_PK = buffer if stop - start == size else torch.empty_like(buffer[:, : stop - start])
        for row, point in zip(block_PK, points, strict=True):
            row.copy_(point[start:stop])
        block_PK -= block_PK[reference].clone()
        yield start, block_PK
