"""Descent to the geometric median of a reduced problem: damped Newton steps, each followed by a Weiszfeld step.

Owns the steps and when to stop; must not know degenerate cases, which are solved before. It starts below every data
point and never rises, so it cannot meet a data point, where f has no derivative.

With K_ij = √(aᵢaⱼ)⟨uᵢ, uⱼ⟩, aᵢ = wᵢ/rᵢ, uᵢ the unit vectors from m to the points, A = Σaᵢ, the Hessian Σaᵢ(I − uᵢuᵢᵀ)
has the inverse (1/A)(I + U(A·I − K)⁻¹Uᵀ), U = [√aᵢuᵢ]: a Newton step is a combination of points and needs no
coordinates.

Legend: N points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.numerics.certificate import Bound, Pull, bound_at
from pipeline.numerics.distance_frame import (
    UNIT_ROUNDOFF,
    DistanceFrame,
    Floats,
    Place,
    local_products,
    locate,
    place_at,
)

# The textbook constant of sufficient decrease.
_ARMIJO = 1e-4
# Halvings before a Newton direction is given up: 2^-30 of a step is no step.
_MAX_HALVINGS = 30
# Newton needs about ten steps; flat valleys of near-collinear points some dozens.
_MAX_ITERATIONS = 300
# Steps without a gradient half as large that end the descent: rounding has been reached.
_PATIENCE = 3
# Steps without a better gap that end a descent which is not certified yet.
_LONG_PATIENCE = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """One step of a solve.

    Attributes:
        index: From 0.
        step: "start", "newton", "weiszfeld", "anderson", "extrapolated" or "vertex test".
        objective: f after the step.
        relative_gap: The certified gap after the step.
        step_length: How far the point moved, in the unit of the distances.
    """

    index: int
    step: str
    objective: float
    relative_gap: float
    step_length: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """A change of the offsets of a place: its slope ⟨−∇f, d⟩ and length."""

    step: str
    offsets_N: Floats
    slope: float
    length: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Where the descent ended.

    Attributes:
        place: The best place by its certified gap.
        bound: What is proved of it.
        history: All steps.
    """

    place: Place
    bound: Bound
    history: tuple[Iteration, ...]


def descend(frame: DistanceFrame, best_point: int, pull: Pull, tolerance: float) -> Descent:
    """Descend from the lowest data point, which is not optimal, or from the weighted mean if that is lower.

    Args:
        frame: The reduced problem, not collinear.
        best_point: The data point with the smallest objective.
        pull: The pull on it, larger than its weight.
        tolerance: The gap wanted; the descent goes on to the limit of rounding all the same.

    Returns:
        The best place found, certified or not.
    """
    place = _start(frame, best_point, pull)
    bound = bound_at(frame, place)
    best = place, bound
    history = [_record(frame, 0, "start", bound, 0.0)]
    smallest, stale, failed = bound.gradient, 0, 0
    for index in range(1, _MAX_ITERATIONS + 1):
        place, direction, scale = _advance(frame, place, bound.objective)
        bound = bound_at(frame, place)
        history.append(_record(frame, index, direction.step, bound, scale * direction.length))
        failed = 0 if bound.relative_gap < best[1].relative_gap else failed + 1
        if bound.relative_gap < best[1].relative_gap:
            best = place, bound
        stale = 0 if bound.gradient < 0.5 * smallest else stale + 1
        smallest = min(smallest, bound.gradient)
        certified = best[1].relative_gap <= tolerance
        if smallest == 0.0 or (certified and stale >= _PATIENCE) or failed >= _LONG_PATIENCE:
            break
    return Descent(place=best[0], bound=best[1], history=tuple(history))


def _record(frame: DistanceFrame, index: int, step: str, bound: Bound, moved: float) -> Iteration:
    return Iteration(
        index=index,
        step=step,
        objective=frame.objective(bound.objective),
        relative_gap=bound.relative_gap,
        step_length=frame.length(moved),
    )


def _start(frame: DistanceFrame, best_point: int, pull: Pull) -> Place:
    """Return the Vardi-Zhang step from the best data point, or the weighted mean's Weiszfeld step if that is lower."""
    # m⁺ = (1 − γ)T̃ + γx_k with γ = η_k/‖R_k‖.
    own_weight = float(frame.weights_N[best_point])
    stay = min(1.0 - 2.0 * UNIT_ROUNDOFF, own_weight / max(pull.norm, own_weight))
    offsets = (1.0 - stay) * pull.rates_N / pull.rates_N.sum()
    offsets[best_point] = stay
    candidates = [_smoothed(frame, locate(frame.squared_NN, offsets))]
    mean = locate(frame.squared_NN, frame.weights_N / frame.total_weight)
    if mean.squares_N[mean.base] > mean.errors_N[mean.base]:
        candidates.append(_smoothed(frame, mean))
    return min(candidates, key=lambda place: _objective(frame, place))


def _objective(frame: DistanceFrame, place: Place) -> float:
    return math.fsum((frame.weights_N * np.sqrt(place.squares_N)).tolist())


def _smoothed(frame: DistanceFrame, place: Place) -> Place:
    """Return T(m): lower than m, and its coefficients are positive and small where the points are far."""
    rates = frame.weights_N / np.sqrt(np.maximum(place.squares_N, UNIT_ROUNDOFF**2))
    return locate(frame.squared_NN, rates / math.fsum(rates.tolist()))


def _advance(frame: DistanceFrame, place: Place, objective: float) -> tuple[Place, Direction, float]:
    """Return the next place, the direction taken and the fraction of it."""
    newton, gradient = _directions(frame, place)
    # Differences of f below this are rounding.
    slack = 8.0 * UNIT_ROUNDOFF * objective
    if newton is not None:
        scale = 1.0
        for _ in range(_MAX_HALVINGS):
            trial = _moved(frame, place, newton, scale)
            if _objective(frame, trial) <= objective - _ARMIJO * scale * newton.slope + slack:
                return _smoothed(frame, trial), newton, scale
            scale *= 0.5
    return _smoothed(frame, place), gradient, 1.0


def _moved(frame: DistanceFrame, place: Place, direction: Direction, scale: float) -> Place:
    coefficients = place.offsets_N + scale * direction.offsets_N
    coefficients[place.base] = 1.0 - math.fsum(coefficients.tolist())
    trial = place_at(frame.squared_NN, place.base, coefficients)
    nearest = int(np.argmin(trial.squares_N))
    return trial if nearest == place.base else place_at(frame.squared_NN, nearest, coefficients)


def _directions(frame: DistanceFrame, place: Place) -> tuple[Direction | None, Direction]:
    """Return the Newton direction, if there is one that descends, and the Weiszfeld direction, both in offsets."""
    base, squared = place.base, frame.squared_NN
    roots = np.sqrt(np.maximum(place.squares_N, UNIT_ROUNDOFF**2))
    rates = frame.weights_N / roots
    rate = math.fsum(rates.tolist())
    slope = rates - rate * place.offsets_N
    slope[base] = 0.0
    products = local_products(squared, base, slope)
    square = max(0.0, float(slope @ products))
    gradient = Direction(step="weiszfeld", offsets_N=slope / rate, slope=square / rate, length=math.sqrt(square) / rate)
    own = float(place.squares_N[base])
    # ⟨xᵢ − m, xⱼ − m⟩ / (rᵢrⱼ): about the nearest point, so that its own row does not cancel.
    cosines = 0.5 * (squared[base][:, None] + squared[base][None, :] - squared)
    cosines -= place.products_N[:, None] + place.products_N[None, :] - own
    cosines /= np.outer(roots, roots)
    halves = np.sqrt(rates)
    matrix = -np.outer(halves, halves) * np.clip(cosines, -1.0, 1.0)
    # A − a_i summed over the others: at the nearest point the difference would cancel.
    others = _sums_of_others(rates)
    np.fill_diagonal(matrix, others)
    scale = 1.0 / np.sqrt(others)
    right = halves / roots * (products - float(place.offsets_N @ products))
    try:
        solution = scale * np.linalg.solve(matrix * np.outer(scale, scale), scale * right)
    except np.linalg.LinAlgError:
        return None, gradient
    shares = halves * solution / roots
    offsets = (slope + shares - shares.sum() * place.offsets_N) / rate
    offsets[base] = 0.0
    descent = float(offsets @ products)
    if not (np.isfinite(offsets).all() and descent > 0.0):
        return None, gradient
    length = math.sqrt(max(0.0, float(offsets @ local_products(squared, base, offsets))))
    return Direction(step="newton", offsets_N=offsets, slope=descent, length=length), gradient


def _sums_of_others(rates_N: Floats) -> Floats:
    largest = int(np.argmax(rates_N))
    sums = rates_N.sum() - rates_N
    sums[largest] = np.delete(rates_N, largest).sum()
    return np.asarray(sums)
