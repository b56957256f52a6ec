"""The direct solve against fifty digits, least squares and pseudo-inverses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.numerics.linear_systems.conjugate_gradient import conjugate_gradient
from pipeline.numerics.linear_systems.dense import require_semidefinite, scale_off_diagonals, solve_dense
from tests.numerics.linear_systems.cases import exact_solution, grams, matrices, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 2.0**-52


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 5))
def test_a_regular_system_has_the_solution_of_fifty_digits(seed: int, inputs: int, outputs: int) -> None:
    (moment,), (rhs, start) = grams(seed, 1, inputs, 4 * inputs), matrices(seed + 1, 2, inputs, outputs)
    found = solve_dense(moment, rhs, start)
    assert relative_error(found.x_IO, exact_solution(moment.numpy(), rhs.numpy())) < 1e-12
    assert found.null_directions == 0


def test_each_input_comes_from_the_model_that_uses_it() -> None:
    moment = torch.eye(2)
    x = matrices(1, 2, 2, 3)
    # A₁ = diag(1, 0), A₂ = diag(0, 1).
    rhs = torch.stack([x[0][0], x[1][1]])
    found = solve_dense(moment, rhs, torch.zeros(2, 3)).x_IO
    assert torch.equal(found, rhs)


def test_the_solution_is_least_squares_on_stacked_data() -> None:
    data, x = matrices(2, 3, 9, 5), matrices(3, 3, 5, 7)
    moment = torch.stack([z.T @ z for z in data]).sum(dim=0)
    rhs = torch.stack([z.T @ (z @ values) for z, values in zip(data, x, strict=True)]).sum(dim=0)
    found = solve_dense(moment, rhs, torch.zeros(5, 7)).x_IO
    stacked, targets = torch.cat(data), torch.cat([z @ values for z, values in zip(data, x, strict=True)])
    expected = np.linalg.lstsq(stacked.numpy(), targets.numpy(), rcond=None)[0]
    assert relative_error(found, expected) < 1e-13
    left = torch.stack([z.T @ (z @ (found - values)) for z, values in zip(data, x, strict=True)]).sum(dim=0)
    assert float(left.norm()) < 1e-13 * float(rhs.norm())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.data())
def test_null_directions_keep_the_start(seed: int, inputs: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, inputs - 1))
    (moment,), (start, x) = grams(seed, 1, inputs, rank), matrices(seed + 1, 2, inputs, 4)
    found = solve_dense(moment, moment @ x, start, rounding=64 * EXACT)
    assert found.null_directions == inputs - rank
    inverse = torch.linalg.pinv(moment, rtol=1e-11, hermitian=True)
    expected = start + inverse @ (moment @ (x - start))
    assert relative_error(found.x_IO, expected) < 1e-5  # a random Gram may be near a smaller rank


def test_null_directions_of_inputs_of_unlike_size_are_those_of_the_inputs_themselves() -> None:
    sizes = torch.tensor([1e-3, 1.0, 30.0, 0.1, 1e2], dtype=torch.float64)
    (data,), (start, x) = matrices(4, 1, 3, 5), matrices(5, 2, 5, 2)
    data = data * sizes
    moment = data.T @ data
    found = solve_dense(moment, moment @ x, start, rounding=64 * EXACT)
    assert found.null_directions == 2
    # Orthogonal to the null space: the step lies in the row space of the data.
    step = (found.x_IO - start).numpy()
    rows = np.linalg.qr(data.T.numpy())[0]
    assert np.linalg.norm(step - rows @ (rows.T @ step)) < 1e-9 * np.linalg.norm(step)
    assert relative_error(moment @ found.x_IO, moment @ x) < 1e-9


def test_a_dead_input_keeps_the_start_to_the_last_bit() -> None:
    (data,), (start, x) = matrices(6, 1, 20, 6), matrices(7, 2, 6, 3)
    data[:, 2] = 0.0
    moment = data.T @ data
    found = solve_dense(moment, moment @ x, start)
    assert found.null_directions == 1
    assert torch.equal(found.x_IO[2], start[2])
    kept = [0, 1, 3, 4, 5]
    assert relative_error(found.x_IO[kept], x[kept]) < 1e-12


def test_a_moment_of_zeros_returns_the_start() -> None:
    start = matrices(8, 1, 3, 2)[0]
    found = solve_dense(torch.zeros(3, 3), torch.zeros(3, 2), start)
    assert torch.equal(found.x_IO, start)
    assert found.null_directions == 3


def test_rounding_to_float32_is_not_taken_for_information() -> None:
    """Fewer tokens than inputs: without a threshold the rounding noise would be divided by itself."""
    moments = [gram.float() for gram in grams(9, 2, 24, 6)]
    x = matrices(10, 2, 24, 5)
    total = moments[0].double() + moments[1].double()
    rhs = moments[0].double() @ x[0] + moments[1].double() @ x[1]
    start = (x[0] + x[1]) / 2
    found = solve_dense(total, rhs, start)
    assert found.null_directions == 12
    assert float(found.x_IO.norm()) < 5 * float(start.norm())
    exact = [gram.numpy() for gram in grams(9, 2, 24, 6)]
    right = exact[0] @ x[0].numpy() + exact[1] @ x[1].numpy() - (exact[0] + exact[1]) @ start.numpy()
    expected = start.numpy() + np.linalg.pinv(exact[0] + exact[1], rcond=1e-10, hermitian=True) @ right
    assert relative_error(found.x_IO, expected) < 1e-4


def test_moments_added_up_in_float32_show_their_noise_by_negative_eigenvalues() -> None:
    """Noise far above the rounding of what is stored: half of the null directions come out below zero."""
    moment, (x, noise) = grams(22, 1, 24, 12)[0], (matrices(23, 1, 24, 5)[0], matrices(24, 1, 24, 24)[0])
    noisy = moment + 1e-5 * (noise + noise.T)
    found = solve_dense(noisy, noisy @ x, torch.zeros_like(x))
    assert found.null_directions == 12
    assert relative_error(found.x_IO, torch.linalg.pinv(moment, rtol=1e-9) @ (moment @ x)) < 1e-2


def test_an_input_of_small_activations_is_not_taken_for_a_dead_one() -> None:
    sizes = torch.logspace(-4, 4, 7, dtype=torch.float64)
    (data,), (x,) = matrices(11, 1, 40, 7), matrices(12, 1, 7, 3)
    moment = (data * sizes).T @ (data * sizes)
    found = solve_dense(moment, moment @ x, torch.zeros(7, 3))
    assert found.null_directions == 0
    expected = exact_solution(moment.numpy(), (moment @ x).numpy())
    # Sixteen decades on the diagonal: unscaled, half of the inputs would be below any threshold.
    for row in range(7):
        assert relative_error(found.x_IO[row], expected[row]) < 1e-7


@pytest.mark.parametrize("rank", [20, 4])
def test_a_common_factor_changes_nothing(rank: int) -> None:
    (moment,), (x, start) = grams(13, 1, 6, rank), matrices(14, 2, 6, 4)
    plain = solve_dense(moment, moment @ x, start)
    for factor in (2.0**-80, 2.0**60):
        scaled = solve_dense(moment * factor, (moment @ x) * factor, start)
        assert torch.equal(scaled.x_IO, plain.x_IO)
    for factor in (1e-8, 1e8):
        scaled = solve_dense(moment * factor, (moment @ x) * factor, start)
        assert relative_error(scaled.x_IO, plain.x_IO) < 1e-10
        assert scaled.null_directions == plain.null_directions == 6 - min(rank, 6)


def test_a_start_that_solves_the_system_is_returned_bit_for_bit() -> None:
    moments, x = grams(15, 3, 8, 20), matrices(16, 1, 8, 5)[0]
    rhs = torch.stack([moment @ x for moment in moments]).sum(dim=0)
    assert torch.equal(solve_dense(torch.stack(moments).sum(dim=0), rhs, x).x_IO, x)


def test_conjugate_gradients_from_the_same_start_end_at_the_same_place() -> None:
    (data,), (start, x) = matrices(17, 1, 5, 9), matrices(18, 2, 9, 4)
    data[:, 3] = 0.0
    moment = data.T @ data
    direct = solve_dense(moment, moment @ x, start, rounding=64 * EXACT)
    found = conjugate_gradient(lambda y: moment @ y, moment @ x, start, iterations=100, tolerance=1e-13)
    assert direct.null_directions == 4
    assert found.converged
    assert relative_error(found.x_IO, direct.x_IO) < 1e-10


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.9, 1.0])
def test_off_diagonals_are_scaled_in_place_and_diagonals_kept(factor: float) -> None:
    gram = grams(19, 1, 5, 8)[0].float()
    before = gram.clone()
    assert scale_off_diagonals(gram, factor) is gram
    assert torch.equal(gram.diagonal(), before.diagonal())
    others = ~torch.eye(5, dtype=torch.bool)
    assert torch.equal(gram[others], before[others] * factor)


def test_smaller_off_diagonals_make_a_singular_moment_regular() -> None:
    (moment,), (x, start) = grams(20, 1, 8, 3), matrices(21, 2, 8, 2)
    assert solve_dense(moment, moment @ x, start, rounding=64 * EXACT).null_directions == 5
    damped = scale_off_diagonals(moment.clone(), 0.9)
    found = solve_dense(damped, damped @ x, start)
    assert found.null_directions == 0
    assert relative_error(found.x_IO, x) < 1e-12


def test_what_is_no_system_is_refused() -> None:
    good, square = torch.ones(3, 2), torch.eye(3)
    with pytest.raises(ValueError, match="are no system"):
        solve_dense(torch.eye(2), good, good)
    for index, name in enumerate(("moment", "right-hand side", "start")):
        arguments = [square.clone(), good.clone(), good.clone()]
        arguments[index][0, 0] = float("nan")
        with pytest.raises(ValueError, match=f"the {name} has a value that is not finite"):
            solve_dense(*arguments)
    with pytest.raises(ValueError, match="no diagonal to keep"):
        scale_off_diagonals(good, 0.5)
    with pytest.raises(ValueError, match=r"from 0 to 1, not 1\.5"):
        scale_off_diagonals(square, 1.5)


@pytest.mark.parametrize("unit", [1.0, 1e-30, 1e30])
def test_an_indefinite_moment_is_refused(unit: float) -> None:
    """Its elements fit its diagonal; a solve would give the start where it is weak, and call that null directions."""
    moment, (x,) = grams(25, 1, 6, 30)[0], matrices(26, 1, 6, 3)
    values, vectors = torch.linalg.eigh(moment)
    require_semidefinite(moment * unit)
    require_semidefinite(vectors[:, 3:] * values[3:] @ vectors[:, 3:].T * unit)
    values[0] = -0.1 * values[-1]
    bad = vectors * values @ vectors.T * unit
    for refuse in (lambda: require_semidefinite(bad), lambda: solve_dense(bad, bad @ x, torch.zeros_like(x))):
        with pytest.raises(ValueError, match="below zero"):
            refuse()


def test_nothing_and_a_moment_of_zeros_are_semidefinite() -> None:
    require_semidefinite(torch.zeros(0, 0))
    require_semidefinite(torch.zeros(3, 3))
