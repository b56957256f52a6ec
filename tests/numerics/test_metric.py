from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.numerics.kernels import combine, pairwise_distances
from pipeline.numerics.metric import IndefiniteError, diagonal_metric, gram_metric, images, written_distances

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


def points_of(rng: np.random.Generator, count: int, shape: tuple[int, int], dtype: type) -> list[np.ndarray]:
    base = rng.standard_normal(shape)
    return [(base + 0.05 * rng.standard_normal(shape)).astype(dtype).ravel() for _ in range(count)]


def gram_of(rng: np.random.Generator, size: int, rank: int) -> np.ndarray:
    rows = rng.standard_normal((rank, size)) * rng.uniform(0.1, 10, size)
    return np.asarray(rows.T @ rows / max(1, rank))


def dense(points: list[np.ndarray], moments: np.ndarray) -> np.ndarray:
    """Squared distances by their definition: d C d for the matrix C of the whole flat vector."""
    wide = np.stack([point.astype(np.float64) for point in points])
    return np.array([[(x - y) @ moments @ (x - y) for y in wide] for x in wide])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    columns=st.integers(1, 7),
    count=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    tensors=st.booleans(),
)
def test_distances_are_the_quadratic_form(
    seed: int, rows: int, columns: int, count: int, dtype: type, tensors: bool
) -> None:
    rng = np.random.default_rng(seed)
    points = points_of(rng, count, (rows, columns), dtype)
    diagonal, gram = rng.random(rows * columns).astype(np.float32), gram_of(rng, columns, columns + 2)
    given_points = [torch.from_numpy(p.astype(np.float64)) for p in points] if tensors else points
    for metric, moments in (
        (diagonal_metric(diagonal, "cpu"), np.diag(diagonal.astype(np.float64))),
        (gram_metric(torch.from_numpy(gram.copy())), np.kron(np.eye(rows), gram)),
    ):
        found, unchanged = images(given_points, metric)
        assert all(isinstance(image, torch.Tensor) is tensors for image in found)
        assert unchanged.tolist() == [int((point == points[0]).sum()) for point in points]
        measured = pairwise_distances([np.asarray(image) for image in found]).distances_PP
        wanted = dense(points, moments)
        np.testing.assert_allclose(measured, wanted, rtol=1e-9, atol=1e-12 * wanted.max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_identity_changes_nothing(dtype: type) -> None:
    points = points_of(np.random.default_rng(3), 4, (5, 8), dtype)
    plain = pairwise_distances(points)
    for metric in (
        diagonal_metric(np.ones(40, np.float32), "cpu"),
        gram_metric(torch.eye(8, dtype=torch.float64)),
    ):
        found, unchanged = images(points, metric)
        np.testing.assert_allclose(pairwise_distances(found).distances_PP, plain.distances_PP, rtol=1e-14)
        assert np.array_equal(unchanged, plain.unchanged_P)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.integers(-60, 60))
def test_powers_of_two_scale_exactly(seed: int, power: int) -> None:
    rng = np.random.default_rng(seed)
    points, gram = points_of(rng, 3, (4, 5), np.float32), gram_of(rng, 5, 3)
    tables = []
    for factor in (1.0, 4.0**power):
        metric = gram_metric(torch.from_numpy(gram * factor))
        tables.append(pairwise_distances(images(points, metric)[0]).distances_PP / factor)
    assert np.array_equal(*tables)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(0, 12), single=st.booleans())
def test_singular_grams_are_measured_all_the_same(seed: int, rank: int, single: bool) -> None:
    rng = np.random.default_rng(seed)
    gram = gram_of(rng, 12, rank)
    if single:
        gram = gram.astype(np.float32).astype(np.float64)
    metric = gram_metric(torch.from_numpy(gram.copy()))
    largest = gram.diagonal().max()
    factor = metric.factor_DD.numpy()
    assert metric.shift <= 2.0**-20
    np.testing.assert_allclose(
        factor @ factor.T, gram + metric.shift * largest * np.eye(12), rtol=0, atol=1e-13 * max(largest, 1.0)
    )


def test_what_is_no_gram_is_refused() -> None:
    with pytest.raises(IndefiniteError, match="eigenvalues below"):
        gram_metric(torch.tensor([[1.0, 1.1], [1.1, 1.0]], dtype=torch.float64))
    with pytest.raises(IndefiniteError, match="diagonal is zero"):
        gram_metric(torch.tensor([[0.0, 1.1], [1.1, 0.0]], dtype=torch.float64))
    assert gram_metric(torch.zeros((0, 0), dtype=torch.float64)).factor_DD.shape == (0, 0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), diagonal=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_what_is_written_is_measured_by_the_same_form(seed: int, diagonal: bool, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = 4, 6
    points = points_of(rng, 3, (rows, columns), dtype)
    factors = rng.dirichlet(np.ones(3)) * 1.5 - 0.5 / 3
    written = combine(points, factors.tolist(), np.dtype(dtype)).values_E
    if diagonal:
        weights = rng.random(rows * columns)
        moments, metric = np.diag(weights), diagonal_metric(weights, "cpu")
        squared, rounding = written_distances(written, points, factors.tolist(), metric)
    else:
        gram = gram_of(rng, columns, columns + 2)
        moments = np.kron(np.eye(rows), gram)
        squared, rounding = written_distances(
            written, points, factors.tolist(), gram_metric(torch.from_numpy(gram.copy()))
        )
    np.testing.assert_allclose(squared, dense([written, *points], moments)[0, 1:], rtol=1e-9)
    exact = sum(c * p.astype(np.float64) for c, p in zip(factors, points, strict=True))
    error = written.astype(np.float64) - exact
    assert rounding == pytest.approx(error @ moments @ error, rel=1e-6, abs=1e-25)


def test_a_point_that_is_written_lies_on_itself() -> None:
    points = points_of(np.random.default_rng(1), 3, (4, 6), np.float32)
    metric = diagonal_metric(np.random.default_rng(2).random(24), "cpu")
    squared, rounding = written_distances(points[1], points, [0.0, 1.0, 0.0], metric)
    assert squared[1] == 0.0
    assert rounding == 0.0
    assert squared[0] > 0
