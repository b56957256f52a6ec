"""The metric of a plan's distances: its statistics made into what chunks are mapped by.

Owns the factors of Grams and the roots of diagonals, and how long a factor lives. Knows nothing of passes. Thread-safe.
What it holds counts as `planning.metric` projects it: the factors of the tensors in flight, and one that is being made.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch

from pipeline.engine.moment_source import MomentSource
from pipeline.errors import CheckpointError, Problem
from pipeline.numerics.metric import GramMetric, IndefiniteError, Metric, diagonal_metric, gram_metric
from pipeline.planning.grid import Chunk
from pipeline.planning.plan import Plan
from pipeline.planning.system import Statistic


class MetricSource:
    """Gives the metric of each chunk.

    Args:
        plan: The plan.
        moments: Where its statistics come from.
        device: torch's name of where chunks are computed on.
    """

    def __init__(self, plan: Plan, moments: MomentSource, device: str) -> None:
        self._plan, self._moments, self._device = plan, moments, device
        # One factor is made at a time: that takes several times the memory of a made one.
        self._making = threading.Lock()
        # By place: parameters that share a Gram share its factor while any of them is in flight.
        self._made: weakref.WeakValueDictionary[Statistic, GramMetric] = weakref.WeakValueDictionary()

    def of_tensor(self, tensor: int) -> GramMetric | None:
        """Return what all chunks of a tensor are mapped by; None where each chunk has its own, or nothing is measured.

        Raises:
            CheckpointError: The statistic is not finite, or no Gram.
        """
        statistic = self._plan.tensors[tensor].metric
        if statistic is None or statistic.kind == "diagonal":
            return None
        with self._making:
            found = self._made.get(statistic)
            if found is None:
                found = self._made[statistic] = self._factor(tensor, statistic)
        return found

    def of_chunk(self, chunk: Chunk, prepared: GramMetric | None) -> Metric | None:
        """Return the metric of a chunk; None where it takes part in no distance.

        Args:
            chunk: Which.
            prepared: What `of_tensor` gave.

        Raises:
            CheckpointError: The statistic is not finite or somewhere negative.
        """
        statistic = self._plan.tensors[chunk.tensor].metric
        if prepared is not None or statistic is None:
            return prepared
        diagonal_E = self._moments.diagonal(statistic, chunk.tensor, chunk.start, chunk.stop)
        return diagonal_metric(diagonal_E, self._device)

    def _factor(self, tensor: int, statistic: Statistic) -> GramMetric:
        gram_DD = torch.from_numpy(self._moments.matrix(statistic, tensor, np.dtype(np.float64)))
        try:
            return gram_metric(gram_DD.to(self._device))
        except IndefiniteError as error:
            raise CheckpointError(
                Problem(
                    what=f"its input Gram is no mean of outer products: {error}",
                    where=f"statistics {self._plan.statistics[statistic.statistics].name},"
                    f" tensor {self._plan.tensors[tensor].name}",
                    remedy="collect the statistics again, or leave the metric out",
                )
            ) from error
