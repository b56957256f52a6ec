"""Point sets with known medians, and the arbitrary-precision oracle of the median tests."""

from __future__ import annotations

import mpmath
import numpy as np

TRIANGLE = np.array([(0.0, 0.0), (1.0, 0.0), (0.3, 0.8)])
# The weighted mean is a data point that is not optimal.
MEAN_ON_POINT = np.array([(0.0, 0.0), (-4.0, 0.0), (1.0, 1.0), (1.0, -1.0), (2.0, 0.0)])
# The first point is optimal by a hair: ‖R‖ = 0.98777.
BARELY_VERTEX = np.array([(0.0, 0.0), (10.0, 0.0), (-9.0, 1.0), (-9.0, -1.0)])


def squared(points_ND) -> np.ndarray:
    """Return (N, N) squared distances by direct differences."""
    points = np.asarray(points_ND, dtype=np.float64)
    return np.square(points[:, None] - points[None]).sum(-1)


def random_isometry(rng, points_ND, dimension: int) -> np.ndarray:
    """Return the points in more dimensions, rotated and shifted."""
    basis, _ = np.linalg.qr(rng.standard_normal((dimension, np.shape(points_ND)[1])))
    return points_ND @ basis.T + rng.standard_normal(dimension)


def precise_objective(points_ND, weights_N, coefficients_N) -> mpmath.mpf:
    """Return f at Σcx/Σc for float64 inputs taken as exact, with 50 digits."""
    with mpmath.workdps(50):
        points = [[mpmath.mpf(float(v)) for v in row] for row in points_ND]
        shares = [mpmath.mpf(float(c)) for c in coefficients_N]
        return _objective(points, weights_N, _mean(points, shares))


def precise_optimum(points_ND, weights_N) -> mpmath.mpf:
    """Return f* with 50 digits: the lowest data point if optimal, else Newton in coordinates from a step below it."""
    with mpmath.workdps(50):
        points = [[mpmath.mpf(float(v)) for v in row] for row in points_ND]
        weights = [mpmath.mpf(float(w)) for w in weights_N]
        lowest, index = min((_objective(points, weights, point), index) for index, point in enumerate(points))
        place = _step_from_point(points, weights, index)
        if place is None:
            return lowest
        value = _objective(points, weights, place)
        for _ in range(80):
            step, slope = _newton_step(points, weights, place)
            scale = mpmath.mpf(1)
            while scale > mpmath.mpf(10) ** -40:
                trial = [p + scale * s for p, s in zip(place, step, strict=True)]
                trial_value = _objective(points, weights, trial)
                if trial_value <= value - scale * slope / 10000:
                    break
                scale /= 2
            else:
                break
            place, value = trial, trial_value
            if slope <= value * mpmath.mpf(10) ** -45:
                break
        return min(value, lowest)


def _step_from_point(points, weights, index):
    """Return the Vardi-Zhang step from a data point, None if the point is optimal."""
    here = points[index]
    away = [mpmath.sqrt(mpmath.fsum((a - b) ** 2 for a, b in zip(x, here, strict=True))) for x in points]
    rates = [w / r if r > 0 else mpmath.mpf(0) for w, r in zip(weights, away, strict=True)]
    own = mpmath.fsum(w for w, r in zip(weights, away, strict=True) if r == 0)
    if not any(rates):
        return None
    others = _mean(points, rates)
    pull = mpmath.fsum(rates) * mpmath.sqrt(mpmath.fsum((a - b) ** 2 for a, b in zip(others, here, strict=True)))
    if pull <= own:
        return None
    return [(1 - own / pull) * a + own / pull * b for a, b in zip(others, here, strict=True)]


def _mean(points, shares):
    total = mpmath.fsum(shares)
    columns = zip(*points, strict=True)
    return [mpmath.fsum(s * v for s, v in zip(shares, column, strict=True)) / total for column in columns]


def _objective(points, weights, place):
    return mpmath.fsum(
        w * mpmath.sqrt(mpmath.fsum((a - b) ** 2 for a, b in zip(x, place, strict=True)))
        for w, x in zip(weights, points, strict=True)
    )


def _newton_step(points, weights, place):
    size = len(place)
    hessian, pull = mpmath.zeros(size), mpmath.zeros(size, 1)
    for w, x in zip(weights, points, strict=True):
        away = [a - b for a, b in zip(x, place, strict=True)]
        r = mpmath.sqrt(mpmath.fsum(v * v for v in away))
        for i in range(size):
            pull[i] += w * away[i] / r
            hessian[i, i] += w / r
            for j in range(size):
                hessian[i, j] -= w * away[i] * away[j] / r**3
    # A flat direction across the points' own plane has curvature too: the matrix is regular unless all are on a line.
    step = mpmath.lu_solve(hessian, pull)
    return list(step), mpmath.fsum(step[i] * pull[i] for i in range(size))
