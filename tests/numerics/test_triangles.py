from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.numerics.triangles import (
    diagonal_of_triangle,
    pack_triangle,
    statistic_fault,
    triangle_size,
    unpack_triangle,
)


def symmetric(size: int, dtype: type = np.float32) -> np.ndarray:
    rows = np.random.default_rng(size).standard_normal((size, size))
    return (rows + rows.T).astype(dtype)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(0, 200), double=st.booleans())
def test_unpacking_undoes_packing(size: int, double: bool) -> None:
    matrix = symmetric(size, np.float64 if double else np.float32)
    packed = pack_triangle(matrix)
    assert np.array_equal(packed, matrix[np.triu_indices(size)])
    assert np.array_equal(unpack_triangle(packed), matrix)
    filled = unpack_triangle(packed, np.full((size, size), np.nan))
    assert filled.dtype == np.float64
    assert np.array_equal(filled, matrix)
    assert np.array_equal(diagonal_of_triangle(packed), np.diag(matrix))
    assert triangle_size(packed.size) == size


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="no triangle has 5"):
        triangle_size(5)
    with pytest.raises(ValueError, match=r"fills \[2, 2\], not \[3, 3\]"):
        unpack_triangle(np.zeros(3), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="row 1 of the triangle overflows float32"):
        unpack_triangle(np.array([1.0, np.inf, 1e300]), np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="square"):
        pack_triangle(np.zeros((2, 3)))


def test_faults_of_statistics() -> None:
    good = pack_triangle(symmetric(4) @ symmetric(4))
    assert statistic_fault(good, matrix=True) is None
    assert statistic_fault(np.zeros((0, 3), np.float32), matrix=False) is None
    assert statistic_fault(np.ones((2, 3), np.float32), matrix=False) is None
    negative_inside = pack_triangle(np.array([[2.0, -1], [-1, 2]]))
    assert statistic_fault(negative_inside, matrix=True) is None
    assert "element 1 of its diagonal is -0.5" in str(statistic_fault(np.array([[1, -0.5]]), matrix=False))
    assert "element 1 of its diagonal is -2" in str(statistic_fault(np.array([1.0, 0, -2]), matrix=True))
    many = np.zeros((1 << 20) + 5, np.float32)
    many[-1] = np.inf
    assert f"element {many.size - 1} of {many.size} is inf" in str(statistic_fault(many, matrix=False))
    many[3] = np.nan
    assert "element 3 of" in str(statistic_fault(many, matrix=False))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("unit", [1.0, 1e-30, 1e30])
def test_elements_that_the_diagonal_does_not_allow(dtype: type, unit: float) -> None:
    rng = np.random.default_rng(3)
    # Inputs that are copies of each other reach the limit; one whose square vanishes is allowed all the same.
    rows = rng.standard_normal((30, 5))
    rows[:, 3] = rows[:, 1]
    gram = (rows.T @ rows * unit).astype(dtype)
    assert statistic_fault(pack_triangle(gram), matrix=True) is None
    tiny = np.array([[1, 1e-25], [1e-25, 0]], dtype=np.float32)
    assert statistic_fault(pack_triangle(tiny), matrix=True) is None
    gram[2, 4] = -50 * unit
    fault = str(statistic_fault(pack_triangle(gram), matrix=True))
    assert "element (2, 4) is -5" in fault
    assert "no mean of outer products" in fault
