"""Systems of whole matrices: read chunk by chunk, solved by one thread, returned as merged chunks.

Owns where the bytes of a matrix come from and go to; how its system is solved is matrix.py's. Knows nothing of output
files. Thread-safe. Legend: I inputs, O outputs, D the size of a moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from pipeline.engine.chunk_math import MergedChunk, Updates
from pipeline.engine.chunk_tasks import ChunkTasks
from pipeline.engine.matrix import Matrix
from pipeline.engine.moment_source import MomentSource
from pipeline.engine.source import ChunkSource
from pipeline.engine.system_chunks import SystemValues
from pipeline.engine.system_states import SystemStates
from pipeline.errors import CheckpointError, Problem
from pipeline.numerics.linear_systems.conjugate_gradient import CgSolution, CgState, conjugate_gradient
from pipeline.numerics.linear_systems.dense import scale_off_diagonals
from pipeline.numerics.linear_systems.kronecker import KroneckerOperator
from pipeline.planning.plan import Plan
from pipeline.planning.system import Solver, Statistic

_SINGLE = np.dtype(np.float32)


class Residents(Protocol):
    """Which matrices have room for all of their moments."""

    def is_resident(self, item: int) -> bool:
        """Return whether a tensor's moments may all be held."""


class MatrixSystems:
    """Solves tensors whose moments are matrices.

    Args:
        plan: The plan.
        source: Where the models' chunks come from.
        moments: Where second moments come from.
        values: What chunks are on the device.
        tasks: Reads updates of low rank, and counts what is done.
        states: Where iterations are kept.
        room: Says which matrices may hold all their moments.
        device: torch's name of the device.
    """

    def __init__(
        self,
        plan: Plan,
        source: ChunkSource,
        moments: MomentSource,
        values: SystemValues,
        tasks: ChunkTasks,
        states: SystemStates,
        room: Residents,
        device: str,
    ) -> None:
        self._plan = plan
        self._source = source
        self._moments = moments
        self._values = values
        self._tasks = tasks
        self._states = states
        self._room = room
        self._device = device

    def merge(self, index: int) -> list[MergedChunk]:
        """Return the chunks of a solved tensor, its record with the first.

        Args:
            index: Of the tensor.

        Raises:
            CheckpointError: A value or a moment is unusable.
            VerificationError: A solved value overflows the output dtype.
        """
        tensor, solver = self._plan.tensors[index], self._plan.settings.solver
        if tensor.system is None or solver is None:
            raise ValueError(f"tensor {tensor.name} solves no system")
        matrix = Matrix(self, index, tensor.system, solver, self._tasks.read_again(index, None, {}).updates)
        try:
            solved = matrix.solve()
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise CheckpointError(
                Problem(
                    what=f"its system cannot be solved: {error}",
                    where=f"tensor {tensor.name}",
                    remedy=f"look at the models' statistics of it, or add pipeline: {{average: [{tensor.name}]}}",
                )
            ) from error
        merged: list[MergedChunk] = []
        for chunk in self._plan.written_chunks(index):
            values_E = matrix.first_E[chunk.start : chunk.stop] + solved.shift_E[chunk.start : chunk.stop]
            record = None if merged else solved.record
            merged.append(self._values.merged(chunk, values_E, {} if merged else matrix.replaced, record))
        return merged

    def read(self, index: int, point: int, updates: Updates, take: Callable[[slice, torch.Tensor], object]) -> float:
        """Read one point of a tensor and hand its values to `take`, chunk by chunk.

        Args:
            index: Of the tensor.
            point: The input.
            updates: Of the tensor.
            take: Called with the elements that a chunk has, and its values, valid during the call.

        Returns:
            How many values are the base's, in place of what is not finite.
        """
        plan = self._plan
        beside = (plan.base,) if plan.settings.non_finite == "base" and plan.base is not None else ()
        points = tuple(dict.fromkeys((*beside, point)))
        inputs = tuple(dict.fromkeys(plan.dense_input(index, each) for each in points))
        lost = 0.0
        for chunk in plan.written_chunks(index):
            with self._source.lease(chunk, inputs) as loaded:
                self._source.check_copies(loaded)
                values, replaced = self._values.points(loaded, points, updates)
                take(slice(chunk.start, chunk.stop), values[point])
                lost += replaced[point]
                self._tasks.advance(loaded.raw[plan.dense_input(index, point)].nbytes)
        return lost

    def moment(self, index: int, statistic: Statistic, off_diagonal: float) -> torch.Tensor:
        """Return a moment in float32 on the device, its off-diagonals scaled; the start of its memory is aligned."""
        matrix_DD = torch.empty((statistic.size, statistic.size), dtype=torch.float32)
        self._moments.matrix(statistic, index, _SINGLE, matrix_DD.numpy())
        return scale_off_diagonals(matrix_DD.to(self._device), off_diagonal)

    def iterate(
        self, index: int, operator: KroneckerOperator, rhs_IO: torch.Tensor, start_IO: torch.Tensor, solver: Solver
    ) -> CgSolution:
        """Return the iterated solution of a tensor, from where an earlier run was if one was killed."""
        keeper = self._states.keep(index)
        solution = conjugate_gradient(
            operator,
            rhs_IO,
            start_IO,
            iterations=solver.iterations,
            tolerance=solver.tolerance,
            state=self._states.load(index, CgState),
            save=keeper,
        )
        keeper.end()
        return solution

    def is_resident(self, index: int) -> bool:
        """Return whether all moments of a tensor may be held."""
        return self._room.is_resident(index)

    def count(self, size_bytes: int) -> None:
        """Count bytes of moments as done."""
        self._tasks.advance(size_bytes)

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self._plan

    @property
    def device(self) -> str:
        """Torch's name of the device."""
        return self._device
