"""The accumulators of a system, and the moments that come from the weights alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.numerics.linear_systems.conjugate_gradient import conjugate_gradient
from pipeline.numerics.linear_systems.moments import GramSystem, weight_moment
from tests.numerics.linear_systems.cases import exact_solution, grams, matrices, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 2.0**-52


def gram_system(
    moments: list[torch.Tensor], values: list[torch.Tensor], weights: list[float] | None = None
) -> GramSystem:
    system = GramSystem(*values[0].shape)
    for moment, value, weight in zip(moments, values, weights or [1.0] * len(values), strict=True):
        system.add(moment, value, weight)
    return system


def test_one_system_gives_the_direct_and_the_iterative_solution() -> None:
    moments, values, weights = grams(1, 3, 7, 20), matrices(2, 3, 7, 5), [1.0, 0.5, 4.0]
    system = gram_system(moments, values, weights)
    total = sum((w * m).numpy() for w, m in zip(weights, moments, strict=True))
    rhs = sum((w * m @ v).numpy() for w, m, v in zip(weights, moments, values, strict=True))
    expected = exact_solution(total, rhs)
    assert system.traces == pytest.approx([float(w * m.trace()) for w, m in zip(weights, moments, strict=True)])
    start = torch.zeros(7, 5)
    assert relative_error(system.solve(start).x_IO, expected) < 1e-13
    operator, narrow = system.narrowed()
    found = conjugate_gradient(operator, narrow, start, iterations=50, tolerance=1e-6)
    assert found.converged
    assert relative_error(found.x_IO, expected) < 1e-4
    with pytest.raises(ValueError, match="another matrix"):
        system.add(moments[0], values[0])


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**77])
def test_another_unit_of_all_moments_changes_no_bit(factor: float) -> None:
    moments, values = [m.float() for m in grams(3, 3, 7, 20)], [v.float() for v in matrices(4, 3, 7, 5)]
    start, found = matrices(5, 1, 7, 5)[0].float(), []
    for scale in (1.0, factor):
        system = gram_system([m.double() * scale for m in moments], values)
        direct = system.solve(start)
        operator, rhs = system.narrowed()
        found.append((direct, conjugate_gradient(operator, rhs, start, iterations=5, tolerance=1e-6)))
    assert torch.equal(found[0][0].x_IO, found[1][0].x_IO)
    assert torch.equal(found[0][1].x_IO, found[1][1].x_IO)


def test_models_equal_to_the_reference_give_exactly_zero() -> None:
    moments, zeros = [m.float() for m in grams(6, 3, 7, 3)], torch.zeros(7, 5)
    system = gram_system(moments, [zeros] * 3)
    assert not system.solve(zeros).x_IO.any()
    operator, rhs = system.narrowed()
    found = conjugate_gradient(operator, rhs, zeros, iterations=50, tolerance=1e-5)
    assert (found.iterations, found.converged) == (0, True)
    assert not found.x_IO.any()


def test_a_heavy_weight_gives_its_model_where_it_has_a_say() -> None:
    moments, values = grams(7, 2, 6, 3), matrices(8, 2, 6, 4)
    found = gram_system(moments, values, [1e9, 1.0]).solve(torch.zeros(6, 4), rounding=64 * EXACT).x_IO
    assert relative_error(moments[0] @ found, moments[0] @ values[0]) < 1e-7
    assert relative_error(found, values[0]) > 1e-2


def test_dead_inputs_are_counted() -> None:
    moments, values = grams(9, 2, 6, 20), matrices(10, 2, 6, 4)
    for moment in moments:
        moment[2] = 0.0
        moment[:, 2] = 0.0
    assert gram_system(moments, values).null_directions == 1


def test_what_does_not_belong_to_the_matrix_is_refused() -> None:
    system = GramSystem(3, 2)
    for moment, values in ((torch.eye(2), torch.ones(3, 2)), (torch.eye(3), torch.ones(2, 3))):
        with pytest.raises(ValueError, match="another matrix"):
            system.add(moment, values)
    with pytest.raises(ValueError, match="not finite"):
        system.add(torch.full((3, 3), float("nan")), torch.ones(3, 2))
    assert system.traces == ()


def interference(step: torch.Tensor, deltas: list[torch.Tensor]) -> torch.Tensor:
    """Σ ‖(Δ − Δₜ)Δₜᵀ‖² / ‖Δₜ‖² with Δ stored out × in, from matrices in X layout."""
    return torch.stack([((step - d).T @ d).square().sum() / d.square().sum() for d in deltas]).sum()


def wudi(deltas: list[torch.Tensor]) -> torch.Tensor:
    system = gram_system([weight_moment(d) for d in deltas], deltas)
    return system.solve(torch.zeros_like(deltas[0]), rounding=64 * EXACT).x_IO


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_the_interference_has_no_gradient_at_the_solution(seed: int, models: int, inputs: int, outputs: int) -> None:
    deltas = matrices(seed, models, inputs, outputs)
    step = wudi(deltas).requires_grad_()
    interference(step, deltas).backward()
    gradient = step.grad
    assert gradient is not None
    assert float(gradient.norm()) < 1e-8 * sum(float(d.norm()) for d in deltas)


def test_one_task_vector_is_returned_and_orthogonal_ones_are_added_up() -> None:
    delta = matrices(11, 1, 7, 3)[0]
    assert relative_error(wudi([delta]), delta) < 1e-11
    basis = torch.linalg.qr(matrices(12, 1, 9, 9)[0]).Q
    coordinates = matrices(13, 3, 3, 4)
    # Weights out × in whose rows span three orthogonal spaces of inputs.
    deltas = [basis[:, 3 * t : 3 * t + 3] @ c for t, c in enumerate(coordinates)]
    assert relative_error(wudi(deltas), sum(d.numpy() for d in deltas)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moment_of_a_task_vector_has_trace_one_in_any_unit(dtype: torch.dtype) -> None:
    delta = matrices(14, 1, 5, 8)[0].to(dtype)
    moment = weight_moment(delta)
    wide = delta.double()
    assert relative_error(moment, wide @ wide.T / wide.square().sum()) < 1e-14
    assert float(moment.trace()) == pytest.approx(1.0, rel=1e-14)
    assert torch.equal(weight_moment(delta * 2.0**-100), moment)
    assert torch.equal(weight_moment(wide * 2.0**-700), moment)
    assert not weight_moment(torch.zeros(5, 8)).any()


def test_an_indefinite_sum_is_not_iterated_on() -> None:
    moment, (value,) = torch.diag(torch.tensor([1.0, 2.0, -0.1])), matrices(20, 1, 3, 2)
    turned = torch.linalg.qr(matrices(21, 1, 3, 3)[0]).Q
    with pytest.raises(ValueError, match="below zero"):
        gram_system([turned @ moment.double() @ turned.T], [value]).narrowed()
