"""Systems with diagonal moments, one chunk at a time: read, checked, solved in closed form.

Owns which closed form a plan's rule is, and the reduction of diagonals to their norms. Knows nothing of order or output
files. Thread-safe. Legend: E elements of a chunk, N models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from pipeline.engine.chunk_math import MergedChunk, Updates
from pipeline.engine.moment_source import MomentSource
from pipeline.engine.source import ChunkSource
from pipeline.engine.system_chunks import SystemValues
from pipeline.engine.system_records import SystemRecord
from pipeline.errors import CheckpointError, Problem
from pipeline.numerics.linear_systems.conjugate_gradient import dot
from pipeline.numerics.linear_systems.diagonal import DiagonalSolution, fisher_quotient, gradient_matching
from pipeline.planning.grid import Chunk
from pipeline.planning.plan import Plan
from pipeline.planning.system import Solver, System, Term
from pipeline.planning.traffic import system_inputs, system_points


class ElementwiseSystems:
    """Solves chunks of tensors whose moments are diagonals.

    Args:
        plan: The plan.
        source: Where the models' chunks come from.
        moments: Where the diagonals come from.
        values: What chunks are on the device.
        device: torch's name of it.
        advance: Told of bytes that were read.
    """

    def __init__(
        self,
        plan: Plan,
        source: ChunkSource,
        moments: MomentSource,
        values: SystemValues,
        device: str,
        advance: Callable[[int], None],
    ) -> None:
        self._plan = plan
        self._source = source
        self._moments = moments
        self._values = values
        self._device = device
        self._advance = advance

    def merge(self, chunk: Chunk, updates: Updates, norms_N: Sequence[float]) -> MergedChunk:
        """Return a solved chunk.

        Args:
            chunk: Which.
            updates: Of its tensor.
            norms_N: The diagonals' global norms that they are divided by; nothing where they are not.

        Raises:
            CheckpointError: A value or a diagonal is unusable.
            VerificationError: A solved value overflows the output dtype.
        """
        plan, tensor = self._plan, self._plan.tensors[chunk.tensor]
        system, solver = tensor.system, plan.settings.solver
        if system is None or solver is None:
            raise ValueError(f"tensor {tensor.name} solves no system")
        diagonals = [self._diagonal(term, chunk) for term in system.terms]
        factors = [
            term.weight / norm for term, norm in zip(system.terms, norms_N or (1.0,) * len(diagonals), strict=True)
        ]
        with self._source.lease(chunk, system_inputs(plan, chunk.tensor), drop=True) as loaded:
            self._source.check_copies(loaded)
            points, replaced = self._values.points(loaded, system_points(plan), updates)
            if solver.rule == "gradient_matching":
                solution = self._matched(system, solver, points, diagonals, chunk)
            else:
                models = [points[term.input] for term in system.terms]
                solution = fisher_quotient(models, diagonals, factors, [term.weight for term in system.terms])
                solution = self._started(solver, solution, points, diagonals)
            read = sum(array.nbytes for array in loaded.raw.values()) + sum(d.nbytes for d in diagonals)
            self._advance(read)
            return self._values.merged(
                chunk, solution.values_E, replaced, self._record(chunk, solution, diagonals, factors)
            )

    def squares(self, chunk: Chunk) -> list[float]:
        """Return the squared norms (N) of the models' diagonals in a chunk.

        Raises:
            CheckpointError: A diagonal is unusable, or its squares overflow.
        """
        system = self._plan.tensors[chunk.tensor].system
        diagonals = [self._diagonal(term, chunk) for term in system.terms] if system is not None else []
        self._advance(sum(diagonal_E.nbytes for diagonal_E in diagonals))
        squares = [dot(diagonal_E, diagonal_E) for diagonal_E in diagonals]
        problems = [
            Problem(
                what="its diagonal is so large that its squares overflow float64",
                where=f"statistics of model {name}, tensor {self._plan.tensors[chunk.tensor].name}",
                remedy="scale the statistics down, or leave parameters.normalize out",
            )
            for name, square in zip(self._plan.model_names(), squares, strict=False)
            if not math.isfinite(square)
        ]
        if problems:
            raise CheckpointError(*problems)
        return squares

    def _matched(
        self,
        system: System,
        solver: Solver,
        points: dict[int, torch.Tensor],
        diagonals: Sequence[torch.Tensor],
        chunk: Chunk,
    ) -> DiagonalSolution:
        """Return the gradient matching of a chunk."""
        anchor = system.anchor
        if anchor is None:
            raise ValueError("gradient matching needs the base's term")
        return gradient_matching(
            [points[term.input] for term in system.terms],
            diagonals,
            points[anchor.input],
            self._diagonal(anchor, chunk) if anchor.statistics else None,
            [term.weight for term in system.terms],
            sizes_N=[term.data_size for term in system.terms],
            base_size=anchor.data_size,
            prior=solver.prior,
        )

    def _started(
        self,
        solver: Solver,
        solution: DiagonalSolution,
        points: dict[int, torch.Tensor],
        diagonals: Sequence[torch.Tensor],
    ) -> DiagonalSolution:
        """Return a solution with the start's values where no diagonal says anything, if that is not the average."""
        if solver.start == "average" or not solution.null_directions:
            return solution
        null_E = torch.stack([diagonal_E == 0 for diagonal_E in diagonals]).all(dim=0)
        start_E = start_values(self._plan, solver, points)
        values_E = torch.where(null_E, start_E, solution.values_E)
        return DiagonalSolution(values_E=values_E, null_directions=solution.null_directions)

    def _diagonal(self, term: Term, chunk: Chunk) -> torch.Tensor:
        (statistic,) = term.statistics
        values_E = self._moments.diagonal(statistic, chunk.tensor, chunk.start, chunk.stop)
        return torch.from_numpy(values_E).to(self._device)

    def _record(
        self, chunk: Chunk, solution: DiagonalSolution, diagonals: Sequence[torch.Tensor], factors: Sequence[float]
    ) -> SystemRecord:
        traces = (
            math.fsum([float(diagonal_E.sum(dtype=torch.float64)) * factor])
            for diagonal_E, factor in zip(diagonals, factors, strict=True)
        )
        return SystemRecord(tensor=chunk.tensor, traces=tuple(traces), null_directions=solution.null_directions)


def start_values(plan: Plan, solver: Solver, points: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return where systems of a chunk start, float64, for every start but the average.

    Args:
        plan: The plan.
        solver: Its.
        points: Values by input.
    """
    first_E = points[system_points(plan)[0]].to(torch.float64)
    if solver.start == "zero":
        return torch.zeros_like(first_E)
    if solver.start == "checkpoint" and solver.start_input is not None:
        return points[solver.start_input].to(torch.float64)
    if solver.start == "task_arithmetic":
        shift_E = torch.zeros_like(first_E)
        for index in plan.models:
            shift_E += points[index].to(torch.float64) - first_E
        return first_E + solver.start_scale * shift_E
    return first_E
