"""The iteration: what it minimises, where it stops, and that an interruption leaves no trace."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.numerics.linear_systems.conjugate_gradient import CgSolution, CgState, conjugate_gradient, dot
from tests.numerics.linear_systems.cases import grams, matrices, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def solve(
    moment: torch.Tensor, rhs: torch.Tensor, start: torch.Tensor, iterations: int = 100, tolerance: float = 1e-12
) -> CgSolution:
    return conjugate_gradient(lambda x: moment @ x, rhs, start, iterations=iterations, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8, 0.37])
def test_a_multiple_of_the_identity_is_solved_in_one_step_from_any_start(dtype: torch.dtype, scale: float) -> None:
    moment = scale * torch.eye(6, dtype=dtype)
    x, *starts = (m.to(dtype) for m in matrices(1, 4, 6, 5))
    for start in (*starts, torch.zeros_like(x)):
        found = solve(moment, moment @ x, start, tolerance=1e-5)
        assert found.iterations == 1
        assert found.stopped == "converged"
        assert relative_error(found.x_IO, x) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_many_steps_as_distinct_eigenvalues(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 3.0, 10.0], dtype=dtype).repeat(4)[:, None]
    x, start = (m.to(dtype) for m in matrices(2, 2, 12, 3))
    found = conjugate_gradient(lambda y: values * y, values * x, start, iterations=50, tolerance=1e-5)
    assert found.iterations == 3
    assert relative_error(found.x_IO, x) < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 10), st.integers(1, 4))
def test_energy_and_distance_fall_at_every_step(seed: int, inputs: int, outputs: int) -> None:
    moment = grams(seed, 1, inputs, 2 * inputs)[0] + 0.1 * torch.eye(inputs, dtype=torch.float64)
    x, start = matrices(seed + 1, 2, inputs, outputs)
    rhs, seen = moment @ x, [start]
    conjugate_gradient(
        lambda y: moment @ y,
        rhs,
        start,
        iterations=30,
        tolerance=1e-10,
        save=lambda state: seen.append(state.x_IO.clone()),
    )
    energies = [0.5 * dot(y, moment @ y) - dot(rhs, y) for y in seen]
    distances = [float((y - x).norm()) for y in seen]
    slack = 1e-12 * (abs(energies[0]) + float(x.norm()))
    assert all(after <= before + slack for before, after in pairwise(energies))
    assert all(after <= before + slack for before, after in pairwise(distances))
    assert len(seen) > 1


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_the_iterates_are_those_of_scipy(steps: int) -> None:
    moment, (x, start) = grams(3, 1, 20, 30)[0], matrices(4, 2, 20, 1)
    rhs = moment @ x
    found = solve(moment, rhs, start, iterations=steps)
    expected, _ = scipy.sparse.linalg.cg(moment.numpy(), rhs.numpy()[:, 0], start.numpy()[:, 0], rtol=0, maxiter=steps)
    assert found.iterations == steps
    assert found.stopped == "iterations"
    assert not found.converged
    assert relative_error(found.x_IO[:, 0], expected) < 1e-10
    residual = rhs - moment @ found.x_IO
    expected_residual = float(residual.norm()) / max(float(rhs.norm()), float((rhs - moment @ start).norm()))
    assert found.relative_residual == pytest.approx(expected_residual, rel=1e-12)


def test_a_residual_near_zero_in_absolute_terms_is_no_reason_to_stop() -> None:
    """Moments of 1e-6, as those of well-fitted tasks are: an absolute tolerance would return the start."""
    moment, (x, start) = grams(5, 1, 10, 30)[0].float(), (m.float() for m in matrices(6, 2, 10, 4))
    solutions = [solve(moment * s, (moment * s) @ x, start, tolerance=1e-5) for s in (1.0, 2.0**-26, 2.0**26)]
    assert solutions[0].converged
    assert solutions[0].iterations > 3
    for other in solutions[1:]:
        assert other.iterations == solutions[0].iterations
        assert torch.equal(other.x_IO, solutions[0].x_IO)
    for scale in (1e-8, 1e8):
        other = solve(moment * scale, (moment * scale) @ x, start, tolerance=1e-5)
        assert other.iterations == solutions[0].iterations
        assert relative_error(other.x_IO, solutions[0].x_IO) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_start_that_solves_the_system_keeps_every_bit(dtype: torch.dtype) -> None:
    moments, x = [m.to(dtype) for m in grams(7, 3, 9, 30)], matrices(8, 1, 9, 5)[0].to(dtype)
    rhs = moments[0] @ x + moments[1] @ x + moments[2] @ x
    found = solve(moments[0] + moments[1] + moments[2], rhs, x, tolerance=1e-6)
    assert (found.iterations, found.stopped) == (0, "converged")
    assert torch.equal(found.x_IO, x)
    assert found.x_IO is not x


def test_nothing_to_solve_is_solved() -> None:
    zeros = torch.zeros(3, 2)
    found = solve(torch.eye(3), zeros, zeros)
    assert (found.iterations, found.stopped, found.relative_residual) == (0, "converged", 0.0)
    assert not found.x_IO.any()


def test_no_iterations_return_the_start() -> None:
    moment, (x, start) = grams(9, 1, 4, 9)[0], matrices(10, 2, 4, 2)
    found = solve(moment, moment @ x, start, iterations=0)
    assert torch.equal(found.x_IO, start)
    assert (found.iterations, found.stopped) == (0, "iterations")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("refresh", [3, 20])
def test_a_solve_resumed_from_any_step_has_the_same_bits(dtype: torch.dtype, refresh: int) -> None:
    moment, (x, start) = grams(11, 1, 30, 40)[0].to(dtype), (m.to(dtype) for m in matrices(12, 2, 30, 7))
    rhs, states = moment @ x, []

    def keep(state: CgState) -> None:
        copies = {f.name: getattr(state, f.name).clone() for f in fields(state) if f.name.endswith("_IO")}
        states.append(replace(state, **copies))

    def run(state: CgState | None = None, save: object = None) -> CgSolution:
        return conjugate_gradient(
            lambda y: moment @ y,
            rhs,
            start if state is None else torch.full_like(start, float("nan")),
            iterations=40,
            tolerance=1e-6,
            refresh=refresh,
            state=state,
            save=save,  # type: ignore[arg-type]
        )

    whole = run(save=keep)
    assert [state.iterations for state in states] == list(range(1, whole.iterations + 1))
    assert whole.iterations > 20
    for state in states:
        # As read back from a file: numbers by their text, arrays in memory that is not aligned.
        numbers = {f.name: float(repr(getattr(state, f.name))) for f in fields(state) if f.type in ("float", float)}
        shifted = {f.name: unaligned(getattr(state, f.name)) for f in fields(state) if f.name.endswith("_IO")}
        again = run(replace(state, **numbers, **shifted))
        assert torch.equal(again.x_IO, whole.x_IO)
        assert replace(again, x_IO=whole.x_IO) == whole
        assert all(torch.equal(shifted[name], getattr(state, name)) for name in shifted)  # left as they were


def test_the_residual_is_compared_with_that_of_the_iterate_at_times() -> None:
    moment, (x, start) = grams(20, 1, 30, 40)[0], matrices(21, 2, 30, 2)
    seen: list[torch.Tensor] = []

    def apply(values: torch.Tensor) -> torch.Tensor:
        seen.append(values.clone())
        return moment @ values

    iterates: dict[int, CgState] = {}

    def keep(state: CgState) -> None:
        iterates[state.iterations] = replace(state, x_IO=state.x_IO.clone(), r_IO=state.r_IO.clone())

    rhs = moment @ x
    conjugate_gradient(apply, rhs, start, iterations=10, tolerance=1e-12, refresh=4, save=keep)
    # The first residual, ten steps, two refreshes, the last residual.
    assert len(seen) == 1 + 10 + 2 + 1
    # Of the iterates, those after four and eight steps were looked at.
    assert [any(torch.equal(state.x_IO, values) for values in seen) for state in iterates.values()] == [
        step in (4, 8, 10) for step in iterates
    ]
    for state in iterates.values():
        assert relative_error(state.r_IO, rhs - moment @ state.x_IO) < 1e-6


def unaligned(values: torch.Tensor) -> torch.Tensor:
    """The same values at an odd place of a buffer."""
    array = values.numpy()
    buffer = np.empty(array.nbytes + array.itemsize, dtype=np.uint8)
    view = buffer[array.itemsize :].view(array.dtype).reshape(array.shape)
    view[...] = array
    return torch.from_numpy(view)


def test_what_the_moment_does_not_see_stays_as_it_was() -> None:
    (data,), (x, start) = matrices(13, 1, 30, 8), matrices(14, 2, 8, 3)
    data[:, 5] = 0.0
    moment = (data.T @ data).float()
    found = solve(moment, moment @ x.float(), start.float(), tolerance=1e-6)
    assert found.converged
    assert torch.equal(found.x_IO[5], start[5].float())
    kept = [0, 1, 2, 3, 4, 6, 7]
    assert relative_error(found.x_IO[kept], x[kept]) < 1e-4


@pytest.mark.parametrize("curvature", [0.0, -1.0])
def test_a_residual_outside_of_the_range_ends_the_iteration(curvature: float) -> None:
    moment = torch.diag(torch.tensor([1.0, 2.0, curvature], dtype=torch.float64))
    rhs = torch.tensor([[1.0], [2.0], [1e-3]], dtype=torch.float64)
    if curvature:
        rhs[:2] = 0.0
    found = solve(moment, rhs, torch.zeros_like(rhs))
    assert found.stopped == "null direction"
    assert not found.converged
    assert bool(torch.isfinite(found.x_IO).all())
    assert 0 < found.relative_residual <= 1


def test_a_clearly_negative_curvature_is_refused() -> None:
    moment = torch.diag(torch.tensor([4.0, 2.0, -1.0], dtype=torch.float64))
    rhs = torch.tensor([[4.0], [2.0], [1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="curvature"):
        solve(moment, rhs, torch.zeros_like(rhs))


def test_noise_of_float32_is_not_followed_out_of_range() -> None:
    """A direction whose curvature is below what products of float32 resolve counts as not seen."""
    moment = torch.diag(torch.tensor([1.0, 1e-12]))
    found = solve(moment, torch.tensor([[1.0], [1e-3]]), torch.zeros(2, 1), tolerance=1e-6)
    assert found.stopped == "null direction"
    assert float(found.x_IO.abs().max()) < 2.0


def test_a_tolerance_below_the_rounding_ends_by_itself() -> None:
    moment, (x, start) = grams(15, 1, 10, 40)[0].float(), (m.float() for m in matrices(16, 2, 10, 4))
    found = conjugate_gradient(
        lambda y: moment @ y, moment @ x, start, iterations=10_000, tolerance=1e-12, refresh=10**9
    )
    assert found.stopped == "rounding"
    assert found.iterations < 200
    assert not found.converged
    assert found.relative_residual < 1e-6


def test_the_reported_residual_is_of_the_iterate_itself() -> None:
    moment, (x, start) = grams(17, 1, 40, 45)[0].float(), (m.float() for m in matrices(18, 2, 40, 4))
    rhs = moment @ x
    for tolerance in (1e-3, 1e-5):
        found = solve(moment, rhs, start, iterations=500, tolerance=tolerance)
        true = float((rhs - moment @ found.x_IO).double().norm())
        size = max(float(rhs.double().norm()), float((rhs - moment @ start).double().norm()))
        assert found.converged
        assert found.relative_residual == pytest.approx(true / size, rel=1e-6)
        assert found.relative_residual <= tolerance


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70_000), st.integers(0, 1000))
def test_dot_products_are_those_of_exact_sums(size: int, seed: int) -> None:
    first, second = (m.float().flatten() for m in matrices(seed, 2, 1, size))
    exact = math.fsum((first.double() * second.double()).tolist())
    reach = math.fsum((first.double() * second.double()).abs().tolist())
    assert abs(dot(first, second) - exact) <= 2.0**-45 * reach


def test_dot_products_do_not_depend_on_threads_or_on_where_a_vector_lies() -> None:
    first, second = (m.float() for m in matrices(19, 2, 1500, 1501))
    found = dot(first, second)
    torch.set_num_threads(2)
    assert dot(first, second) == found
    assert dot(unaligned(first), unaligned(second)) == found
    assert dot(torch.full((3,), 1e-45), torch.full((3,), 1e-45)) > 0


def test_what_is_no_system_is_refused() -> None:
    eye, x = torch.eye(3), torch.ones(3, 2)
    for rhs, start in ((x, torch.ones(2, 3)), (x, x.double()), (x.half(), x.half())):
        with pytest.raises(ValueError, match=r"must be alike|float32 or float64"):
            solve(eye, rhs, start)
    with pytest.raises(ValueError, match="not finite"):
        solve(eye * float("nan"), x, 2 * x)
    with pytest.raises(ValueError, match="not finite"):
        solve(eye, x * float("inf"), torch.zeros_like(x))


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("seed", [0, 1])
def test_iterations_beyond_what_the_dtype_resolves_do_no_harm(condition: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 64
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    spectrum = condition ** -torch.linspace(0, 1, size, dtype=torch.float64)
    matrix = ((turn * spectrum) @ turn.T).float()
    matrix = (matrix + matrix.T) / 2
    rhs = matrix @ torch.randn(size, 16, generator=generator)
    exact = torch.linalg.solve(matrix.double(), rhs.double())

    def solved(iterations: int) -> CgSolution:
        return conjugate_gradient(
            lambda x: matrix @ x, rhs, torch.zeros_like(rhs), iterations=iterations, tolerance=1e-7
        )

    def error(found: CgSolution) -> float:
        return float((found.x_IO - exact).norm() / exact.norm())

    some, many = solved(300), solved(3000)
    assert many.stopped == "rounding"
    assert many.relative_residual < 1e-6
    assert error(many) <= 1.01 * error(some)
