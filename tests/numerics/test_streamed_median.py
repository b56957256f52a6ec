import itertools
import math

import numpy as np
import pytest

from pipeline.errors import ConvergenceError
from pipeline.numerics.geometric_median import solve_geometric_median
from pipeline.numerics.streamed_median import Measured, streamed_median

from .median_cases import BARELY_VERTEX, MEAN_ON_POINT, TRIANGLE, squared


def drive(points, weights, **options):
    """Answer the probes from points held in memory; return the solution and the number of passes."""
    points = np.asarray(points, dtype=np.float64)
    loop, passes, answer = streamed_median(weights, **options), 0, None
    while True:
        try:
            probe = next(loop) if answer is None else loop.send(answer)
        except StopIteration as stop:
            return stop.value, passes
        passes += 1
        rows = probe.coefficients_PN
        assert 1 <= rows.shape[0] <= 4
        assert rows.sum(axis=1) == pytest.approx(np.ones(rows.shape[0]), abs=1e-14)
        places = rows @ points
        away = places - places[0]
        answer = Measured(
            squared_distances_PN=np.square(places[:, None] - points[None]).sum(-1), products_PP=away @ away.T
        )


def both(points, weights=None, **options):
    weights = np.ones(len(points)) if weights is None else weights
    streamed, passes = drive(points, weights, **options)
    return streamed, solve_geometric_median(squared(points), weights), passes


def ordinary(name, count):
    rng = np.random.default_rng(count)
    points = rng.standard_normal((count, 400))
    weights = np.ones(count)
    if name == "outlier":
        points[0] *= 50
    elif name == "weights":
        weights = rng.uniform(0.4, 1.5, count)
    elif name == "duplicated":
        points[2] = points[0]
    elif name == "vertex":
        weights[1] = count
    elif name == "inner":
        points[0] = points[1:].mean(axis=0)
    elif name == "far":
        points += 30.0
    return points, weights


@pytest.mark.parametrize("count", [3, 4, 5, 8, 12])
@pytest.mark.parametrize("name", ["random", "outlier", "weights", "duplicated", "vertex", "inner", "far"])
def test_the_loop_and_the_matrix_agree(name, count):
    streamed, direct, passes = both(*ordinary(name, count))
    assert streamed.coefficients == pytest.approx(direct.coefficients, abs=1e-12)
    assert (streamed.optimum, streamed.unique) == (direct.optimum, direct.unique)
    assert streamed.objective == pytest.approx(direct.objective, rel=1e-13)
    assert streamed.distances == pytest.approx(direct.distances, rel=1e-11, abs=1e-12)
    assert streamed.relative_gap <= 1e-11
    assert passes <= 25


@pytest.mark.parametrize("points", [TRIANGLE, MEAN_ON_POINT, BARELY_VERTEX, np.diag([1.0, 2, 3, 5, 8]), np.eye(20)])
def test_known_sets(points):
    streamed, direct, _ = both(points)
    assert streamed.coefficients == pytest.approx(direct.coefficients, abs=1e-12)
    assert streamed.optimum == direct.optimum
    assert streamed.relative_gap <= 1e-12


def test_an_optimal_point_costs_few_passes_and_has_no_gap():
    streamed, _, passes = both(BARELY_VERTEX)
    assert streamed.coefficients == (1, 0, 0, 0)
    assert streamed.relative_gap == 0.0
    assert passes <= 5


def test_duplicates_at_an_optimal_point_share_by_weight():
    rng = np.random.default_rng(1)
    points = np.vstack([np.zeros((3, 6)), rng.standard_normal((3, 6))])
    streamed, direct, _ = both(points, [1, 2, 1, 1, 1, 1])
    assert streamed.coefficients == direct.coefficients == (0.25, 0.5, 0.25, 0, 0, 0)
    assert streamed.relative_gap == 0.0


def test_one_two_and_coinciding_models():
    single, passes = drive([(1.0, 2.0)], [3.0])
    assert (single.coefficients, single.optimum, passes) == ((1.0,), "single", 0)
    heavier, _ = drive([(1.0, 2.0), (4.0, 6.0)], [1, 2])
    assert (heavier.coefficients, heavier.optimum, heavier.relative_gap) == ((0, 1), "vertex", 0.0)
    assert heavier.distances == (5.0, 0.0)
    midpoint, _ = drive([(1.0, 2.0), (4.0, 6.0)], [1, 1])
    assert (midpoint.coefficients, midpoint.optimum, midpoint.unique) == ((0.5, 0.5), "segment", False)
    assert midpoint.relative_gap < 1e-13
    same, _ = drive([(0.1, 0.3)] * 4, [1, 2, 3, 2])
    assert (same.coefficients, same.optimum, same.objective) == ((0.125, 0.25, 0.375, 0.25), "coincident", 0.0)


@pytest.mark.parametrize(
    "coordinates", [[0, 1, 3, 10], [0, 1, 3, 10, 11], [2, 2, 5, 5], [2, 2, 5], [0, 0, 1, 2, 2, 9], [1, 2, 3, 2]]
)
def test_models_on_a_line(coordinates):
    points = np.outer(coordinates, [1.0, -2.0, 2.0])
    streamed, direct, _ = both(points)
    assert streamed.coefficients == pytest.approx(direct.coefficients, abs=1e-13)
    assert (streamed.optimum, streamed.unique) == (direct.optimum, direct.unique)
    assert streamed.objective == pytest.approx(3 * sum(abs(t - np.median(coordinates)) for t in coordinates))


def test_a_median_close_to_a_point_is_reached_in_few_passes():
    points = [(1.27, -0.28, -0.05), (-0.92, 0.6, -0.2), (1.84, 0.67, 0.83)]
    streamed, direct, passes = both(points, [3.0, 1.0, 3.0])
    assert direct.optimum == streamed.optimum == "interior"
    assert max(direct.coefficients) > 0.98
    assert streamed.coefficients == pytest.approx(direct.coefficients, abs=1e-11)
    assert passes <= 60


def test_the_objective_never_rises_and_the_bound_is_true():
    points, weights = ordinary("outlier", 6)
    streamed, direct, _ = both(points, weights)
    objectives = [step.objective for step in streamed.history]
    assert all(b <= a * (1 + 1e-14) for a, b in itertools.pairwise(objectives))
    for step in streamed.history:
        true_gap = (step.objective - direct.objective) / step.objective
        assert true_gap <= step.relative_gap + 1e-15


def test_deterministic():
    assert drive(*ordinary("weights", 7)) == drive(*ordinary("weights", 7))


def test_without_a_proof_it_names_the_way_out():
    points = np.random.default_rng(0).standard_normal((6, 3)) * [1, 1e-4, 1e-4]
    with pytest.raises(ConvergenceError, match=r"gap is .* after 3 steps.*distances: gram"):
        drive(points, np.ones(6), max_iterations=3)


@pytest.mark.parametrize(
    ("weights", "options"),
    [([], {}), ([1, -1], {}), ([1, math.nan], {}), ([1, 1], {"tolerance": 0}), ([1, 1], {"max_iterations": 0})],
)
def test_senseless_arguments_are_refused_at_once(weights, options):
    with pytest.raises(ValueError, match=r"weights|tolerance|pass"):
        streamed_median(weights, **options)
