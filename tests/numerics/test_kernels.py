"""The arithmetic on one chunk, against exact fractions and extended precision."""

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.numerics import kernels, torch_kernels
from pipeline.numerics.dtypes import array_dtype
from pipeline.numerics.kernels import BLOCK_ELEMENTS, work_bytes
from pipeline.numerics.torch_dtypes import round_once
from tests.numerics.arrays import NAMES, ON, On, as_array, as_tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
# What the distances are held to.
PRECISION = 1e-12
# Empty, shorter than a block, one block, several with and without a remainder.
LENGTHS = [0, 1, 7, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 3 * BLOCK_ELEMENTS, 40_000]


pytestmark = pytest.mark.usefixtures("one_thread")
everywhere = pytest.mark.parametrize("on", ON.values(), ids=ON)
# The eight-bit types are read everywhere, and written by torch alone.
written_everywhere = pytest.mark.parametrize(
    ("on", "dtype"), [(ON[name], dtype) for name in ON for dtype in DTYPES if name == "torch" or dtype.itemsize > 1]
)


def family(seed: int, count: int, elements: int, dtype: torch.dtype, *, spread: float = 0.1) -> list[torch.Tensor]:
    """A base and points around it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(elements, generator=generator, dtype=torch.float64)
    points = [base + spread * torch.randn(elements, generator=generator, dtype=torch.float64) for _ in range(count - 1)]
    return [point.to(dtype) for point in (base, *points)]


def extended(point: torch.Tensor) -> np.ndarray:
    """A point in 64-bit significands, exact."""
    return point.to(torch.float64).numpy().astype(np.longdouble)


def exact_squares(points: Sequence[torch.Tensor]) -> np.ndarray:
    """All squared distances by extended precision."""
    wide = [extended(point) for point in points]
    return np.array([[float(((a - b) ** 2).sum()) for b in wide] for a in wide])


def assert_close(found: np.ndarray, wanted: np.ndarray, relative: float = PRECISION) -> None:
    assert found.dtype == np.float64
    assert found.shape == wanted.shape
    assert bool((np.abs(found - wanted) <= relative * np.abs(wanted)).all()), (found, wanted)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", LENGTHS)
def test_distances_of_every_type_and_length(on: On, dtype: torch.dtype, elements: int) -> None:
    points = family(elements, 5, elements, dtype)
    result = on.pairwise_distances(points)
    assert_close(result.distances_PP, exact_squares(points))
    assert np.array_equal(result.distances_PP, result.distances_PP.T)
    assert not np.diagonal(result.distances_PP).any()
    equal = [int((point.double() == points[0].double()).sum()) for point in points]
    assert result.unchanged_P.tolist() == equal
    assert result.unchanged_P[0] == elements


@everywhere
def test_types_may_differ_between_points(on: On) -> None:
    points = [point.to(dtype) for point, dtype in zip(family(3, len(DTYPES), 5000, torch.float64), DTYPES, strict=True)]
    assert_close(on.pairwise_distances(points).distances_PP, exact_squares(points))


@everywhere
@pytest.mark.parametrize("gap", [0.3, 0.1, 3e-2, 1e-2, 1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("elements", [3, 1000, 100_000])
def test_points_much_closer_to_each_other_than_to_the_base(on: On, gap: float, elements: int) -> None:
    """G_ii + G_jj − 2 G_ij alone would lose half of the digits here."""
    generator = torch.Generator().manual_seed(elements)
    base = torch.zeros(elements, dtype=torch.float64)
    centres = [torch.randn(elements, generator=generator, dtype=torch.float64) for _ in range(2)]
    points = [base]
    for centre in centres:
        points += [
            centre,
            *(centre + gap * torch.randn(elements, generator=generator, dtype=torch.float64) for _ in range(2)),
        ]
    assert_close(on.pairwise_distances(points).distances_PP, exact_squares(points))


@everywhere
def test_clusters_within_clusters(on: On) -> None:
    generator = torch.Generator().manual_seed(9)
    point = torch.randn(2000, generator=generator, dtype=torch.float64)
    points = [torch.zeros(2000, dtype=torch.float64)]
    for size in (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        points += [point, point + size * torch.randn(2000, generator=generator, dtype=torch.float64)]
    result = on.pairwise_distances(points).distances_PP
    assert_close(result, exact_squares(points))
    assert result[1, 3] == 0.0  # the same point twice


@everywhere
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4),
        min_size=2,
        max_size=5,
    )
)
def test_distances_against_exact_fractions(on: On, rows: list[list[float]]) -> None:
    points = [torch.tensor(row, dtype=torch.float64) for row in rows]
    found = on.pairwise_distances(points).distances_PP
    for i, first in enumerate(rows):
        for j, second in enumerate(rows):
            exact = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(first, second, strict=True))
            # A coordinate difference is itself rounded once to float64; smaller ones than 1e-140 square to nothing.
            scale = max(abs(x) for row in rows for x in row)
            allowed = PRECISION * float(exact) + (1e-15 * scale) ** 2 + 1e-280
            assert abs(found[i, j] - float(exact)) <= allowed


@everywhere
def test_the_distances_of_chunks_add_up_to_those_of_the_whole(on: On) -> None:
    points = family(5, 6, 3 * BLOCK_ELEMENTS + 100, torch.bfloat16)
    whole = on.pairwise_distances(points)
    cuts = [0, 1, 500, BLOCK_ELEMENTS - 3, 2 * BLOCK_ELEMENTS, len(points[0])]
    parts = [on.pairwise_distances([point[start:stop] for point in points]) for start, stop in itertools.pairwise(cuts)]
    assert_close(sum(part.distances_PP for part in parts), whole.distances_PP, 1e-14)
    assert np.array_equal(sum(part.unchanged_P for part in parts), whole.unchanged_P)


@everywhere
def test_a_distance_does_not_depend_on_the_other_points_of_the_call(on: On) -> None:
    points = family(6, 8, 50_000, torch.float32)
    whole = on.pairwise_distances(points).distances_PP
    for subset in ([0, 3], [0, 1, 2], [4, 2, 7], [7, 6, 5, 4, 3, 2, 1, 0]):
        part = on.pairwise_distances([points[index] for index in subset]).distances_PP
        assert_close(part, whole[np.ix_(subset, subset)])


@everywhere
def test_the_bits_are_the_same_in_every_thread_and_every_call(on: On) -> None:
    points = family(7, 7, 5 * BLOCK_ELEMENTS + 11, torch.float32)
    weights = [1 / 7] * 7

    def work(_: int) -> tuple[bytes, bytes, bytes]:
        merged = on.combine(points, weights, torch.bfloat16)
        return (
            on.pairwise_distances(points).distances_PP.tobytes(),
            merged.values_E.view(torch.int16).numpy().tobytes(),
            merged.squared_distances_P.tobytes(),
        )

    alone = work(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(result == alone for result in pool.map(work, range(8)))


@everywhere
def test_the_place_in_memory_does_not_show(on: On) -> None:
    points = family(8, 4, 20_000, torch.float32)
    moved = [torch.cat([torch.zeros(shift), point])[shift:] for shift, point in enumerate(points, start=1)]
    assert np.array_equal(on.pairwise_distances(points).distances_PP, on.pairwise_distances(moved).distances_PP)


@everywhere
def test_what_is_not_finite_shows_in_its_own_row_only(on: On) -> None:
    points = family(10, 4, 3000, torch.float32)
    points[2] = points[2].clone()
    points[2][1234] = math.nan
    points[3] = points[3].clone()
    points[3][7] = math.inf
    found = on.pairwise_distances(points).distances_PP
    assert_close(found[:2, :2], exact_squares(points[:2]))
    for row in (2, 3):
        others = [index for index in range(4) if index != row]
        assert not np.isfinite(found[row, others]).any()
    assert on.non_finite_counts(points) == (0, 0, 1, 1)


@everywhere
def test_infinities_of_both_signs_are_not_finite_and_no_warning(on: On) -> None:
    points = [torch.zeros(64), torch.zeros(64)]
    points[1][3], points[1][8] = math.inf, -math.inf
    assert not np.isfinite(on.pairwise_distances(points).distances_PP[0, 1])
    assert not np.isfinite(on.combine(points, [0.5, 0.5], torch.float32).squared_rounding)


@everywhere
def test_an_overflow_of_float64_is_not_finite_and_no_warning(on: On) -> None:
    points = [torch.zeros(2, dtype=torch.float64), torch.full((2,), 1e200, dtype=torch.float64)]
    assert not np.isfinite(on.pairwise_distances(points).distances_PP[0, 1])
    assert on.non_finite_counts(points) == (0, 0)


@written_everywhere
def test_a_combination_that_is_a_point_is_that_point_bit_for_bit(on: On, dtype: torch.dtype) -> None:
    points = family(11, 4, BLOCK_ELEMENTS + 5, dtype)
    points[2][:4] = torch.tensor([0.0, -0.0, 1.0, -0.0]).to(dtype)
    for index in range(4):
        result = on.combine(points, [float(index == other) for other in range(4)], dtype)
        assert result.values_E.dtype == dtype
        assert torch.equal(result.values_E.view(torch.uint8), points[index].view(torch.uint8))
        assert result.squared_rounding == 0.0
        assert result.squared_distances_P[index] == 0.0
        assert_close(result.squared_distances_P, exact_squares(points)[index])


@written_everywhere
def test_a_combination_of_equal_points_is_that_point_bit_for_bit(on: On, dtype: torch.dtype) -> None:
    point = family(12, 1, 5000, dtype)[0]
    point[:2] = torch.tensor([-0.0, 0.0]).to(dtype)
    result = on.combine([point] * 3, [0.1, 0.7, 0.2], dtype)
    assert torch.equal(result.values_E.view(torch.uint8), point.view(torch.uint8))
    assert not result.squared_distances_P.any()
    assert result.squared_rounding == 0.0


@everywhere
def test_the_midpoint_is_exact(on: On) -> None:
    generator = torch.Generator().manual_seed(13)
    first, second = (torch.randint(-1000, 1000, (5000,), generator=generator).float() for _ in range(2))
    result = on.combine([first, second], [0.5, 0.5], torch.float32)
    assert torch.equal(result.values_E, (first + second) / 2)
    quarter = float(((first - second).double() ** 2).sum()) / 4
    assert result.squared_distances_P.tolist() == [quarter, quarter]


@everywhere
@pytest.mark.parametrize("output", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_combination_is_rounded_once_and_measured_as_it_is_written(
    on: On, dtype: torch.dtype, output: torch.dtype
) -> None:
    points = family(14, 5, BLOCK_ELEMENTS + 999, dtype)
    # Roots, so that no combination of 8- or 16-bit values lies on a tie of the output type.
    raw = [math.sqrt(2), math.sqrt(3), -math.sqrt(5), math.sqrt(7), math.sqrt(11)]
    weights = [value / math.fsum(raw) for value in raw]
    result = on.combine(points, weights, output)
    exact_E = sum(np.longdouble(weight) * extended(point) for weight, point in zip(weights, points, strict=True))
    written_E = extended(result.values_E)
    if output == torch.float64:
        assert np.abs(written_E - exact_E).max() < 1e-14
        assert result.squared_rounding == 0.0
    else:
        assert torch.equal(result.values_E, round_once(torch.from_numpy(exact_E.astype(np.float64)), output))
        assert result.squared_rounding == pytest.approx(float(((written_E - exact_E) ** 2).sum()), rel=1e-6)
    wanted = np.array([float(((written_E - extended(point)) ** 2).sum()) for point in points])
    assert_close(result.squared_distances_P, wanted)


@everywhere
def test_weights_that_do_not_sum_to_one_are_a_sum_and_no_mean(on: On) -> None:
    points = family(15, 3, 1000, torch.float64)
    for weights in ([0.5, 0.6, 0.7], [2.0, -3.0, 0.25], [0.0, 0.0, 0.0], [1.0, -1.0, 0.0]):
        result = on.combine(points, weights, torch.float64)
        wanted = sum(np.longdouble(weight) * extended(point) for weight, point in zip(weights, points, strict=True))
        assert np.abs(extended(result.values_E) - wanted).max() < 2e-15 * 10


@everywhere
@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.floats(-100, 100, width=16), min_size=3, max_size=3), min_size=1, max_size=5),
    st.data(),
)
def test_combinations_against_exact_fractions(on: On, rows: list[list[float]], data: st.DataObject) -> None:
    raw = data.draw(st.lists(st.floats(0.01, 1.0), min_size=len(rows), max_size=len(rows)))
    weights = [value / math.fsum(raw) for value in raw]
    points = [torch.tensor(row, dtype=torch.float16) for row in rows]
    found = on.combine(points, weights, torch.float64).values_E.tolist()
    for element, value in enumerate(found):
        # Affine around the largest: the weights are meant to sum to one, which their roundings do not.
        anchor = max(range(len(rows)), key=lambda index: weights[index])
        start = Fraction(rows[anchor][element])
        exact = start + sum(
            Fraction(w) * (Fraction(row[element]) - start) for w, row in zip(weights, rows, strict=True)
        )
        assert abs(value - float(exact)) <= 1e-13 * max(1.0, *(abs(row[element]) for row in rows))
        assert min(row[element] for row in rows) - 1e-12 <= value <= max(row[element] for row in rows) + 1e-12


@everywhere
def test_a_value_beyond_the_output_type_is_seen_in_the_rounding(on: On) -> None:
    points = [torch.tensor([1e5, 1.0]), torch.tensor([2e5, 2.0])]
    result = on.combine(points, [0.5, 0.5], torch.float16)
    assert result.values_E.tolist() == [math.inf, 1.5]
    assert not math.isfinite(result.squared_rounding)


@everywhere
@pytest.mark.parametrize("elements", LENGTHS[1:])
def test_a_probe_measures_what_combine_makes(on: On, elements: int) -> None:
    points = family(elements + 1, 4, elements, torch.float32)
    coefficients = np.array([[0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]])
    found = on.probe(points, coefficients)
    wide = np.array([extended(point) for point in points])
    combinations = coefficients.astype(np.longdouble) @ wide
    squares = [[float(((m - x) ** 2).sum()) for x in wide] for m in combinations]
    # A model of one element can lie at a combination; only then is a distance pure rounding.
    scale = float(((wide - wide[0]) ** 2).sum())
    assert np.abs(found.squared_distances_QP - squares).max() <= PRECISION * scale
    steps = combinations - combinations[0]
    products = np.array([[float((a * b).sum()) for b in steps] for a in steps])
    assert np.abs(found.products_QQ - products).max() <= PRECISION * scale
    direct = on.combine(points, coefficients[1], torch.float64)
    assert_close(found.squared_distances_QP[1], direct.squared_distances_P, 1e-9 if elements == 1 else PRECISION)
    assert found.squared_distances_QP[2, 0] == 0.0


@everywhere
def test_a_probe_agrees_with_the_table_of_distances(on: On) -> None:
    points = family(20, 6, 30_000, torch.bfloat16)
    coefficients = np.array([[0.3, 0.1, 0.1, 0.2, 0.2, 0.1]])
    table = on.pairwise_distances(points).distances_PP
    c = coefficients[0]
    predicted = table @ c - 0.5 * c @ table @ c
    assert_close(on.probe(points, coefficients).squared_distances_QP[0], predicted, 1e-11)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_counting_and_replacing_what_is_not_finite(on: On, dtype: torch.dtype) -> None:
    base = torch.arange(6, dtype=torch.float32).to(dtype)
    bad = base.clone()
    bad[1] = math.nan
    wanted = 1
    if dtype != torch.float8_e4m3fn:  # that type has no infinities
        bad[4], bad[5] = math.inf, -math.inf
        wanted = 3
    assert on.non_finite_counts([base, bad, base]) == (0, wanted, 0)
    sound_E, broken_E = on.points([base, bad])
    assert on.kernels.replace_non_finite(sound_E, broken_E) is sound_E
    repaired = on.back(on.kernels.replace_non_finite(broken_E, sound_E))
    assert repaired.dtype == torch.float64
    assert torch.equal(repaired, base.to(torch.float64))
    assert on.non_finite_counts([repaired]) == (0,)


@pytest.mark.parametrize("points", [1, 2, 21, 100])
def test_the_working_memory_holds_the_differences_and_their_copy(points: int) -> None:
    assert work_bytes(points) >= 2 * points * BLOCK_ELEMENTS * 8
    assert work_bytes(points + 1) - work_bytes(points) == 2 * BLOCK_ELEMENTS * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("elements", [1, 511, 512, 513, 40_000])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_compiled_loops_agree_with_torch(dtype: torch.dtype, elements: int, count: int) -> None:
    generator = torch.Generator().manual_seed(elements + count)
    points = [torch.randn(elements, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
    points[-1][: elements // 2] = points[0][: elements // 2]
    arrays = [as_array(point) for point in points]
    fast, counts = kernels.gram(arrays, count - 1)
    slow, wanted = torch_kernels.gram(points, count - 1)
    np.testing.assert_allclose(fast, slow, rtol=1e-13, atol=1e-13 * max(1.0, slow.max()))
    assert np.array_equal(counts, wanted)
    factors = (np.linspace(0.1, 1.0, count) / np.linspace(0.1, 1.0, count).sum()).tolist()
    for target in (torch.bfloat16, torch.float32, torch.float64):
        one = kernels.combine(arrays, factors, array_dtype(NAMES[target]))
        two = torch_kernels.combine(points, factors, target)
        merged_E = as_tensor(one.values_E)
        # The order of additions differs in the last place: visible in float64, elsewhere where it decides a tie.
        digits = {torch.bfloat16: 2**-7, torch.float32: 2**-22, torch.float64: 1e-14}[target]
        torch.testing.assert_close(merged_E, two.values_E, rtol=digits, atol=1e-15)
        # By the triangle inequality distances differ by no more than the values do.
        apart = float((merged_E.double() - two.values_E.double()).norm())
        found, wanted_P = np.sqrt(one.squared_distances_P), np.sqrt(two.squared_distances_P)
        assert (np.abs(found - wanted_P) <= apart + 1e-12 * wanted_P).all()
