"""Fisher quotient and gradient matching against exact rational arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.numerics.linear_systems.diagonal import fisher_quotient, gradient_matching
from tests.numerics.linear_systems.cases import matrices, rationals

EPSILON = 2.0**-52
VALUES = st.floats(-1e3, 1e3, width=32)
DIAGONALS = st.one_of(st.just(0.0), st.floats(2.0**-120, 2.0**100, width=32), st.floats(0.0, 1.0, width=32))
WEIGHTS = st.floats(1e-3, 1e3)


@st.composite
def systems(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Points, diagonals and weights of up to four models."""
    count, elements = draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def rows(values: st.SearchStrategy[float]) -> list[torch.Tensor]:
        return [torch.tensor(draw(st.lists(values, min_size=elements, max_size=elements))) for _ in range(count)]

    return rows(VALUES), rows(DIAGONALS), draw(st.lists(WEIGHTS, min_size=count, max_size=count))


def quotient(points: list[Fraction], diagonals: list[Fraction], weights: list[float]) -> Fraction:
    shares = [diagonal * Fraction(weight) for diagonal, weight in zip(diagonals, weights, strict=True)]
    if not any(shares):
        shares = [Fraction(weight) for weight in weights]
    return sum(share * point for share, point in zip(shares, points, strict=True)) / sum(shares)


@settings(max_examples=100, deadline=None)
@given(systems())
def test_the_quotient_is_the_exact_one_and_never_nan(
    system: tuple[list[torch.Tensor], list[torch.Tensor], list[float]],
) -> None:
    points, diagonals, weights = system
    found = fisher_quotient(points, diagonals, weights)
    exact_points, exact_diagonals = [rationals(p) for p in points], [rationals(f) for f in diagonals]
    for element, value in enumerate(found.values_E.tolist()):
        column = [point[element] for point in exact_points]
        exact = quotient(column, [diagonal[element] for diagonal in exact_diagonals], weights)
        assert abs(Fraction(value) - exact) <= 16 * EPSILON * max(abs(point) for point in column)
    assert found.null_directions == sum(not any(column) for column in zip(*exact_diagonals, strict=True))


@settings(max_examples=50, deadline=None)
@given(systems(), st.integers(-60, 60))
def test_a_common_factor_of_all_diagonals_changes_no_bit(
    system: tuple[list[torch.Tensor], list[torch.Tensor], list[float]], exponent: int
) -> None:
    points, diagonals, weights = system
    wide = [diagonal.double() for diagonal in diagonals]
    scaled = [diagonal * 2.0**exponent for diagonal in wide]
    first, second = (fisher_quotient(points, d, weights) for d in (wide, scaled))
    assert torch.equal(first.values_E, second.values_E)
    assert first.null_directions == second.null_directions


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_a_factor_that_rounds_changes_rounding_only(factor: float) -> None:
    points, diagonals = matrices(1, 3, 1, 40), [d.square() for d in matrices(2, 3, 1, 40)]
    plain = fisher_quotient(points, diagonals, [1.0, 2.0, 3.0]).values_E
    scaled = fisher_quotient(points, [d * factor for d in diagonals], [1.0, 2.0, 3.0]).values_E
    assert torch.allclose(plain, scaled, rtol=1e-13, atol=1e-14)


def test_diagonals_whose_products_with_the_weights_leave_the_range_of_float32() -> None:
    points = [torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])]
    small = torch.tensor([1e-45, 3e38])
    assert fisher_quotient(points, [small, small], [1e-12, 1e-12]).values_E.tolist() == [2.0, 2.0]
    assert fisher_quotient(points, [small, small], [1e12, 3e12]).values_E.tolist() == [2.5, 2.5]
    # Nor do those of float64 leave that of float64.
    largest = torch.full((2,), 1.7e308, dtype=torch.float64)
    assert fisher_quotient(points, [largest, largest], [1e12, 3e12]).values_E.tolist() == [2.5, 2.5]
    least, near = torch.full((2,), 5e-324, dtype=torch.float64), [points[0], 1.5 * points[0]]
    assert fisher_quotient(near, [least, least], [1.0, 1.0]).values_E.tolist() == [1.25, 1.25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_equal_models_keep_every_bit(dtype: torch.dtype) -> None:
    point = torch.tensor([0.1, -0.0, 0.0, 3e-5, -7.7], dtype=dtype)
    diagonals = [d.square().flatten() for d in matrices(3, 3, 1, 5)]
    found = fisher_quotient([point] * 3, diagonals, [0.3, 1.7, 1e-9]).values_E.to(dtype)
    assert bytes(found.view(torch.uint8).tolist()) == bytes(point.view(torch.uint8).tolist())
    matched = gradient_matching([point] * 3, diagonals, point, None, [0.3, 1.7, 1.0], sizes_N=[1.0] * 3)
    assert torch.equal(matched.values_E.to(dtype).view(torch.uint8), point.view(torch.uint8))


def test_an_element_that_no_model_feels_is_the_weighted_average() -> None:
    points = [torch.tensor([1.0, 1.0]), torch.tensor([5.0, 5.0])]
    diagonals = [torch.tensor([0.0, 0.0]), torch.tensor([0.0, 2.0])]
    found = fisher_quotient(points, diagonals, [3.0, 1.0])
    assert found.values_E.tolist() == [2.0, 5.0]
    assert found.null_directions == 1
    # λ that holds a normalisation of the diagonals is not the weight of the average.
    assert fisher_quotient(points, diagonals, [300.0, 1.0], [1.0, 1.0]).values_E.tolist() == [3.0, 5.0]


def daheim(
    points: list[Fraction], diagonals: list[Fraction], base: Fraction, anchor: Fraction, weights: list[Fraction]
) -> Fraction:
    """The linear-system form: H̄θ = (1 − Σα) H₀θ₀ + Σ α (H₀ + H)θₜ."""
    terms = list(zip(weights, diagonals, points, strict=True))
    total = anchor + sum(weight * diagonal for weight, diagonal, _ in terms)
    right = (1 - sum(weights)) * anchor * base
    right += sum(weight * (anchor + diagonal) * point for weight, diagonal, point in terms)
    return Fraction(right / total)


@settings(max_examples=80, deadline=None)
@given(systems(), VALUES, st.floats(0.0, 4.0, width=32), st.sampled_from([0.0, 1e-12, 0.5]))
def test_gradient_matching_solves_its_linear_system(
    system: tuple[list[torch.Tensor], list[torch.Tensor], list[float]], base: float, base_diagonal: float, prior: float
) -> None:
    points, diagonals, weights = system
    base_E = torch.full_like(points[0], base)
    found = gradient_matching(
        points,
        diagonals,
        base_E,
        torch.full_like(base_E, base_diagonal),
        weights,
        sizes_N=[3.0] * len(points),
        base_size=5.0,
        prior=prior,
    )
    exact_weights = [Fraction(weight) for weight in weights]
    anchor = 5 * Fraction(base_diagonal) + Fraction(prior)
    for element, value in enumerate(found.values_E.tolist()):
        column = [rationals(point)[element] for point in points]
        hessians = [3 * rationals(diagonal)[element] for diagonal in diagonals]
        if not anchor and not any(hessians):
            steps = (w * (point - Fraction(base)) for w, point in zip(exact_weights, column, strict=True))
            exact = Fraction(base) + sum(steps)
        else:
            exact = daheim(column, hessians, Fraction(base), anchor, exact_weights)
        reach = max(abs(point) + abs(Fraction(base)) for point in column) * max(1, sum(exact_weights))
        assert abs(Fraction(value) - exact) <= 32 * EPSILON * reach


def special(seed: int = 5) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    points, diagonals = matrices(seed, 3, 1, 30), [d.square() for d in matrices(seed + 1, 3, 1, 30)]
    base, anchor = matrices(seed + 2, 2, 1, 30)
    flat = [tensor.flatten() for tensor in (*points, *diagonals, base, anchor.square())]
    return flat[:3], flat[3:6], flat[6], flat[7]


def test_gradient_matching_without_task_hessians_is_task_arithmetic() -> None:
    points, diagonals, base, anchor = special()
    zeros = [torch.zeros_like(d) for d in diagonals]
    found = gradient_matching(points, zeros, base, anchor, [0.3, 0.5, 0.7], sizes_N=[1.0, 2.0, 3.0]).values_E
    expected = base + 0.3 * (points[0] - base) + 0.5 * (points[1] - base) + 0.7 * (points[2] - base)
    assert torch.allclose(found, expected, rtol=1e-15, atol=2e-15)


def test_gradient_matching_without_a_base_hessian_is_the_fisher_quotient() -> None:
    points, diagonals, base, _ = special()
    found = gradient_matching(points, diagonals, base, None, [0.3, 0.5, 0.7], sizes_N=[1.0, 2.0, 3.0]).values_E
    expected = fisher_quotient(points, diagonals, [0.3, 1.0, 2.1]).values_E
    assert torch.allclose(found, expected, rtol=1e-15, atol=4e-15)


def test_gradient_matching_of_one_whole_task_is_that_model() -> None:
    points, diagonals, base, anchor = special()
    found = gradient_matching(points[:1], diagonals[:1], base, anchor, [1.0], sizes_N=[7.0]).values_E
    assert torch.allclose(found, points[0], rtol=1e-15, atol=1e-15)


def test_gradient_matching_with_equal_hessians_is_the_weighted_average() -> None:
    points, diagonals, base, anchor = special()
    weights = [0.25, 0.25, 0.5]
    found = gradient_matching(points, diagonals[:1] * 3, base, anchor, weights, sizes_N=[2.0] * 3).values_E
    assert torch.allclose(found, 0.25 * points[0] + 0.25 * points[1] + 0.5 * points[2], rtol=1e-15, atol=4e-15)


def test_gradient_matching_with_weight_zero_is_the_base() -> None:
    points, diagonals, base, anchor = special()
    found = gradient_matching(points, diagonals, base, anchor, [0.0] * 3, sizes_N=[1.0] * 3)
    assert torch.equal(found.values_E, base)


def test_a_task_is_taken_away_where_a_minimum_is_left_and_refused_elsewhere() -> None:
    one, two = torch.tensor([2.0]), torch.tensor([4.0])
    found = gradient_matching(
        [one], [torch.tensor([1.0])], torch.tensor([1.0]), torch.tensor([3.0]), [-1.0], sizes_N=[1.0]
    )
    assert found.values_E.tolist() == [1.0 - 4.0 / 2.0]
    with pytest.raises(ValueError, match="sum of the diagonals is -1 at element 0"):
        gradient_matching([one], [two], torch.tensor([1.0]), torch.tensor([3.0]), [-1.0], sizes_N=[1.0])


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_diagonal_that_is_none_is_refused(bad: float) -> None:
    point, diagonal = torch.ones(2), torch.tensor([1.0, bad])
    with pytest.raises(ValueError, match="negative or not finite"):
        fisher_quotient([point, point], [point, diagonal], [1.0, 1.0])
    with pytest.raises(ValueError, match="negative or not finite"):
        gradient_matching([point], [point], point, diagonal, [1.0], sizes_N=[1.0])


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        fisher_quotient([torch.ones(2)], [torch.ones(3)], [1.0])
    with pytest.raises(ValueError, match="are no system"):
        fisher_quotient([torch.ones(2)], [torch.ones(2)], [1.0, 2.0])
