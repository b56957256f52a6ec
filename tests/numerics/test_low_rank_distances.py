"""Distances of low-rank updates on their factors, against dense float64 and fifty digits."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.numerics.low_rank import factors
from pipeline.numerics.low_rank.distances import distances_to, pairwise_low_rank
from pipeline.numerics.low_rank.factors import LowRank
from tests.numerics.low_rank_cases import (
    DTYPES,
    assert_close,
    dense_squares,
    exact_square,
    families,
    family,
    update,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def moved(first: LowRank, size: float, seed: int = 1) -> LowRank:
    """The same update with both factors moved by a share."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        factor.double() * (1 + size * torch.randn(factor.shape, generator=generator, dtype=torch.float64))
        for factor in (first.left_MR, first.right_RK)
    )
    return LowRank(left_MR=left, right_RK=right, scale=first.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [
        (64, 48, [4, 8, 8, None, 1, 3]),
        (300, 40, [16] * 6),
        (7, 5, [9, 12, 2, None]),  # more columns than the matrix has dimensions
        (50, 1, [1, 1, None, 1]),  # a bias
        (1, 50, [2, 1, 3]),
        (33, 17, [None, 4]),
        (33, 17, [4]),
    ],
)
def test_distances_of_every_type_and_shape(
    dtype: torch.dtype, rows: int, columns: int, ranks: list[int | None]
) -> None:
    updates = family(rows, rows, columns, ranks, dtype)
    found = pairwise_low_rank(updates)
    assert_close(found, dense_squares(updates, rows, columns))
    assert np.array_equal(found, found.T)
    assert not np.diagonal(found).any()


def test_ranks_and_lengths_beyond_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates that lie across panels, with zero ones at their edges, and matrices longer than one."""
    updates = family(3, 90, 70, [20, None, 12, None, 50, 1, 8, 40])
    wanted = dense_squares(updates, 90, 70)
    whole = pairwise_low_rank(updates)
    for ranks, length in ((5, 1000), (32, 33), (131, 16)):
        monkeypatch.setattr(factors, "PANEL_RANKS", ranks)
        monkeypatch.setattr(factors.spans, "__defaults__", (length,))
        found = pairwise_low_rank(updates)
        assert_close(found, wanted)
        assert_close(found, whole, 1e-13)
        assert_close(distances_to(updates[0], updates)[1:], wanted[0, 1:])


def test_panels_of_the_real_size() -> None:
    updates = family(4, 40, factors.PANEL_LENGTH + 9, [factors.PANEL_RANKS - 3, 7, factors.PANEL_RANKS + 100])
    assert_close(pairwise_low_rank(updates), dense_squares(updates, 40, factors.PANEL_LENGTH + 9))


@settings(max_examples=150, deadline=None)
@given(families())
def test_distances_of_any_family(updates: list[LowRank | None]) -> None:
    first = next(update for update in updates if update is not None)
    rows, columns = first.left_MR.shape[0], first.right_RK.shape[1]
    wanted = dense_squares(updates, rows, columns)
    # Tiny matrices make near-duplicates by chance, of which the dense oracle itself is not sure.
    slack = 1e-14 * wanted.max()
    found = pairwise_low_rank(updates)
    assert bool((np.abs(found - wanted) <= 1e-11 * wanted + slack).all())
    for p, written in enumerate(updates):
        if written is not None:
            assert bool((np.abs(distances_to(written, updates) - wanted[p]) <= 1e-11 * wanted[p] + slack).all())


@settings(max_examples=50, deadline=None)
@given(families(), st.randoms(use_true_random=False), st.integers(-20, 20))
def test_order_and_powers_of_two_do_not_matter(updates: list[LowRank | None], random: object, power: int) -> None:
    found = pairwise_low_rank(updates)
    order = list(range(len(updates)))
    random.shuffle(order)  # type: ignore[attr-defined]
    permuted = pairwise_low_rank([updates[p] for p in order])
    assert_close(permuted, found[np.ix_(order, order)], 1e-9)
    scaled = [
        None if u is None else LowRank(left_MR=u.left_MR, right_RK=u.right_RK, scale=u.scale * 2.0**power)
        for u in updates
    ]
    assert np.array_equal(pairwise_low_rank(scaled), found * 4.0**power)


def test_updates_that_are_all_zero() -> None:
    assert not pairwise_low_rank([None, None, None]).any()
    assert pairwise_low_rank([]).shape == (0, 0)
    generator = torch.Generator().manual_seed(1)
    nothing = update(generator, 6, 5, 2, scale=0.0)
    something = update(generator, 6, 5, 2)
    found = pairwise_low_rank([nothing, something, None, nothing])
    assert found[0, 2] == found[0, 3] == 0.0
    assert_close(found, dense_squares([nothing, something, None, nothing], 6, 5))


def test_equal_updates_are_at_distance_zero() -> None:
    updates = family(5, 60, 40, [8, 8, 3])
    again = [*updates, *updates, None, None]
    found = pairwise_low_rank(again)
    for first, second in ((0, 3), (1, 4), (2, 5), (6, 7)):
        assert found[first, second] == 0.0
    assert_close(found, dense_squares(again, 60, 40))
    assert distances_to(updates[1], again)[[1, 4]].tolist() == [0.0, 0.0]


def test_equal_updates_that_cancel_within_themselves_are_at_distance_zero() -> None:
    first = opposed(1e-7)
    assert pairwise_low_rank([first, first, None])[0, 1] == 0.0


@pytest.mark.parametrize("size", [0.3, 0.1, 3e-2, 1e-3, 1e-5, 1e-7, 1e-9, 1e-11])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_factors_near_each_other_keep_their_digits(size: float, scale: float) -> None:
    """G_ii + G_jj − 2 G_ij is 0 where the updates are 1e-9 apart."""
    generator = torch.Generator().manual_seed(7)
    first = update(generator, 14, 11, 3, scale=scale)
    second = moved(first, size)
    wanted = exact_square(first, second)
    assert pairwise_low_rank([first, second])[0, 1] == pytest.approx(wanted, rel=1e-12)
    assert distances_to(first, [None, second])[1] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
def test_near_duplicates_of_unlike_rank(size: float) -> None:
    generator = torch.Generator().manual_seed(8)
    first = update(generator, 12, 9, 3)
    extra = update(generator, 12, 9, 1, scale=size)
    second = LowRank(
        left_MR=torch.cat([first.left_MR, size * extra.left_MR], dim=1),
        right_RK=torch.cat([first.right_RK, extra.right_RK]),
        scale=1.0,
    )
    wanted = exact_square(first, second)
    found = pairwise_low_rank([first, second, first])
    assert found[0, 1] == found[1, 0] == pytest.approx(wanted, rel=1e-12)
    assert found[1, 2] == pytest.approx(wanted, rel=1e-12)
    assert found[0, 2] == 0.0


@pytest.mark.parametrize(("size", "relative"), [(1e-2, 1e-12), (1e-4, 1e-10), (1e-6, 1e-8), (1e-9, 3e-6)])
def test_equal_products_of_unlike_factors(size: float, relative: float) -> None:
    """(U T)(T⁻¹ V) is U V: no difference of factors is small, and the factors' own rounding remains."""
    generator = torch.Generator().manual_seed(9)
    first = update(generator, 14, 11, 3)
    near = moved(first, size)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q * 3.0
    second = LowRank(left_MR=near.left_MR @ turn, right_RK=torch.linalg.inv(turn) @ near.right_RK, scale=1.0)
    wanted = exact_square(first, second)
    assert pairwise_low_rank([first, second])[0, 1] == pytest.approx(wanted, rel=relative)
    assert distances_to(second, [first])[0] == pytest.approx(wanted, rel=relative)


def test_near_duplicates_of_unlike_scale() -> None:
    generator = torch.Generator().manual_seed(10)
    first = update(generator, 14, 11, 3, scale=2.0)
    near = moved(first, 1e-6)
    # Powers of two do not round: the same update written with another scale is as near.
    second = LowRank(left_MR=near.left_MR * 4, right_RK=near.right_RK, scale=0.5)
    assert pairwise_low_rank([first, second])[0, 1] == pytest.approx(exact_square(first, second), rel=1e-12)
    third = LowRank(left_MR=near.left_MR * 3, right_RK=near.right_RK, scale=2.0 / 3.0)
    assert pairwise_low_rank([first, third])[0, 1] == pytest.approx(exact_square(first, third), rel=1e-8)


def opposed(size: float) -> LowRank:
    """[b, −b]·[a; a + size·e]: its own columns cancel but for a share."""
    generator = torch.Generator().manual_seed(11)
    left, right, small = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (13, 10, 10))
    return LowRank(
        left_MR=torch.stack([left, -left], dim=1), right_RK=torch.stack([right, right + size * small]), scale=1.5
    )


@pytest.mark.parametrize(("size", "relative"), [(0.3, 1e-12), (1e-2, 1e-12), (1e-4, 1e-11), (1e-6, 1e-9), (1e-8, 1e-7)])
def test_an_update_whose_own_columns_cancel(size: float, relative: float) -> None:
    first = opposed(size)
    generator = torch.Generator().manual_seed(12)
    second = update(generator, 13, 10, 2)
    little = update(generator, 13, 10, 2, scale=size)
    nothing = LowRank(left_MR=first.left_MR[:, :1], right_RK=first.right_RK[:1], scale=0.0)
    found = pairwise_low_rank([first, second, little, None])
    for index, other in enumerate((second, little, nothing), start=1):
        wanted = exact_square(first, other)
        assert found[0, index] == pytest.approx(wanted, rel=relative)
        assert distances_to(first, [None if other is nothing else other])[0] == pytest.approx(wanted, rel=relative)


def test_how_the_factors_lie_in_memory_does_not_show() -> None:
    updates = family(13, 40, 30, [5, 9, 5], torch.bfloat16)
    turned = [
        LowRank(left_MR=u.left_MR.T.contiguous().T, right_RK=u.right_RK.T.contiguous().T, scale=u.scale)
        for u in updates
        if u is not None
    ]
    assert not turned[0].left_MR.is_contiguous()
    assert np.array_equal(pairwise_low_rank(updates), pairwise_low_rank(turned))
    assert np.array_equal(distances_to(turned[1], updates), distances_to(updates[1], turned))


def test_the_bits_are_the_same_in_every_thread_and_every_call() -> None:
    updates = family(14, 200, 150, [16] * 10, torch.float32)
    updates.append(moved(updates[0], 1e-6))

    def work(_: int) -> tuple[bytes, bytes]:
        return pairwise_low_rank(updates).tobytes(), distances_to(updates[3], updates).tobytes()

    alone = work(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(result == alone for result in pool.map(work, range(8)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_own_row_only(bad: float) -> None:
    updates = family(15, 30, 20, [4, 4, 4, None])
    broken = LowRank(left_MR=updates[1].left_MR.clone(), right_RK=updates[1].right_RK, scale=1.0)
    broken.left_MR[7, 2] = bad
    found = pairwise_low_rank([updates[0], broken, *updates[2:]])
    assert not np.isfinite(found[1, [0, 2, 3]]).any()
    keep = [0, 2, 3]
    assert_close(found[np.ix_(keep, keep)], dense_squares([updates[0], *updates[2:]], 30, 20))
    row = distances_to(updates[0], [broken, *updates[2:]])
    assert not np.isfinite(row[0])
    assert np.isfinite(row[1:]).all()


def test_an_overflow_of_float64_is_not_finite_and_no_warning() -> None:
    large = LowRank(left_MR=torch.full((2, 1), 1e200, dtype=torch.float64), right_RK=torch.ones(1, 2), scale=1.0)
    assert not np.isfinite(pairwise_low_rank([None, large])[0, 1])
    assert not np.isfinite(distances_to(large, [None])[0])


def test_factors_that_fit_no_common_matrix_are_refused() -> None:
    first, second = family(16, 5, 4, [2])[0], family(17, 4, 5, [2])[0]
    with pytest.raises(ValueError, match="do not fit a 5 × 4 matrix"):
        pairwise_low_rank([first, None, second])
