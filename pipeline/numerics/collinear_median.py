"""The geometric median of points on one line: the weighted median of their coordinates.

Owns the test for collinearity and the one-dimensional solution with its gap; must not know the general solver.

Legend: N points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.numerics.distance_frame import UNIT_ROUNDOFF, DistanceFrame, Floats

# Squared height over the line relative to the squared diameter: the accuracy asked of a measured squared distance.
_FLAT = 1e-12
# Weights such as 0.1 + 0.2 and 0.3 are meant to balance; sums of them round in the last bits.
_BALANCE = 8.0 * UNIT_ROUNDOFF
# Coordinates this close relative to the span are one point: they come from differences of measured squares.
_SAME_PLACE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class LineMedian:
    """The weighted median on a line.

    Attributes:
        points: One data point, or the two ends of an interval of optima, whose midpoint is meant.
        squares_N: (N,) float64, squared distances from it.
        objective: Σ wᵢrᵢ.
        lower_bound: The objective less what the points' heights over the line and rounding may explain of it.
        relative_gap: Certified: projecting onto the line lengthens no distance, so the line's optimum is a lower bound.
    """

    points: tuple[int, ...]
    squares_N: Floats
    objective: float
    lower_bound: float
    relative_gap: float

    def coefficients(self, size: int) -> Floats:
        """Return (N,) float64 coefficients: e_k, or one half at both ends of the interval."""
        coefficients = np.zeros(size)
        coefficients[list(self.points)] = 1.0 / len(self.points)
        return coefficients


def weighted_median(coordinates_N: Floats, weights_N: Floats) -> tuple[int, ...]:
    """Return the point, or the two neighbours, between which half the weight is reached.

    Args:
        coordinates_N: (N,) float64.
        weights_N: (N,) float64, positive.

    Returns:
        One index, or two if the cumulative weight hits exactly one half: then all between them is optimal.
    """
    order = [int(index) for index in np.argsort(coordinates_N, kind="stable")]
    total = math.fsum(weights_N.tolist())
    for rank, index in enumerate(order[:-1]):
        below = math.fsum(weights_N[order[: rank + 1]].tolist())
        if abs(below - 0.5 * total) <= _BALANCE * total:
            return index, order[rank + 1]
        if below > 0.5 * total:
            return (index,)
    return (order[-1],)


def line_median(frame: DistanceFrame) -> LineMedian | None:
    """Return the median if the points are collinear to the accuracy of their distances.

    Args:
        frame: The reduced problem, of at least two points.

    Returns:
        The solution with its gap, or None if the points span more than a line.
    """
    squared = frame.squared_NN
    first, last = np.unravel_index(int(np.argmax(squared)), squared.shape)
    diameter_squared = float(squared[first, last])
    # The coordinate along the line from the first of the two most distant points to the last.
    along = (squared[first] + diameter_squared - squared[last]) / (2.0 * math.sqrt(diameter_squared))
    if (squared[first] - along**2).max() > _FLAT * diameter_squared:
        return None
    points = weighted_median(along, frame.weights_N)
    spans = np.abs(along - along[list(points)].mean())
    # Lengths, not squares, which would lose the points close to the median in the rounding of the far ones; by way of
    # the nearer end of an interval, an upper bound that is exact on a line.
    half = 0.5 * math.sqrt(float(squared[points[0], points[-1]]))
    distances = np.sqrt(squared[list(points)].min(axis=0)) + half
    objective = math.fsum((frame.weights_N * distances).tolist())
    gap = 0.0
    if frame.size > 2:
        # Coordinates come from sums of three squares; with two points all is exact.
        rounding = 16.0 * UNIT_ROUNDOFF * frame.total_weight * math.sqrt(diameter_squared)
        extra = np.maximum(distances - spans, 0.0)
        gap = (math.fsum((frame.weights_N * extra).tolist()) + rounding) / objective
    return LineMedian(
        points=points,
        squares_N=distances**2,
        objective=objective,
        lower_bound=objective * (1.0 - gap),
        relative_gap=gap,
    )


def line_coordinates(squared_3N: Floats) -> Floats | None:
    """Return coordinates along the line through all points from their distances to three places on it.

    Args:
        squared_3N: (3, N) float64, squared distances from the weighted mean, from x_0 and from x_1.

    Returns:
        (N,) float64 relative to the mean, or None if the points span more than a line.
    """
    anchor = 0 if squared_3N[0, 0] >= squared_3N[0, 1] else 1
    reach_squared = float(squared_3N[0, anchor])
    if reach_squared == 0.0:
        return None
    along = (squared_3N[0] + reach_squared - squared_3N[1 + anchor]) / (2.0 * math.sqrt(reach_squared))
    heights = squared_3N[0] - along**2
    return along if heights.max() <= _FLAT * squared_3N[0].max() else None


def median_groups(coordinates_N: Floats, weights_N: Floats) -> tuple[tuple[list[int], ...], int]:
    """Return the weighted median on a line when points may coincide.

    Args:
        coordinates_N: (N,) float64.
        weights_N: (N,) float64, positive.

    Returns:
        One group of coinciding points, or the two that bound an interval of optima; and how many groups there are.
    """
    order = np.argsort(coordinates_N, kind="stable")
    gaps = np.diff(coordinates_N[order]) > _SAME_PLACE * np.ptp(coordinates_N)
    groups = [group.tolist() for group in np.split(order, np.flatnonzero(gaps) + 1)]
    middles = np.array([coordinates_N[group].mean() for group in groups])
    totals = np.array([math.fsum(weights_N[group].tolist()) for group in groups])
    return tuple(groups[index] for index in weighted_median(middles, totals)), len(groups)
