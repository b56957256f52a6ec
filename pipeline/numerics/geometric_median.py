"""The exact weighted geometric median from squared distances alone, with the proof of its optimality.

Owns the order of the cases (coincident, collinear, optimal at a data point, interior) and the solution as reported;
must not know where the distances come from. argmin f(m) = Σ wᵢ‖xᵢ − m‖; the answer is m = Σ cᵢxᵢ.

Legend: N points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConvergenceError, Problem
from pipeline.numerics.certificate import (
    Bound,
    Certificate,
    Pull,
    certificate,
    certificate_of,
    pull_at,
    vertex_gap,
)
from pipeline.numerics.collinear_median import LineMedian, line_median
from pipeline.numerics.distance_frame import UNIT_ROUNDOFF, DistanceFrame, Floats, reduce_distances
from pipeline.numerics.newton import Iteration, descend

__all__ = ["Certificate", "Iteration", "MedianSolution", "certificate", "solve_geometric_median"]

# Merging points within this share of the diameter costs a hundredth of the usual tolerance.
_ALMOST_SAME = 2.0**-40


@dataclass(frozen=True, slots=True, kw_only=True)
class MedianSolution:
    """A geometric median and what is proved of it.

    Attributes:
        coefficients: cᵢ ≥ 0 of sum one.
        objective: f(m) = Σ wᵢrᵢ.
        lower_bound: g ≤ f*, the dual value.
        relative_gap: (f − g)/f, an upper bound of the relative error of f; 0 when f = 0.
        iterations: Steps taken.
        optimum: "interior", "vertex", "collinear", "segment", "coincident" or "single".
        unique: False if a whole segment is optimal; its midpoint is returned.
        distances: rᵢ ≥ 0.
        history: The steps.
    """

    coefficients: tuple[float, ...]
    objective: float
    lower_bound: float
    relative_gap: float
    iterations: int
    optimum: str
    unique: bool
    distances: tuple[float, ...]
    history: tuple[Iteration, ...]


def solve_geometric_median(
    distances_NN: npt.ArrayLike, weights_N: Sequence[float], *, tolerance: float = 1e-10
) -> MedianSolution:
    """Return the weighted geometric median of points given by their squared distances.

    Args:
        distances_NN: (N, N) float64, squared distances, symmetric, zero diagonal.
        weights_N: N positive weights.
        tolerance: The largest relative gap to accept.

    Returns:
        The solution. Scaling all distances scales it, permuting the points permutes it, and splitting a weight over
        duplicates splits a coefficient.

    Raises:
        ValueError: The distances, weights or the tolerance are not what is said above.
        ConvergenceError: The gap could not be brought within the tolerance.

    Source: Weiszfeld 1937; Vardi and Zhang 2000, eq. 2.6, for data points.
    """
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"the tolerance must be between 0 and 1, not {tolerance}")
    solution = _solve(reduce_distances(distances_NN, weights_N), tolerance)
    if solution.relative_gap > tolerance:
        # Points this close cannot be told apart well enough by distances to others; as one point they can be proved.
        merged = _solve(reduce_distances(distances_NN, weights_N, same_point=_ALMOST_SAME), tolerance)
        solution = min(solution, merged, key=lambda candidate: candidate.relative_gap)
    if solution.relative_gap > tolerance:
        raise ConvergenceError(
            Problem(
                what=f"the relative gap is {solution.relative_gap:.2e} after {solution.iterations} steps, "
                f"above the tolerance of {tolerance:.2e}",
                where=f"geometric median of {len(solution.coefficients)} models",
                remedy="accept a larger tolerance, or remove models that are almost copies of each other",
            )
        )
    return solution


def _solve(frame: DistanceFrame, tolerance: float) -> MedianSolution:
    """Return the solution of a reduced problem, certified or not."""
    if frame.size == 1:
        optimum = "single" if frame.owner_M.size == 1 else "coincident"
        return _solution(frame, np.ones(1), np.zeros(1), _proved(0.0, 0.0), optimum)
    line = line_median(frame)
    if line is not None and len(line.points) == 2 and line.relative_gap <= tolerance:
        bound = _proved(line.objective, line.relative_gap)
        return _solution(frame, line.coefficients(frame.size), line.squares_N, bound, "segment", unique=False)
    best = _lowest_point(frame, line)
    pull = pull_at(frame, best)
    gap = _gap_of_point(frame, best, pull)
    if line is not None and len(line.points) == 1:
        # Close neighbours blur the pull, but not their coordinates along the line.
        gap = line.relative_gap if gap is None else min(gap, line.relative_gap)
    if gap is not None and gap <= tolerance:
        bound = _proved(pull.objective, gap)
        optimum = "collinear" if line is not None and frame.size > 2 else "vertex"
        objective = frame.objective(pull.objective)
        step = Iteration(index=0, step="vertex test", objective=objective, relative_gap=gap, step_length=0.0)
        return _solution(frame, np.eye(frame.size)[best], frame.squared_NN[best], bound, optimum, (step,))
    descent = descend(frame, best, pull, tolerance)
    place = descent.place
    return _solution(frame, place.coefficients, place.squares_N, descent.bound, "interior", descent.history)


def _proved(objective: float, gap: float) -> Bound:
    """Return a bound that was found without a gradient."""
    return Bound(objective=objective, relative_gap=gap, gradient=0.0)


def _lowest_point(frame: DistanceFrame, line: LineMedian | None) -> int:
    """Return the only data point that can be optimal: the one with the lowest objective."""
    if line is not None and len(line.points) == 1:
        return line.points[0]
    return int(np.argmin(np.sqrt(frame.squared_NN) @ frame.weights_N))


def _gap_of_point(frame: DistanceFrame, point: int, pull: Pull) -> float | None:
    """Return the gap of an optimal data point, None if it is not optimal: x_k is optimal if ‖R_k‖ ≤ η_k."""
    own_weight = float(frame.weights_N[point])
    # On equality rounding must not decide: the excess it can cause is part of the gap.
    if pull.norm > own_weight * (1.0 + 8.0 * UNIT_ROUNDOFF):
        return None
    return vertex_gap(pull.norm_bound, own_weight, frame.total_weight)


def _solution(
    frame: DistanceFrame,
    coefficients_N: Floats,
    squares_N: Floats,
    bound: Bound,
    optimum: str,
    history: tuple[Iteration, ...] = (),
    *,
    unique: bool = True,
) -> MedianSolution:
    proof = certificate_of(frame, squares_N, bound)
    return MedianSolution(
        coefficients=frame.expand(coefficients_N),
        objective=proof.objective,
        lower_bound=proof.lower_bound,
        relative_gap=proof.relative_gap,
        iterations=max(0, len(history) - 1),
        optimum=optimum,
        unique=unique,
        distances=proof.distances,
        history=history,
    )
