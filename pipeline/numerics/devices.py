"""What chunks are computed on: NumPy arrays and compiled loops on the CPU, torch tensors on any other device.

Owns the choice, and the words in which the engine asks for arithmetic. torch is imported where a device or an update of
low rank needs it, and only there: a merge of whole models on the CPU is half done before torch would be loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.numerics import kernels
from pipeline.numerics.dtypes import array_dtype, cast, widen
from pipeline.numerics.kernels import BLOCK_ELEMENTS, ChunkDistances, ChunkProbe, Combined

if TYPE_CHECKING:
    from pipeline.numerics.low_rank.factors import LowRank

CPU = "cpu"


class Kernels(Protocol):
    """The arithmetic on points of one device. Dtypes are header names, such as "BF16"; points have shape (E,)."""

    def values(self, raw_B: np.ndarray, dtype: str) -> Any:
        """Return bytes (B,) uint8 as elements on the device; on the CPU they are not copied."""

    def cast(self, values_E: Any, dtype: str) -> Any:
        """Return values in another dtype, by way of float32 if it is a narrow one."""

    def stored(self, values_E: Any) -> memoryview:
        """Return elements as the bytes of a file."""

    def updated(self, values_E: Any, update: LowRank, rows: slice) -> Any:
        """Return the exact sums of some whole rows (of a matrix, one after the other) and an update, in float64."""

    def pairwise_distances(self, points: Sequence[Any]) -> ChunkDistances:
        """Return all pairwise squared distances of a chunk; see `kernels`, here and below."""

    def combine(self, points: Sequence[Any], coefficients_P: Sequence[float], dtype: str) -> Combined:
        """Return Σ c_p x_p rounded once, with its distance from every point."""

    def probe(self, points: Sequence[Any], coefficients_QP: np.ndarray) -> ChunkProbe:
        """Return the distances from given affine combinations to all points."""

    def non_finite_counts(self, points: Sequence[Any]) -> tuple[int, ...]:
        """Return how many elements of each point are NaN or infinite."""

    def replace_non_finite(self, values_E: Any, base_E: Any) -> Any:
        """Return values with every NaN and infinity replaced by the base's value; the values themselves if none is."""


def kernels_of(device: str) -> Kernels:
    """Return the arithmetic of a device.

    Args:
        device: "cpu", or torch's name of another, such as "cuda:0".
    """
    if device == CPU:
        return _ArrayKernels()
    from pipeline.numerics.torch_kernels import TorchKernels

    return TorchKernels(device)


class _ArrayKernels:
    """`kernels`, with header names for dtypes."""

    def values(self, raw_B: np.ndarray, dtype: str) -> np.ndarray:
        return raw_B.view(array_dtype(dtype))

    def cast(self, values_E: np.ndarray, dtype: str) -> np.ndarray:
        return cast(values_E, array_dtype(dtype))

    def stored(self, values_E: np.ndarray) -> memoryview:
        return values_E.view(np.uint8).data

    def updated(self, values_E: np.ndarray, update: LowRank, rows: slice) -> np.ndarray:
        from pipeline.numerics.low_rank.factors import dense_rows

        sums_E: np.ndarray = dense_rows(update, rows.start, rows.stop).numpy().reshape(-1)
        for start in range(0, sums_E.size, BLOCK_ELEMENTS):
            block = slice(start, start + BLOCK_ELEMENTS)
            sums_E[block] += widen(values_E[block], sums_E.dtype)
        return sums_E

    def pairwise_distances(self, points: Sequence[np.ndarray]) -> ChunkDistances:
        return kernels.pairwise_distances(points)

    def combine(self, points: Sequence[np.ndarray], coefficients_P: Sequence[float], dtype: str) -> Combined:
        return kernels.combine(points, coefficients_P, array_dtype(dtype))

    def probe(self, points: Sequence[np.ndarray], coefficients_QP: np.ndarray) -> ChunkProbe:
        return kernels.probe(points, coefficients_QP)

    def non_finite_counts(self, points: Sequence[np.ndarray]) -> tuple[int, ...]:
        return kernels.non_finite_counts(points)

    def replace_non_finite(self, values_E: np.ndarray, base_E: np.ndarray) -> np.ndarray:
        return kernels.replace_non_finite(values_E, base_E)
