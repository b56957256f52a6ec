"""Arrays and tensors of the same bits, and the kernels of every device under one set of tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pipeline.numerics.devices import Kernels, kernels_of
from pipeline.numerics.dtypes import array_dtype
from pipeline.numerics.kernels import ChunkDistances, ChunkProbe, Combined
from pipeline.numerics.torch_kernels import TorchKernels

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def bits_of(values_E: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor, shared with it."""
    return values_E.contiguous().view(torch.uint8).numpy()


def as_array(values_E: torch.Tensor) -> np.ndarray:
    """The same bits as an array."""
    return bits_of(values_E).view(array_dtype(NAMES[values_E.dtype]))


def as_tensor(values_E: np.ndarray) -> torch.Tensor:
    """The same bits as a tensor."""
    dtype = next(dtype for dtype, name in NAMES.items() if array_dtype(name) == values_E.dtype)
    return torch.from_numpy(values_E.view(np.uint8)).view(dtype)


class On:
    """One device's kernels, tensors in and tensors out."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def points(self, tensors: Sequence[torch.Tensor]) -> list[object]:
        return [self.kernels.values(bits_of(tensor), NAMES[tensor.dtype]) for tensor in tensors]

    def back(self, values_E: object) -> torch.Tensor:
        return values_E if isinstance(values_E, torch.Tensor) else as_tensor(values_E)

    def pairwise_distances(self, points: Sequence[torch.Tensor]) -> ChunkDistances:
        return self.kernels.pairwise_distances(self.points(points))

    def combine(self, points: Sequence[torch.Tensor], coefficients: Sequence[float], dtype: torch.dtype) -> Combined:
        result = self.kernels.combine(self.points(points), coefficients, NAMES[dtype])
        values_E = self.back(result.values_E)
        assert bytes(self.kernels.stored(result.values_E)) == bits_of(values_E).tobytes()
        return replace(result, values_E=values_E)

    def probe(self, points: Sequence[torch.Tensor], coefficients: np.ndarray) -> ChunkProbe:
        return self.kernels.probe(self.points(points), coefficients)

    def non_finite_counts(self, points: Sequence[torch.Tensor]) -> tuple[int, ...]:
        return self.kernels.non_finite_counts(self.points(points))


ON = {"arrays": On(kernels_of("cpu")), "torch": On(TorchKernels("cpu"))}
