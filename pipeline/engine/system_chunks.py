"""The values of a system's points, chunk by chunk: task vectors on a device in, merged bytes out.

Owns the translation between chunks of stored values and the tensors that solvers take. Knows no solver. Legend: E
elements of a chunk; N models. Task vectors start from the first of `system_points`: the base where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.engine.chunk_math import MergedChunk, Updates, chunk_points, non_finite_error
from pipeline.engine.loaded import Loaded
from pipeline.engine.system_records import SystemRecord
from pipeline.errors import Problem, VerificationError
from pipeline.numerics.devices import CPU, Kernels
from pipeline.numerics.dtypes import BFLOAT16, config_name, widen
from pipeline.numerics.torch_dtypes import tensor_over
from pipeline.planning.grid import Chunk
from pipeline.planning.plan import Plan


class SystemValues:
    """Reads and writes the values of systems on one device.

    Args:
        plan: The plan.
        kernels: Of the device.
        device: torch's name of it.
    """

    def __init__(self, plan: Plan, kernels: Kernels, device: str) -> None:
        self._plan = plan
        self._kernels = kernels
        self._device = device

    def points(
        self, loaded: Loaded, indices: Sequence[int], updates: Updates
    ) -> tuple[dict[int, torch.Tensor], dict[int, float]]:
        """Return, by input, its values (E,) and how many of them are the base's, in place of what is not finite.

        The values are in a type that holds them exactly; they are valid as long as the chunk is held.

        Raises:
            CheckpointError: A value is not finite.
        """
        distinct = tuple(dict.fromkeys(indices))
        points, replaced = chunk_points(self._plan, loaded, distinct, updates, self._kernels)
        counts = self._kernels.non_finite_counts(points)
        bad = {(loaded.chunk.tensor, index): n for index, n in zip(distinct, counts, strict=True) if n}
        if bad:
            raise non_finite_error(self._plan, bad)
        values = {index: _as_torch(point) for index, point in zip(distinct, points, strict=True)}
        return values, dict(zip(distinct, replaced, strict=True))

    def merged(
        self, chunk: Chunk, values_E: torch.Tensor, replaced: Mapping[int, float], record: SystemRecord | None = None
    ) -> MergedChunk:
        """Return a chunk of a solution as the bytes of the output.

        Args:
            chunk: Which.
            values_E: float64.
            replaced: By input, how many values are the base's.
            record: Of what was solved.

        Raises:
            VerificationError: A value overflows the output dtype.
        """
        dtype = self._plan.tensors[chunk.tensor].dtype
        point = values_E.numpy() if self._device == CPU else values_E
        result = self._kernels.combine([point], [1.0], dtype)
        if not np.isfinite(result.squared_rounding):
            finite = bool(torch.isfinite(values_E).all())
            raise VerificationError(
                Problem(
                    what=f"a solved value overflows {config_name(dtype)}" if finite else "the solution is not finite",
                    where=f"tensor {self._plan.tensors[chunk.tensor].name}, elements {chunk.start} to {chunk.stop}",
                    remedy="choose a wider out_dtype" if finite else "the statistics' scales lie too far apart",
                )
            )
        lost = [replaced.get(index, 0.0) for index in self._plan.points]
        sums = (*(0.0,) * len(lost), result.squared_rounding, *lost)
        return MergedChunk(data=self._kernels.stored(result.values_E), sums=sums, record=record)


def _as_torch(values_E: Any) -> torch.Tensor:
    """Return values as a tensor; arrays share their memory where torch knows their dtype, and are float32 elsewhere."""
    if not isinstance(values_E, np.ndarray):
        return torch.as_tensor(values_E)
    if values_E.dtype == BFLOAT16:
        return tensor_over(values_E.view(np.int16)).view(torch.bfloat16)
    if values_E.dtype.itemsize == 1:
        return torch.from_numpy(widen(values_E, np.dtype(np.float32)))
    return tensor_over(values_E)
