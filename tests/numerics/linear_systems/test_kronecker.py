"""Σ A X B against dense Kronecker products, closed forms and other units."""

from collections.abc import Iterator

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.numerics.linear_systems.conjugate_gradient import conjugate_gradient
from pipeline.numerics.linear_systems.dense import solve_dense
from pipeline.numerics.linear_systems.kronecker import KroneckerOperator, Pair
from tests.numerics.linear_systems.cases import (
    exact_solution,
    grams,
    kronecker_matrix,
    matrices,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def regular(seed: int, count: int, size: int) -> list[torch.Tensor]:
    """Gram matrices away from singular, so that iterations end at rounding."""
    return [gram + torch.eye(size, dtype=torch.float64) for gram in grams(seed, count, size, 3 * size)]


def solved(pairs: list[Pair], values: list[torch.Tensor], weights: list[float] | None = None) -> torch.Tensor:
    operator = KroneckerOperator(lambda: pairs, weights)
    rhs = operator.right_hand_side(values)
    found = conjugate_gradient(operator, rhs, torch.zeros_like(rhs), iterations=300, tolerance=1e-15)
    assert found.relative_residual < 1e-14
    return found.x_IO


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 7), st.integers(1, 5))
def test_the_operator_is_the_sum_of_kronecker_products(seed: int, models: int, inputs: int, outputs: int) -> None:
    pairs = list(zip(grams(seed, models, inputs, 3), grams(seed + 1, models, outputs, 3), strict=True))
    x = matrices(seed + 2, 1, inputs, outputs)[0]
    weights = [1.0 + model for model in range(models)]
    operator = KroneckerOperator(lambda: pairs, weights)
    dense = kronecker_matrix([(weight * a, b) for weight, (a, b) in zip(weights, pairs, strict=True)])
    expected = (dense @ x.numpy().reshape(-1)).reshape(inputs, outputs)
    assert relative_error(torch.ldexp(operator(x), torch.tensor(operator.exponent)), expected) < 1e-14
    assert torch.equal(operator.right_hand_side([x] * models), operator(x))
    assert operator.traces == pytest.approx(
        [float(w * a.trace() * b.trace()) for w, (a, b) in zip(weights, pairs, strict=True)], rel=1e-14
    )


def test_the_solution_is_that_of_the_dense_system_to_fourteen_digits() -> None:
    pairs = list(zip(regular(1, 4, 7), regular(2, 4, 5), strict=True))
    values = matrices(3, 4, 7, 5)
    rhs = sum((a @ x @ b).numpy() for (a, b), x in zip(pairs, values, strict=True))
    expected = exact_solution(kronecker_matrix(pairs), np.asarray(rhs).reshape(-1, 1)).reshape(7, 5)
    assert relative_error(solved(pairs, values), expected) < 1e-14


def test_two_models_have_the_closed_form_of_generalised_eigenvectors() -> None:
    left, right, values = regular(4, 2, 7), regular(5, 2, 5), matrices(6, 2, 7, 5)
    a, s = scipy.linalg.eigh(left[1].numpy(), left[0].numpy())
    b, t = scipy.linalg.eigh(right[1].numpy(), right[0].numpy())
    rhs = sum((one @ x @ other).numpy() for one, other, x in zip(left, right, values, strict=True))
    expected = s @ ((s.T @ rhs @ t) / (1 + np.outer(a, b))) @ t.T
    assert relative_error(solved(list(zip(left, right, strict=True)), values), expected) < 2e-14


def test_equal_output_moments_leave_the_regression_mean_and_equal_input_moments_its_mirror_image() -> None:
    left, right, values = regular(7, 3, 7), regular(8, 3, 5), matrices(9, 3, 7, 5)
    rhs = torch.stack([a @ x for a, x in zip(left, values, strict=True)]).sum(dim=0)
    expected = solve_dense(torch.stack(left).sum(dim=0), rhs, torch.zeros(7, 5)).x_IO
    assert relative_error(solved([(a, right[0]) for a in left], values), expected) < 1e-13
    assert relative_error(solved([(a, None) for a in left], values), expected) < 1e-13
    mirrored = torch.stack([b @ x.T for b, x in zip(right, values, strict=True)]).sum(dim=0)
    expected = solve_dense(torch.stack(right).sum(dim=0), mirrored, torch.zeros(5, 7)).x_IO.T
    assert relative_error(solved([(left[0], b) for b in right], values), expected) < 1e-13
    assert relative_error(solved([(None, b) for b in right], values), expected) < 1e-13


def test_scalar_moments_give_the_weighted_mean() -> None:
    values, weights = matrices(10, 3, 4, 6), [1.0, 2.5, 0.5]
    found = solved([(None, None)] * 3, values, weights)
    expected = torch.stack([w * x for w, x in zip(weights, values, strict=True)]).sum(dim=0) / 4.0
    assert relative_error(found, expected) < 1e-15


@pytest.mark.parametrize(("left_factor", "right_factor"), [(2.0**-70, 2.0**-70), (2.0**80, 2.0**20), (2.0**-40, 1.0)])
def test_another_unit_changes_no_bit_in_float32(left_factor: float, right_factor: float) -> None:
    left, right = ([m.float() for m in moments] for moments in (grams(11, 3, 7, 9), grams(12, 3, 5, 9)))
    values = [1e-4 * x.float() for x in matrices(13, 3, 7, 5)]
    plain = KroneckerOperator(lambda: zip(left, right, strict=True), [1.0, 2.0, 3.0])
    scaled_pairs = [(a * left_factor, b * right_factor) for a, b in zip(left, right, strict=True)]
    scaled = KroneckerOperator(lambda: scaled_pairs, [1.0, 2.0, 3.0])
    rhs = plain.right_hand_side(values)
    assert torch.equal(rhs, scaled.right_hand_side(values))
    start = torch.zeros_like(rhs)
    solutions = [conjugate_gradient(o, rhs, start, iterations=50, tolerance=1e-5) for o in (plain, scaled)]
    assert torch.equal(solutions[0].x_IO, solutions[1].x_IO)
    assert solutions[0].iterations == solutions[1].iterations > 3
    assert solutions[0].converged


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_a_factor_that_rounds_keeps_the_number_of_iterations(factor: float) -> None:
    left, right, values = grams(14, 3, 7, 9), grams(15, 3, 5, 9), matrices(16, 3, 7, 5)
    solutions = []
    for scale in (1.0, factor):
        pairs = [((a * scale).float(), b.float()) for a, b in zip(left, right, strict=True)]
        operator = KroneckerOperator(lambda pairs=pairs: pairs)
        rhs = operator.right_hand_side([x.float() for x in values])
        solutions.append(conjugate_gradient(operator, rhs, torch.zeros_like(rhs), iterations=50, tolerance=1e-5))
    assert solutions[0].iterations == solutions[1].iterations
    assert relative_error(solutions[1].x_IO, solutions[0].x_IO) < 1e-4


def test_moments_are_read_once_to_begin_with_and_once_a_product() -> None:
    left, right = grams(17, 3, 4, 9), grams(18, 3, 6, 9)
    reads = []

    def streamed() -> Iterator[Pair]:
        for model, (a, b) in enumerate(zip(left, right, strict=True)):
            reads.append(model)
            yield a.clone(), b.clone()

    before = [moment.clone() for moment in (*left, *right)]
    operator, resident = KroneckerOperator(streamed), KroneckerOperator(lambda: zip(left, right, strict=True))
    assert reads == [0, 1, 2]
    x = matrices(19, 1, 4, 6)[0]
    kept = x.clone()
    assert torch.equal(operator(x), resident(x))
    assert reads == [0, 1, 2] * 2
    assert torch.equal(x, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, (*left, *right), strict=True))


def test_elements_that_no_moment_sees_are_counted_and_keep_the_start() -> None:
    left, right, values = grams(20, 2, 5, 9), grams(21, 2, 4, 9), matrices(22, 2, 5, 4)
    for moment, dead in ((left[0], 1), (left[1], 1), (left[0], 3), (right[1], 2)):
        moment[dead] = 0.0
        moment[:, dead] = 0.0
    operator = KroneckerOperator(lambda: zip(left, right, strict=True))
    # Input 1 is dead in both; input 3 in the first model, where the second has no output 2.
    assert operator.null_directions(5, 4) == 4 + 1
    rhs = operator.right_hand_side(values)
    start = matrices(23, 1, 5, 4)[0]
    found = conjugate_gradient(operator, rhs, start, iterations=100, tolerance=1e-12)
    assert found.converged
    assert torch.equal(found.x_IO[1], start[1])
    assert torch.equal(found.x_IO[3, 2], start[3, 2])
    assert KroneckerOperator(lambda: [(None, None)]).null_directions(5, 4) == 0


def test_a_model_whose_moments_are_zero_has_no_say() -> None:
    left, right, values = regular(24, 2, 4), regular(25, 2, 3), matrices(26, 2, 4, 3)
    both = solved([(left[0], right[0]), (left[1], torch.zeros(3, 3))], values)
    assert relative_error(both, values[0]) < 1e-14
    operator = KroneckerOperator(lambda: [(torch.zeros(4, 4), None)])
    assert not operator(values[0]).any()
    assert operator.null_directions(4, 3) == 12


def test_what_is_no_system_is_refused() -> None:
    eye, x = torch.eye(3), torch.ones(3, 2)
    operator = KroneckerOperator(lambda: [(eye, None), (eye, None)])
    for values, message in (([], "0 matrices for 2"), ([x], "1 matrices for 2"), ([x] * 3, "more than 2 matrices")):
        with pytest.raises(ValueError, match=message):
            operator.right_hand_side(values)
    for weights in ([1.0], [1.0] * 3):
        with pytest.raises(ValueError, match=f"{len(weights)} weights for 2 pairs"):
            KroneckerOperator(lambda: [(eye, None), (eye, None)], weights)
    off = eye.clone()
    off[0, 1] = float("inf")
    for moment, message in (
        (off, "not finite: model 1"),
        (-eye, "negative value on its diagonal: model 1"),
        (eye * 2.0**-120, r"beyond 2\^±90: model 1"),
    ):
        with pytest.raises(ValueError, match=message):
            KroneckerOperator(lambda moment=moment: [(eye, None), (eye, moment)])


def test_an_indefinite_pair_is_refused_and_its_model_named() -> None:
    good, bad = torch.eye(3), torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, -0.9], [0.9, -0.9, 1.0]])
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="below zero: model 1"):
            KroneckerOperator(lambda pair=pair: ((good, good), pair))  # type: ignore[misc]
