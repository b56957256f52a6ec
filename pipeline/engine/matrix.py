"""One tensor while its system is solved: its task vectors, its start, its moments, in the order that memory allows.

Owns how a system is put together and which solver takes it. Values are differences from the first of `system_points`,
so that what the models have in common takes no digits. Where bytes come from is its owner's. Legend: E elements of a
tensor, I inputs, O outputs, X = Wᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.engine.chunk_math import Updates
from pipeline.engine.system_records import SystemRecord
from pipeline.numerics.linear_systems.dense import FLOAT32_ROUNDING
from pipeline.numerics.linear_systems.kronecker import KroneckerOperator, Pair
from pipeline.numerics.linear_systems.moments import GramSystem, weight_moment
from pipeline.numerics.low_rank.factors import dense_rows
from pipeline.planning.system import Solver, System
from pipeline.planning.system_memory import matrix_sides
from pipeline.planning.traffic import system_points

if TYPE_CHECKING:
    from pipeline.engine.matrices import MatrixSystems


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solved:
    """A solution as a difference from the first point, E float64 elements in the tensor's order, and its record."""

    shift_E: torch.Tensor
    record: SystemRecord


class Matrix:
    """One tensor while it is solved."""

    def __init__(self, owner: MatrixSystems, index: int, system: System, solver: Solver, updates: Updates) -> None:
        self._owner = owner
        self._index = index
        self._system = system
        self._solver = solver
        self._updates = updates
        tensor = owner.plan.tensors[index]
        self._inputs, self._outputs = matrix_sides(tensor, system)
        self._elements = tensor.elements
        self._first = system_points(owner.plan)[0]
        self.replaced: dict[int, float] = {}
        self.first_E = self._double()
        self._start_E = self._double()

    def solve(self) -> Solved:
        """Return the solution."""
        self._read(self._first, lambda part, values_E: self.first_E[part].copy_(values_E))
        self._fix_start()
        return self._solve_pairs() if self._system.objective == "kfac" else self._solve_moment()

    def _solve_moment(self) -> Solved:
        """Solve a system whose moments add up to one matrix."""
        solver, owner = self._solver, self._owner
        gathered = GramSystem(self._inputs, self._outputs, device=owner.device)
        for term, delta_E in zip(self._system.terms, self._task_vectors(), strict=True):
            delta_IO = self._matrix(delta_E)
            if term.statistics:
                moment_II = owner.moment(self._index, term.statistics[0], solver.off_diagonal)
            else:
                moment_II = weight_moment(delta_IO)
            gathered.add(moment_II, delta_IO, term.weight)
            # Before the next is read.
            del moment_II
            owner.count(sum(statistic.size_bytes for statistic in term.statistics))
        null, traces = gathered.null_directions, gathered.traces
        if solver.rule == "direct":
            # Moments of the weights are made in float64, of sums over the outputs.
            rounding = FLOAT32_ROUNDING if self._system.statistics else self._outputs * 2.0**-53
            dense = gathered.solve(self._matrix(self._start_E), rounding=rounding)
            record = SystemRecord(tensor=self._index, traces=traces, null_directions=dense.null_directions)
            return Solved(shift_E=self._flat(dense.x_IO), record=record)
        operator, rhs_IO = gathered.narrowed()
        return self._iterated(operator, rhs_IO, null, traces)

    def _solve_pairs(self) -> Solved:
        """Solve a system of pairs of moments, which every product needs one by one."""
        held: dict[int, Pair] = {}
        resident = self._owner.is_resident(self._index)

        def pairs() -> Iterator[Pair]:
            for number in range(len(self._system.terms)):
                if resident and number not in held:
                    held[number] = self._pair(number)
                yield held[number] if resident else self._pair(number)

        operator = KroneckerOperator(pairs, [term.weight for term in self._system.terms])
        vectors = (self._matrix(delta_E.to(torch.float32)) for delta_E in self._task_vectors())
        rhs_IO = operator.right_hand_side(vectors)
        self._owner.count(sum(statistic.size_bytes for statistic in self._system.statistics))
        null = operator.null_directions(self._inputs, self._outputs)
        return self._iterated(operator, rhs_IO, null, operator.traces)

    def _iterated(
        self, operator: KroneckerOperator, rhs_IO: torch.Tensor, null: int, traces: tuple[float, ...]
    ) -> Solved:
        start_IO = self._matrix(self._start_E).to(torch.float32).contiguous()
        found = self._owner.iterate(self._index, operator, rhs_IO, start_IO, self._solver)
        # What did not move keeps all digits of the start, which are more than the iteration's.
        shift_E = self._start_E + self._flat(found.x_IO - start_IO)
        record = SystemRecord(
            tensor=self._index,
            traces=traces,
            null_directions=null,
            iterations=found.iterations,
            converged=found.converged,
            relative_residual=found.relative_residual,
            stopped=found.stopped,
        )
        return Solved(shift_E=shift_E, record=record)

    def _task_vectors(self) -> Iterator[torch.Tensor]:
        """Yield the models' differences (E,) from the first point, float64, one at a time.

        They make the start, which is complete when the generator has ended.
        """
        weights = [term.weight for term in self._system.terms]
        start = self._solver.start
        for term in self._system.terms:
            delta_E = self._double()
            self._fill(delta_E, term.input)
            if start == "average":
                self._start_E.add_(delta_E, alpha=term.weight)
            elif start == "task_arithmetic":
                self._start_E.add_(delta_E, alpha=self._solver.start_scale)
            yield delta_E
            del delta_E
        if start == "average":
            self._start_E.div_(sum(weights))

    def _fill(self, delta_E: torch.Tensor, point: int) -> None:
        """Set the difference of one input from the first point."""
        tensor = self._owner.plan.tensors[self._index]
        if tensor.shared is not None and tensor.shared == self._first:
            # The point is the first one and its update: of two sums in which the same values cancel nothing is read.
            if point in self._updates:
                for chunk in self._owner.plan.written_chunks(self._index):
                    rows = slice(chunk.start // tensor.columns, chunk.stop // tensor.columns)
                    update_MK = dense_rows(self._updates[point], rows.start, rows.stop)
                    delta_E[chunk.start : chunk.stop] = update_MK.reshape(-1)
            return
        self._read(point, lambda part, values_E: self._subtract(delta_E, part, values_E))

    def _fix_start(self) -> None:
        """Set the start where it is not made of the models."""
        if self._solver.start == "zero":
            self._start_E.copy_(self.first_E).neg_()
        elif self._solver.start == "checkpoint" and self._solver.start_input is not None:
            self._read(self._solver.start_input, lambda part, values_E: self._subtract(self._start_E, part, values_E))

    def _subtract(self, to_E: torch.Tensor, part: slice, values_E: torch.Tensor) -> None:
        torch.sub(values_E.to(torch.float64), self.first_E[part], out=to_E[part])

    def _read(self, point: int, take: Callable[[slice, torch.Tensor], object]) -> None:
        self.replaced[point] = self._owner.read(self._index, point, self._updates, take)

    def _pair(self, number: int) -> Pair:
        left, right = self._system.terms[number].statistics
        off_diagonal = self._solver.off_diagonal
        return (
            self._owner.moment(self._index, left, off_diagonal),
            self._owner.moment(self._index, right, off_diagonal),
        )

    def _double(self) -> torch.Tensor:
        return torch.zeros(self._elements, dtype=torch.float64, device=self._owner.device)

    def _matrix(self, values_E: torch.Tensor) -> torch.Tensor:
        """Return elements in the tensor's order as X (I, O), a view."""
        return values_E.view(self._outputs, self._inputs).T

    def _flat(self, x_IO: torch.Tensor) -> torch.Tensor:
        """Return X as float64 elements (E,) in the tensor's order."""
        return x_IO.to(torch.float64).T.reshape(-1)
