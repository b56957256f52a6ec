import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.numerics.exact_sum import LIMBS, ExactSum, exact_column_sums

FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


def exact_total(values) -> float:
    return float(sum((Fraction(v) for v in values), Fraction(0)))


@settings(max_examples=150, deadline=None)
@given(st.lists(FINITE, max_size=30), st.randoms(use_true_random=False))
def test_total_is_the_rounded_exact_sum_in_any_order(values, random):
    shuffled = random.sample(values, len(values))
    total = ExactSum(1)
    for value in shuffled:
        total.add([value])
    assert total.total()[0] == exact_total(values) == math.fsum(values)


@settings(max_examples=100, deadline=None)
@given(st.lists(FINITE, max_size=20), st.integers(0, 20))
def test_adding_limbs_is_adding_sums(values, cut):
    left, right, whole = ExactSum(1), ExactSum(1), ExactSum(1)
    left.add(np.array(values[:cut]).reshape(-1, 1))
    right.add(np.array(values[cut:]).reshape(-1, 1))
    whole.add(np.array(values).reshape(-1, 1))
    reduced = ExactSum.from_limbs(left.to_limbs() + right.to_limbs())
    assert np.array_equal(reduced.to_limbs(), whole.to_limbs())
    left.merge(right)
    assert np.array_equal(left.to_limbs(), whole.to_limbs())
    assert left.total()[0] == exact_total(values)


@pytest.mark.parametrize(
    "values",
    [
        [1e16, 1.0, -1e16],
        [5e-324] * 3,
        [2.2250738585072014e-308, -5e-324],
        [1.7976931348623157e308, -1.7976931348623157e308, 5e-324],
        [1.0, 2.0**-53],
        [1.0, 2.0**-53, 2.0**-1074],
        [-1.0, -(2.0**-53), -(2.0**-1074)],
        [0.0, -0.0],
        [],
    ],
)
def test_edges_of_the_format(values):
    total = ExactSum(1)
    total.add(np.array(values).reshape(-1, 1))
    assert total.total()[0] == exact_total(values)


def test_no_overflow_of_the_largest_all_reduce():
    one = ExactSum(2)
    one.add([1.5, -1.7976931348623157e308])
    count = 2**20
    summed = one.to_limbs() * count
    reduced = ExactSum.from_limbs(summed)
    reduced.merge(ExactSum.from_limbs(-(one.to_limbs() * (count - 1))))
    assert reduced.total().tolist() == [1.5, -1.7976931348623157e308]
    assert np.abs(one.to_limbs()).max() < 2**32


def test_many_columns_and_rows_agree_with_fsum():
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((400, 50)) * 2.0 ** rng.integers(-1000, 900, (400, 50))
    expected = [math.fsum(column) for column in rows.T]
    total = ExactSum(50)
    total.add(rows[:123])
    for row in rows[123:]:
        total.add(row)
    assert total.to_limbs().shape == (50, LIMBS)
    assert total.total().tolist() == expected
    assert exact_column_sums(rows[::-1]).tolist() == expected


@pytest.mark.parametrize("columns", [255, 257, 1 << 14, (1 << 14) + 3])
def test_sums_of_many_columns_are_those_of_fsum(columns):
    """Few columns, many, and more than are added at a time; as one array and as a list of rows."""
    rng = np.random.default_rng(columns)
    rows = rng.standard_normal((5, columns)) * 2.0 ** rng.integers(-40, 40, (5, columns))
    rows[1, ::3] = 0.0
    rows[4, ::2] = -rows[3, ::2]
    expected = [math.fsum(column) for column in rows.T]
    assert exact_column_sums(rows).tolist() == expected
    assert exact_column_sums(list(rows)).tolist() == expected
    total = ExactSum(columns)
    total.add(list(rows[:2]))
    total.add(rows[2:])
    assert total.total().tolist() == expected
    assert len(total) == columns


def test_one_row_is_its_own_sum_without_the_sign_of_a_zero():
    row = np.array([-0.0, 5e-324, -1.5])
    assert exact_column_sums(row[None]).tobytes() == np.array([0.0, 5e-324, -1.5]).tobytes()
    assert exact_column_sums([row]).tobytes() == np.array([0.0, 5e-324, -1.5]).tobytes()


def test_values_of_one_kind_need_few_digits():
    total = ExactSum(1000)
    total.add(np.random.default_rng(2).uniform(1e-9, 1e3, (300, 1000)))
    assert total.nbytes <= 8 * 8 * 1000
    again = pickle.loads(pickle.dumps(total))
    assert np.array_equal(again.to_limbs(), total.to_limbs())
    again.merge(total)
    assert again.total().tolist() == (2 * total.total()).tolist()


def test_digits_grow_downwards_and_upwards():
    values = [1.0, 2.0**-1070, 2.0**1000, -(2.0**1000), 2.0**-1070, -1.0]
    total = ExactSum(2)
    for count, value in enumerate(values, start=1):
        total.add([value, -value])
        assert total.total().tolist() == [exact_total(values[:count]), -exact_total(values[:count])]
    other = ExactSum(2)
    other.merge(total)
    assert other.total().tolist() == [2.0**-1069, -(2.0**-1069)]


def test_carries_survive_many_equal_addends():
    total = ExactSum(1)
    total.add(np.full((300_000, 1), np.nextafter(2.0, 0.0)))
    assert total.total()[0] == float(300_000 * Fraction(float(np.nextafter(2.0, 0.0))))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(bad):
    total = ExactSum(2)
    with pytest.raises(ValueError, match="not finite"):
        total.add([1.0, bad])
    assert not total.to_limbs().any()
    with pytest.raises(ValueError, match="not finite"):
        exact_column_sums([[1.0, bad]])


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        ExactSum(2).add([1.0])
    with pytest.raises(ValueError, match="merge"):
        ExactSum(2).merge(ExactSum(3))
    with pytest.raises(ValueError, match="limbs"):
        ExactSum.from_limbs(np.zeros((2, 3), dtype=np.int64))
    with pytest.raises(ValueError, match="limbs"):
        ExactSum.from_limbs(np.zeros((2, LIMBS)))
    with pytest.raises(ValueError, match="negative"):
        ExactSum(-1)
    with pytest.raises(ValueError, match="two-dimensional"):
        exact_column_sums([1.0])
    with pytest.raises(ValueError, match="one length"):
        exact_column_sums([np.zeros(3), np.zeros(4)])


def test_a_sum_beyond_the_range_is_an_error_not_infinity():
    total = ExactSum(1)
    total.add([1.7976931348623157e308])
    total.add([1.7976931348623157e308])
    with pytest.raises(OverflowError):
        total.total()
    with pytest.raises(OverflowError):
        exact_column_sums(np.full((2, 300), 1.7976931348623157e308))


def test_no_sums_at_all():
    total = ExactSum(0)
    total.add(np.zeros((3, 0)))
    assert total.total().shape == (0,)
