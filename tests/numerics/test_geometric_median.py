import itertools
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConvergenceError
from pipeline.numerics.geometric_median import certificate, solve_geometric_median

from .median_cases import (
    BARELY_VERTEX,
    MEAN_ON_POINT,
    TRIANGLE,
    precise_objective,
    precise_optimum,
    random_isometry,
    squared,
)


def solve(points, weights=None, **options):
    return solve_geometric_median(squared(points), np.ones(len(points)) if weights is None else weights, **options)


def mean_of(solution, points):
    return np.asarray(solution.coefficients) @ np.asarray(points, dtype=float)


# --- known answers


@pytest.mark.parametrize("dimension", [2, 3, 50])
def test_triangle(dimension):
    points = random_isometry(np.random.default_rng(dimension), TRIANGLE, dimension)
    solution = solve(points)
    assert solution.coefficients == pytest.approx((0.39841099, 0.26125021, 0.34033881), abs=5e-9)
    sides = [np.linalg.norm(TRIANGLE[i] - TRIANGLE[j]) for i, j in ((0, 1), (1, 2), (0, 2))]
    closed_form = math.sqrt(sum(s * s for s in sides) / 2 + 2 * math.sqrt(3) * 0.4)
    assert solution.objective == pytest.approx(closed_form, rel=1e-14)
    assert solution.objective == pytest.approx(1.677987081611507, rel=1e-14)
    assert solution.optimum == "interior"
    assert solution.unique


def test_a_mean_on_a_data_point_is_left():
    solution = solve(MEAN_ON_POINT)
    assert mean_of(solution, MEAN_ON_POINT) == pytest.approx((1 - 1 / math.sqrt(3), 0), abs=1e-14)
    assert solution.objective == pytest.approx(7 + math.sqrt(3), rel=1e-14)


def test_an_optimal_data_point_is_returned_exactly():
    solution = solve(BARELY_VERTEX)
    assert solution.coefficients == (1.0, 0.0, 0.0, 0.0)
    assert (solution.optimum, solution.relative_gap, solution.unique) == ("vertex", 0.0, True)
    assert solution.lower_bound == solution.objective
    assert solution.distances == pytest.approx((0, 10, math.sqrt(82), math.sqrt(82)))


def test_orthogonal_vectors():
    assert solve(np.eye(20)).coefficients == pytest.approx([1 / 20] * 20, abs=1e-15)
    norms = np.array([1.0, 2, 3, 5, 8])
    solution = solve(np.diag(norms))
    expected = (0.39065821, 0.26755387, 0.17727160, 0.10236614, 0.06215018)
    assert solution.coefficients == pytest.approx(expected, abs=5e-9)
    median = np.linalg.norm(mean_of(solution, np.diag(norms)))
    assert median / np.linalg.norm(norms / 5) == pytest.approx(0.547, abs=5e-4)


def test_quadrilaterals():
    crossing = solve([(0, 0), (4, 2), (1, 3), (3, -2)])
    t = np.linalg.solve([[4, -2], [2, 5]], [1, 3])
    assert mean_of(crossing, [(0, 0), (4, 2), (1, 3), (3, -2)]) == pytest.approx(t[0] * np.array([4, 2]), abs=1e-13)
    inner = solve([(0, 0), (4, 0), (0, 4), (1, 1)])
    assert inner.coefficients == (0, 0, 0, 1)


def test_wide_angle_gives_its_vertex():
    assert solve([(0, 0), (1, 0), (-1, 0.5)]).coefficients == (1, 0, 0)
    right_at_120 = solve([(0, 0), (1, 0), (-0.5, math.sqrt(3) / 2)])
    assert right_at_120.coefficients[0] == pytest.approx(1, abs=1e-14)
    assert right_at_120.relative_gap < 1e-13


def test_centre_of_symmetric_sets():
    half = np.random.default_rng(3).standard_normal((4, 6))
    solution = solve(np.concatenate([half, -half]))
    assert mean_of(solution, np.concatenate([half, -half])) == pytest.approx(np.zeros(6), abs=1e-13)


# --- degenerate cases


def test_one_model():
    solution = solve([(3.0, 4.0)])
    assert (solution.coefficients, solution.objective, solution.relative_gap) == ((1.0,), 0.0, 0.0)
    assert (solution.optimum, solution.unique, solution.distances) == ("single", True, (0.0,))


def test_coinciding_models():
    solution = solve([(3.0, 4.0)] * 3, [1, 2, 5])
    assert solution.coefficients == (0.125, 0.25, 0.625)
    assert (solution.optimum, solution.objective, solution.relative_gap) == ("coincident", 0.0, 0.0)


@pytest.mark.parametrize(("weights", "expected"), [((2, 1), (1, 0)), ((1, 1 + 1e-12), (0, 1))])
def test_two_models_of_unequal_weight(weights, expected):
    solution = solve([(0, 0), (1, 1)], weights)
    assert solution.coefficients == expected
    assert (solution.optimum, solution.unique, solution.relative_gap) == ("vertex", True, 0.0)


def test_two_models_of_equal_weight():
    solution = solve([(0, 0), (1, 0)], [3, 3])
    assert (solution.coefficients, solution.optimum, solution.unique) == ((0.5, 0.5), "segment", False)
    assert (solution.objective, solution.relative_gap, solution.distances) == (3.0, 0.0, (0.5, 0.5))


def test_models_on_a_line():
    line = np.outer([5.0, 0, 1, 9, 20], [1, 2, 2])
    solution = solve(line)
    assert (solution.coefficients, solution.optimum, solution.relative_gap) == ((1, 0, 0, 0, 0), "collinear", 0.0)
    weighted = solve(line, [1, 1, 1, 1, 4.5])
    assert weighted.coefficients == (0, 0, 0, 0, 1)
    tie = solve(line, [0.1, 0.1, 0.1, 0.1, 0.4])
    assert (tie.coefficients, tie.optimum, tie.unique) == ((0, 0, 0, 0.5, 0.5), "segment", False)
    assert tie.objective == pytest.approx(3 * (0.1 * (9.5 + 14.5 + 13.5 + 5.5) + 0.4 * 5.5), rel=1e-14)
    assert tie.relative_gap < 1e-13
    assert certificate(squared(line), [0.1, 0.1, 0.1, 0.1, 0.4], tie.coefficients).relative_gap < 1e-13


def test_duplicates_equal_a_weight_and_share_it():
    rng = np.random.default_rng(11)
    points = rng.standard_normal((5, 9))
    doubled = solve(np.concatenate([points, points[2:3]]), [1, 1, 1, 1, 1, 2])
    weighted = solve(points, [1, 1, 3, 1, 1])
    shared = list(weighted.coefficients)
    assert [*doubled.coefficients[:2], *doubled.coefficients[3:5]] == pytest.approx(shared[:2] + shared[3:], abs=1e-15)
    assert doubled.coefficients[2] == pytest.approx(shared[2] / 3, abs=1e-15)
    assert doubled.coefficients[5] == pytest.approx(shared[2] * 2 / 3, abs=1e-15)
    assert doubled.objective == pytest.approx(weighted.objective, rel=1e-15)


def test_close_neighbours_on_a_line_do_not_blur_the_answer():
    line = np.array([[-1.6], [-1.1], [-0.4], [-0.4 + 1e-14], [0.3], [1.0], [1.2]])
    for weights in ([1, 1, 1, 2, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1.5, 1.5, 2, 1, 1]):
        solution = solve(line, weights)
        assert mean_of(solution, line)[0] == pytest.approx(-0.4, abs=1e-13)
        assert solution.relative_gap < 1e-12


@pytest.mark.parametrize("share", [3.0, 3.5])
def test_half_of_the_weight_decides_however_far_the_rest_is(share):
    rng = np.random.default_rng(5)
    for reach in (1.0, 1e6):
        points = np.concatenate([np.zeros((1, 4)), reach * (rng.standard_normal((3, 4)) + 1)])
        solution = solve(points, [share, 1, 1, 1])
        assert solution.coefficients == (1, 0, 0, 0)
        assert solution.relative_gap == 0.0


def test_a_minority_of_outliers_moves_the_median_little():
    rng = np.random.default_rng(6)
    points = rng.standard_normal((9, 5))
    near = [np.linalg.norm(mean_of(solve(p), p)) for p in (points, np.vstack([points[:7], 1e6 * points[7:]]))]
    assert near[1] < 3 * max(near[0], 1.0)


# --- invariances


def family(seed, count, dimension, kind):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((count, dimension))
    if kind == "outlier":
        points[0] *= 50
    elif kind == "near-collinear":
        points[:, 1:] *= 10.0 ** rng.uniform(-6, -1)
    elif kind == "near-vertex" and min(count, dimension) > 2:
        unit = points[1:] / np.linalg.norm(points[1:], axis=1, keepdims=True)
        pull = unit.sum(0)
        # One more point makes ‖R‖ at the first hardly larger than its weight of one.
        points[0] = 0.0
        unit[-1] = -(pull - unit[-1]) * (1 - 10.0 ** rng.uniform(-12, -2)) / np.linalg.norm(pull - unit[-1])
        points[1:] = unit * rng.uniform(0.5, 2, (count - 1, 1))
    elif kind == "duplicated":
        points[count // 2] = points[0]
    elif kind == "near-duplicates":
        points[1] = points[0] + 10.0 ** rng.uniform(-14, -1) * rng.standard_normal(dimension)
    return points


KINDS = st.sampled_from(["random", "outlier", "near-collinear", "near-vertex", "duplicated", "near-duplicates"])


@pytest.mark.parametrize("scale", [1e-8, 1e8, 1e-100, 1e100, 3e-150])
@pytest.mark.parametrize("kind", ["random", "outlier", "duplicated"])
def test_scaling_changes_no_coefficient(scale, kind):
    points = family(1, 7, 12, kind)
    plain, scaled = solve(points), solve(points * scale)
    assert scaled.coefficients == pytest.approx(plain.coefficients, abs=1e-13)
    assert scaled.objective == pytest.approx(plain.objective * scale, rel=1e-13)
    assert scaled.relative_gap < 1e-12


def test_powers_of_two_change_no_bit_and_neither_does_the_scale_of_the_weights():
    matrix = squared(family(2, 6, 9, "random"))
    plain = solve_geometric_median(matrix, [1, 2, 3, 4, 5, 6])
    assert solve_geometric_median(matrix * 2.0**-200, [1, 2, 3, 4, 5, 6]).coefficients == plain.coefficients
    heavy = solve_geometric_median(matrix, np.arange(1, 7) * 2.0**300)
    assert heavy.coefficients == plain.coefficients
    assert heavy.objective == plain.objective * 2.0**300


def test_a_constant_vector_changes_nothing_but_rounding():
    points = family(3, 6, 9, "random")
    assert solve(points + 100.0).coefficients == pytest.approx(solve(points).coefficients, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 9), KINDS, st.randoms(use_true_random=False))
def test_permuting_models_permutes_every_bit(seed, count, kind, random):
    points = family(seed, count, 6, kind)
    weights = np.random.default_rng(seed).uniform(0.3, 2, count)
    order = random.sample(range(count), count)
    plain = solve(points, weights)
    permuted = solve(points[order], weights[order])
    if kind == "duplicated":
        assert permuted.coefficients == pytest.approx([plain.coefficients[i] for i in order], abs=1e-12)
    else:
        assert list(permuted.coefficients) == [plain.coefficients[i] for i in order]


# --- the certificate against 50 digits


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32), st.integers(3, 7), st.integers(2, 4), KINDS, st.booleans(), st.sampled_from([-8, 0, 8]))
def test_the_reported_gap_covers_the_true_one(seed, count, dimension, kind, weighted, power):
    points = family(seed, count, dimension, kind) * 10.0**power
    weights = np.random.default_rng(seed).uniform(0.3, 2, count) if weighted else np.ones(count)
    solution = solve(points, weights)
    with mpmath.workdps(50):
        value = precise_objective(points, weights, solution.coefficients)
        optimum = precise_optimum(points, weights)
        true_gap = (value - optimum) / value
        # The rounding of D moves the problem itself by 3 units (geomed §7); at a vertex the gap allows for nothing.
        assert true_gap <= solution.relative_gap + 4e-16
        assert solution.lower_bound <= optimum * (1 + mpmath.mpf("1e-15"))
    assert 0 <= solution.relative_gap <= 1e-10
    assert solution.objective == pytest.approx(float(value), rel=1e-14)
    assert min(solution.coefficients) >= 0
    assert math.fsum(solution.coefficients) == pytest.approx(1, abs=4e-16)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6), KINDS, st.sampled_from(["convex", "affine", "corner", "mean"]))
def test_the_certificate_of_any_point_is_honest(seed, count, kind, where):
    rng = np.random.default_rng(seed)
    points, weights = family(seed, max(count, 3), 3, kind), rng.uniform(0.3, 2, max(count, 3))
    shares = {
        "convex": rng.uniform(0, 1, weights.size),
        "affine": rng.uniform(-0.4, 1, weights.size) + 0.5,
        "corner": np.eye(weights.size)[0],
        "mean": np.ones(weights.size),
    }[where]
    coefficients = shares / shares.sum()
    proof = certificate(squared(points), weights, coefficients)
    value = precise_objective(points, weights, coefficients)
    optimum = precise_optimum(points, weights)
    assert float((value - optimum) / value) <= proof.relative_gap + 4e-16
    assert proof.lower_bound <= float(optimum) * (1 + 1e-14)
    assert proof.objective == pytest.approx(float(value), rel=1e-9)
    assert 0 <= proof.relative_gap <= 1


def test_the_bound_is_below_twice_the_gradient():
    points = family(8, 6, 10, "random")
    coefficients = np.full(6, 1 / 6)
    centre = coefficients @ points
    away = points - centre
    distances = np.linalg.norm(away, axis=1)
    epsilon = np.linalg.norm((away / distances[:, None]).sum(0)) / 6
    proof = certificate(squared(points), np.ones(6), coefficients)
    assert 0 < proof.relative_gap <= 2 * epsilon / (1 + epsilon) * (1 + 1e-12)
    assert proof.distances == pytest.approx(distances, rel=1e-13)


# --- sizes, families, refusals


@pytest.mark.parametrize(("count", "dimension"), [(20, 19), (50, 2), (200, 3), (200, 400)])
def test_larger_sets_reach_the_limit_of_rounding(count, dimension):
    points = np.random.default_rng(count).standard_normal((count, dimension))
    solution = solve(points)
    assert solution.relative_gap <= 1e-11
    away = points - mean_of(solution, points)
    pull = (away / np.linalg.norm(away, axis=1, keepdims=True)).sum(0)
    assert np.linalg.norm(pull) / count < 1e-12


def test_a_thousand_models():
    points = np.random.default_rng(0).standard_normal((1000, 8))
    assert solve(points).relative_gap <= 1e-11


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 60), KINDS)
def test_every_family_is_certified(seed, count, dimension, kind):
    points = family(seed, max(count, 3), dimension, kind)
    weights = np.random.default_rng(seed).uniform(0.1, 5, max(count, 3))
    solution = solve(points, weights)
    assert solution.relative_gap <= 1e-10
    objectives = [step.objective for step in solution.history]
    assert all(later <= earlier * (1 + 1e-13) for earlier, later in itertools.pairwise(objectives))


def test_deterministic():
    points = family(9, 12, 30, "outlier")
    assert solve(points) == solve(points)


def test_a_tolerance_below_rounding_is_refused_with_both_numbers():
    with pytest.raises(ConvergenceError, match=r"relative gap is \d\.\d\de-1\d.*tolerance of 1\.00e-18"):
        solve(family(4, 6, 9, "random"), tolerance=1e-18)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0, 1], [1.1, 0]], "differ by direction"),
        ([[0, -1], [-1, 0]], "negative"),
        ([[0, math.nan], [math.nan, 0]], "not finite"),
        ([[0, math.inf], [math.inf, 0]], "not finite"),
        ([[1, 1], [1, 0]], "itself"),
        ([[0, 1]], "square matrix"),
        (np.zeros((0, 0)), "square matrix"),
    ],
)
def test_what_is_no_distance_matrix_is_refused(matrix, message):
    with pytest.raises(ValueError, match=message):
        solve_geometric_median(np.array(matrix, dtype=float), [1.0] * len(matrix))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_weights_must_be_positive(weights):
    with pytest.raises(ValueError, match="weight"):
        solve_geometric_median([[0, 1], [1, 0]], weights)


def test_coefficients_and_tolerance_are_checked():
    with pytest.raises(ValueError, match="add up to one"):
        certificate([[0, 1], [1, 0]], [1, 1], [0.5, 0.6])
    with pytest.raises(ValueError, match="as many coefficients"):
        certificate([[0, 1], [1, 0]], [1, 1], [1.0])
    with pytest.raises(ValueError, match="tolerance"):
        solve_geometric_median([[0, 1], [1, 0]], [1, 1], tolerance=0.0)
