"""How far from optimal a point is at most: the dual bound of the geometric median, on squared distances alone.

Owns the bound and its allowance for rounding; must not know how the point was found. The dual problem is
max Σ⟨pᵢ, xᵢ⟩ subject to Σpᵢ = 0, ‖pᵢ‖ ≤ wᵢ. With qᵢ = wᵢ(xᵢ − m)/rᵢ, s = Σqᵢ, ε = ‖s‖/W the vectors
pᵢ = (qᵢ − wᵢs/W)/(1 + ε) are feasible, which gives (f − f*)/f ≤ (ε + ⟨s, x̄_w − m⟩/f)/(1 + ε) ≤ 2ε/(1 + ε).

Legend: N points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pipeline.numerics.collinear_median import line_median
from pipeline.numerics.distance_frame import (
    UNIT_ROUNDOFF,
    DistanceFrame,
    Floats,
    Place,
    local_products,
    locate,
    product_errors,
    reduce_distances,
)

# How far from one the sum of coefficients may be: more than rounding means another point than the caller thinks.
_SUM_SLACK = 1e-9
# A gap below this needs no better bound.
_WORTH_A_CLUSTER = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What is proved of one point.

    Attributes:
        objective: f(m) = Σ wᵢrᵢ, in the unit of the distances.
        lower_bound: g ≤ f*, the dual value.
        relative_gap: (f − g)/f, an upper bound of the relative error of f that allows for rounding; 0 when f = 0.
        distances: rᵢ of every point.
    """

    objective: float
    lower_bound: float
    relative_gap: float
    distances: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The bound at one place of a reduced problem, in its scaled units.

    Attributes:
        objective: f.
        relative_gap: The certified gap.
        gradient: ε = ‖∇f‖/W as computed, without the allowance for rounding.
    """

    objective: float
    relative_gap: float
    gradient: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """What the other points do at data point k: R_k = Σ wᵢ(xᵢ − x_k)/‖xᵢ − x_k‖.

    Attributes:
        norm: ‖R_k‖.
        norm_bound: An upper bound of it that allows for rounding.
        rates_N: (N,) float64, wᵢ/‖xᵢ − x_k‖, zero at k.
        objective: f(x_k).
    """

    norm: float
    norm_bound: float
    rates_N: Floats
    objective: float


def certificate(
    distances_NN: npt.ArrayLike, weights_N: Sequence[float], coefficients_N: Sequence[float] | Floats
) -> Certificate:
    """Bound how far Σ cⱼxⱼ is from the geometric median.

    Args:
        distances_NN: (N, N) float64, squared distances, symmetric, zero diagonal.
        weights_N: N positive weights.
        coefficients_N: N coefficients of sum one.

    Returns:
        Objective, dual value, gap and distances.

    Raises:
        ValueError: The distances, weights or coefficients are not what is said above.
    """
    frame = reduce_distances(distances_NN, weights_N)
    coefficients = np.array(coefficients_N, dtype=np.float64)
    if coefficients.shape != frame.owner_M.shape:
        raise ValueError(f"{frame.owner_M.size} points need as many coefficients, not {coefficients.shape}")
    if not (np.isfinite(coefficients).all() and abs(math.fsum(coefficients.tolist()) - 1.0) <= _SUM_SLACK):
        raise ValueError(f"the coefficients must add up to one, not to {math.fsum(coefficients.tolist())}")
    place = locate(frame.squared_NN, frame.gather(coefficients))
    bound = bound_at(frame, place)
    line = line_median(frame) if frame.size > 1 else None
    if line is not None:
        gap = max(0.0, 1.0 - line.lower_bound / bound.objective) + frame.size * UNIT_ROUNDOFF
        bound = replace(bound, relative_gap=min(bound.relative_gap, gap))
    return certificate_of(frame, place.squares_N, bound)


def certificate_of(frame: DistanceFrame, squares_N: Floats, bound: Bound) -> Certificate:
    """Return a bound of the reduced problem in the units and the order of the given one.

    Args:
        frame: The reduced problem.
        squares_N: (N,) float64, scaled squared distances of its points.
        bound: What was proved of it.

    Returns:
        The certificate, which counts what collapsing near-duplicates may have moved.
    """
    gap = bound.relative_gap
    if frame.displacement > 0.0:
        gap = min(1.0, gap + 2.0 * frame.displacement / bound.objective)
    objective = frame.objective(bound.objective)
    return Certificate(
        objective=objective,
        lower_bound=objective * (1.0 - gap),
        relative_gap=gap,
        distances=frame.lengths(squares_N),
    )


def pull_at(frame: DistanceFrame, point: int) -> Pull:
    """Return the pull of the other points on a data point.

    Args:
        frame: The reduced problem.
        point: k.

    Returns:
        ‖R_k‖ and what it was made of.
    """
    row = frame.squared_NN[point]
    roots = np.sqrt(row)
    rates = np.divide(frame.weights_N, roots, out=np.zeros_like(roots), where=roots > 0.0)
    products = local_products(frame.squared_NN, point, rates)
    square = max(0.0, float(rates @ products))
    roundoff = (rates.size + 8) * UNIT_ROUNDOFF
    error = float(rates @ (product_errors(frame.squared_NN, point, rates) + roundoff * np.abs(products)))
    return Pull(
        norm=math.sqrt(square),
        norm_bound=math.sqrt(square + error),
        rates_N=rates,
        objective=math.fsum((frame.weights_N * roots).tolist()),
    )


def vertex_gap(pull_norm: float, own_weight: float, total_weight: float) -> float:
    """Return the relative gap of a data point, exactly 0 if ‖R_k‖ ≤ η_k.

    Args:
        pull_norm: ‖R_k‖, or an upper bound of it.
        own_weight: η_k, the weight at the point.
        total_weight: W.

    Returns:
        The better of two feasible dual points: all scaled down to ‖p_k‖ = η_k, or the excess spread over all points.
    """
    excess = pull_norm - own_weight
    return max(0.0, min(excess / pull_norm, 2.0 * excess / (total_weight + excess))) if excess > 0.0 else 0.0


def bound_at(frame: DistanceFrame, place: Place) -> Bound:
    """Return objective and certified gap of a place of the reduced problem.

    Args:
        frame: The reduced problem.
        place: Any place; one that cannot be told from its nearest data point is judged as that point.

    Returns:
        The bound, in scaled units.
    """
    if frame.size == 1:
        return Bound(objective=0.0, relative_gap=0.0, gradient=0.0)
    own_square, own_error = float(place.squares_N[place.base]), float(place.errors_N[place.base])
    if own_square <= own_error:
        pull = pull_at(frame, place.base)
        own_weight = float(frame.weights_N[place.base])
        gap = vertex_gap(pull.norm_bound, own_weight, frame.total_weight)
        # f grows by no more than W times the distance between the place and the point.
        gap += frame.total_weight * math.sqrt(own_square + own_error) / pull.objective
        excess = max(0.0, pull.norm - own_weight) / frame.total_weight
        return Bound(objective=pull.objective, relative_gap=min(1.0, gap), gradient=excess)
    return _smooth_bound(frame, place)


def _smooth_bound(frame: DistanceFrame, place: Place) -> Bound:
    weights, total = frame.weights_N, frame.total_weight
    roots = np.sqrt(np.maximum(place.squares_N, UNIT_ROUNDOFF**2))
    rates = weights / roots
    rate = math.fsum(rates.tolist())
    objective = math.fsum((weights * roots).tolist())
    slope = rates - rate * place.offsets_N
    slope[place.base] = 0.0
    products = local_products(frame.squared_NN, place.base, slope)
    square = max(0.0, float(slope @ products))
    square_error = float(np.abs(slope) @ product_errors(frame.squared_NN, place.base, slope)) * 2.0
    gradient = math.sqrt(square) / total
    # Rounding of the rates and of the slope, and of the distances in them: each moves s by its share of Σ wᵢ.
    relative_N = place.errors_N / np.maximum(place.squares_N, place.errors_N)
    spread = float(np.abs(place.offsets_N) @ np.sqrt(place.squares_N[place.base] + frame.squared_NN[place.base]))
    allowance = 8.0 * UNIT_ROUNDOFF * (1.0 + rate * spread / total) + float(weights @ relative_N) / total
    epsilon = math.sqrt(square + square_error) / total + allowance
    centre = weights / total - place.offsets_N
    centre[place.base] = 0.0
    inner = float(centre @ products) / objective + (epsilon - gradient)
    gap = (epsilon + max(-epsilon, min(epsilon, inner))) / (1.0 + epsilon)
    if gap > _WORTH_A_CLUSTER:
        gap = min(gap, _cluster_gap(frame, place, rates, epsilon))
    return Bound(objective=objective, relative_gap=min(1.0, gap), gradient=gradient)


def _cluster_gap(frame: DistanceFrame, place: Place, rates_N: Floats, epsilon: float) -> float:
    """Return the gap if only the points nearest to m balance the residual s: almost free, as they are near.

    With R = Σq over the far points, w_C the near weight, ρ = ‖R‖/w_C < 1 and σ = ‖s‖/w_C, the near points' vectors
    (1 − λ)(qᵢ − swᵢ/w_C) − λRwᵢ/w_C add up to −R and are feasible for λ = σ/(1 + σ − ρ).
    """
    roots = np.sqrt(place.squares_N)
    order = np.argsort(roots, kind="stable")
    ratios = roots[order[1:]] / np.maximum(roots[order[:-1]], UNIT_ROUNDOFF)
    near = order[: int(np.argmax(ratios)) + 1]
    far = rates_N.copy()
    far[near] = 0.0
    pull = far - far.sum() * place.offsets_N
    pull[place.base] = 0.0
    square = float(pull @ local_products(frame.squared_NN, place.base, pull))
    error = 2.0 * float(np.abs(pull) @ product_errors(frame.squared_NN, place.base, pull))
    near_weight = float(frame.weights_N[near].sum())
    residual = epsilon * frame.total_weight / near_weight
    # ε covers what rounding may have done to the unit vectors.
    ratio = math.sqrt(max(0.0, square) + error) / near_weight + residual
    if ratio >= 1.0:
        return 1.0
    share = residual / (1.0 + residual - ratio)
    reach = np.sqrt(place.squares_N[near] + place.errors_N[near])
    part = float(frame.weights_N[near] @ reach) / float(frame.weights_N @ roots)
    return (share * (1.0 + ratio) + (1.0 - share) * residual) * part + 16.0 * UNIT_ROUNDOFF
