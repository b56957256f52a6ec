"""The geometric median when no distance matrix exists: Weiszfeld's loop on sums measured from the parameters.

Owns the mathematics of the loop as a generator: it yields a `Probe`, is sent what was `Measured` for it in one pass
over all parameters, and returns the solution. It must not know who measures, or how. It uses none of the formulas of
the distance matrix and is thereby an independent check of them.

Legend: N models, P probes.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConvergenceError, Problem
from pipeline.numerics.acceleration import AndersonMixer, extrapolate
from pipeline.numerics.certificate import vertex_gap
from pipeline.numerics.collinear_median import line_coordinates, median_groups
from pipeline.numerics.distance_frame import UNIT_ROUNDOFF, Floats
from pipeline.numerics.geometric_median import MedianSolution
from pipeline.numerics.newton import Iteration

# Steps of the coefficients below this are rounding; the answer then agrees with the direct solve.
_STILL = 4e-15
# Certified steps without a residual half as large that end the loop: rounding has been reached.
_PATIENCE = 6
# Past steps to mix: more are seldom independent.
_MIXED_STEPS = 6
# A point with this share of the coefficients is tested rather than crept up to.
_SUSPECT_SHARE = 0.5
# Steps by the row they were measured in.
_STEPS = ("start", "weiszfeld", "anderson", "extrapolated")
# A Weiszfeld step may be doubled where f is known to fall; after a success twice as far is tried.
_LEAST_STRETCH = 2.0
# Relative distance at which an iterate counts as on a data point.
_ON_POINT = 1e-9
# Objectives this close relative to each other are the same for a measured sum.
_SAME_OBJECTIVE = 1e-13
# Distances carry the rounding of the combination they were measured from, some times that of a sum.
_ROUNDING = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Combinations of the models to measure in one pass.

    Attributes:
        coefficients_PN: (P, N) float64, P ≤ 4; row p means m_p = Σ C_pj xⱼ and adds up to one.
    """

    coefficients_PN: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one pass found.

    Attributes:
        squared_distances_PN: (P, N) float64, ‖m_p − xᵢ‖².
        products_PP: (P, P) float64, ⟨m_p − m_0, m_q − m_0⟩.
    """

    squared_distances_PN: Floats
    products_PP: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """An iterate: coefficients, distances, Weiszfeld image, objective."""

    coefficients_N: Floats
    distances_N: Floats
    image_N: Floats
    rate: float
    objective: float

    @property
    def residual(self) -> float:
        return float(np.abs(self.image_N - self.coefficients_N).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vertex:
    """A tested data point: its gap, None if it is not optimal, and the Vardi-Zhang step away from it."""

    solution: MedianSolution | None
    objective: float
    escape_N: Floats


Steps = Generator[Probe, Measured, MedianSolution]


def streamed_median(weights_N: Sequence[float], *, tolerance: float = 1e-10, max_iterations: int = 500) -> Steps:
    """Solve for the weighted geometric median by passes over the parameters.

    Args:
        weights_N: N positive weights.
        tolerance: The largest relative gap to accept; the loop goes on until the coefficients stand still.
        max_iterations: Steps at most, one pass each; the test of a data point costs two or three passes more.

    Returns:
        A generator: it yields probes, takes what was measured, and returns the solution.

    Raises:
        ValueError: The weights, tolerance or number of passes are not what is said above.
        ConvergenceError: Not certified after so many passes.

    Source: Weiszfeld 1937; Vardi and Zhang 2000, eq. 2.6; Walker and Ni 2011 for the mixing.
    """
    weights = np.array(weights_N, dtype=np.float64)
    if weights.ndim != 1 or weights.size == 0 or not (np.isfinite(weights).all() and (weights > 0.0).all()):
        raise ValueError("weights must be a non-empty sequence of positive finite numbers")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"the tolerance must be between 0 and 1, not {tolerance}")
    if max_iterations < 1:
        raise ValueError(f"at least one pass is needed, not {max_iterations}")
    return _Loop(weights, tolerance, max_iterations).run()


class _Loop:
    """The state of one solve."""

    def __init__(self, weights_N: Floats, tolerance: float, max_iterations: int) -> None:
        self.weights = weights_N
        self.total = math.fsum(weights_N.tolist())
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.history: list[Iteration] = []
        self.tested: dict[int, _Vertex] = {}
        self.from_mean_squared: Floats = np.zeros(weights_N.size)

    def run(self) -> Steps:
        size = self.weights.size
        mean = self.weights / self.total
        if size == 1:
            return self._solution(np.ones(1), np.zeros(1), 0.0, "single")
        first = yield Probe(coefficients_PN=np.stack([mean, _unit(size, 0), _unit(size, 1)]))
        if not first.squared_distances_PN[1].any():
            return self._solution(mean, np.zeros(size), 0.0, "coincident")
        self.from_mean_squared = first.squared_distances_PN[0]
        heaviest = int(np.argmax(self.weights))
        candidate = heaviest if 2.0 * self.weights[heaviest] > self.total else None
        optimum = "vertex"
        line = line_coordinates(first.squared_distances_PN)
        if line is not None:
            groups, distinct = median_groups(line, self.weights)
            if len(groups) == 2:
                return (yield from self._segment(groups))
            candidate = groups[0][0]
            optimum = "collinear" if distinct > 2 else "vertex"
        if candidate is not None:
            vertex = yield from self._test(candidate, optimum)
            if vertex.solution is not None:
                return vertex.solution
        return (yield from self._iterate(mean, np.sqrt(first.squared_distances_PN[0])))

    def _iterate(self, coefficients_N: Floats, distances_N: Floats) -> Steps:
        depth = min(_MIXED_STEPS, self.weights.size - 1)
        mixer = AndersonMixer(depth)
        point, step, moved = self._point(coefficients_N, distances_N), "start", 0.0
        smallest, stale, gap, stretch = math.inf, 0, 1.0, _LEAST_STRETCH
        for index in range(self.max_iterations):
            suspect = self._suspect(point)
            if suspect is not None:
                vertex = self.tested.get(suspect) or (yield from self._test(suspect, "vertex"))
                if vertex.solution is not None:
                    return vertex.solution
                if point.objective >= vertex.objective * (1.0 - _SAME_OBJECTIVE):
                    left = yield Probe(coefficients_PN=vertex.escape_N[None])
                    point = self._point(vertex.escape_N, np.sqrt(left.squared_distances_PN[0]))
                    mixer, step = AndersonMixer(depth), "vertex test"
            place, image = point.coefficients_N, point.image_N
            rows = np.stack([place, image, mixer.propose(place, image), extrapolate(place, image, stretch)])
            measured = yield Probe(coefficients_PN=rows)
            gap = self._gap(point, measured)
            self.history.append(
                Iteration(index=index, step=step, objective=point.objective, relative_gap=gap, step_length=moved)
            )
            stale = 0 if point.residual < 0.5 * smallest else stale + 1
            smallest = min(smallest, point.residual)
            if gap <= self.tolerance and (point.residual <= _STILL or stale >= _PATIENCE):
                return self._solution(point.coefficients_N, point.distances_N, gap, "interior")
            point, row = self._choose(rows, measured)
            step = _STEPS[row]
            stretch = 2.0 * stretch if step == "extrapolated" else max(_LEAST_STRETCH, 0.5 * stretch)
            moved = math.sqrt(max(0.0, float(measured.products_PP[row, row])))
        raise ConvergenceError(
            Problem(
                what=f"the relative gap is {gap:.2e} after {self.max_iterations} steps, above {self.tolerance:.2e}",
                where=f"geometric median of {self.weights.size} models",
                remedy="set `distances: gram`, which needs one pass whatever the models are",
            )
        )

    def _point(self, coefficients_N: Floats, distances_N: Floats) -> _Point:
        objective = math.fsum((self.weights * distances_N).tolist())
        # An iterate on a non-optimal data point, to the last bit: any positive distance lets the loop leave it.
        distances = np.maximum(distances_N, UNIT_ROUNDOFF * objective / self.total)
        rates = self.weights / distances
        rate = math.fsum(rates.tolist())
        return _Point(
            coefficients_N=coefficients_N,
            distances_N=distances_N,
            image_N=rates / rate,
            rate=rate,
            objective=objective,
        )

    def _choose(self, rows_PN: Floats, measured: Measured) -> tuple[_Point, int]:
        """Return the lowest of the steps that were measured; of those equally low up to rounding, the stillest."""
        points = [self._point(rows_PN[row], np.sqrt(measured.squared_distances_PN[row])) for row in (1, 2, 3)]
        limit = min(point.objective for point in points) * (1.0 + 8.0 * UNIT_ROUNDOFF)
        ranked = [(point.residual, row) for row, point in enumerate(points, start=1) if point.objective <= limit]
        row = min(ranked)[1]
        return points[row - 1], row

    def _suspect(self, point: _Point) -> int | None:
        """Return the nearest data point if the iterate is on it, or on the way to it."""
        nearest = int(np.argmin(point.distances_N))
        distance = float(point.distances_N[nearest])
        copies = point.distances_N <= distance * (1.0 + _ON_POINT)
        if distance <= _ON_POINT * point.objective / self.total:
            return nearest
        share = float(point.coefficients_N[copies].sum())
        return nearest if share >= _SUSPECT_SHARE and nearest not in self.tested else None

    def _gap(self, point: _Point, measured: Measured) -> float:
        """Return the dual bound (ε + ⟨s, x̄_w − m⟩/f)/(1 + ε) from rows m and T(m), as s = A(T(m) − m).

        ⟨T(m) − m, x̄_w − m⟩ = ½Σ(T − c)ᵢ(‖xᵢ − m‖² − ‖xᵢ − x̄_w‖²) needs no further row.
        """
        products = measured.products_PP
        gradient = point.rate * math.sqrt(max(0.0, float(products[1, 1]))) / self.total
        allowance = _ROUNDING * (point.coefficients_N.size + 8) * UNIT_ROUNDOFF
        epsilon = gradient + allowance
        step = point.image_N - point.coefficients_N
        along = 0.5 * float(step @ (point.distances_N**2 - self.from_mean_squared))
        inner = point.rate * along / point.objective + allowance
        return min(1.0, (epsilon + max(-epsilon, min(epsilon, inner))) / (1.0 + epsilon))

    def _test(self, index: int, optimum: str) -> Generator[Probe, Measured, _Vertex]:
        """Test a data point in two passes: ‖R_k‖ = B‖T̃ − x_k‖, T̃ the others' mean by bᵢ = wᵢ/‖xᵢ − x_k‖, B = Σb."""
        own = _unit(self.weights.size, index)
        first = yield Probe(coefficients_PN=own[None])
        distances = np.sqrt(first.squared_distances_PN[0])
        # It lies at itself, whatever the rounding of what was measured.
        distances[index] = 0.0
        rates = np.divide(self.weights, distances, out=np.zeros_like(distances), where=distances > 0.0)
        others = rates / math.fsum(rates.tolist())
        second = yield Probe(coefficients_PN=np.stack([own, others]))
        pull = math.fsum(rates.tolist()) * math.sqrt(max(0.0, float(second.products_PP[1, 1])))
        copies = np.where(distances > 0.0, 0.0, self.weights)
        weight = math.fsum(copies.tolist())
        solution = None
        if pull <= weight * (1.0 + 8.0 * UNIT_ROUNDOFF):
            gap = vertex_gap(pull * (1.0 + (distances.size + 8) * UNIT_ROUNDOFF), weight, self.total)
            solution = self._solution(copies / weight, distances, gap, optimum)
        stay = min(1.0, weight / pull) if pull > 0.0 else 1.0
        self.tested[index] = _Vertex(
            solution=solution,
            objective=math.fsum((self.weights * distances).tolist()),
            escape_N=(1.0 - stay) * others + stay * copies / weight,
        )
        return self.tested[index]

    def _segment(self, groups: tuple[list[int], ...]) -> Steps:
        """Return the midpoint between two groups of coinciding points, all of it optimal."""
        coefficients = np.zeros(self.weights.size)
        for group in groups:
            coefficients[group] = 0.5 * self.weights[group] / self.weights[group].sum()
        first = yield Probe(coefficients_PN=coefficients[None])
        point = self._point(coefficients, np.sqrt(first.squared_distances_PN[0]))
        measured = yield Probe(coefficients_PN=np.stack([coefficients, point.image_N]))
        return self._solution(coefficients, point.distances_N, self._gap(point, measured), "segment", unique=False)

    def _solution(
        self, coefficients_N: Floats, distances_N: Floats, gap: float, optimum: str, *, unique: bool = True
    ) -> MedianSolution:
        objective = math.fsum((self.weights * distances_N).tolist())
        return MedianSolution(
            coefficients=tuple(coefficients_N.tolist()),
            objective=objective,
            lower_bound=objective * (1.0 - gap),
            relative_gap=gap,
            iterations=len(self.history),
            optimum=optimum,
            unique=unique,
            distances=tuple(distances_N.tolist()),
            history=tuple(self.history),
        )


def _unit(size: int, index: int) -> Floats:
    return np.asarray(np.eye(1, size, index)[0])
