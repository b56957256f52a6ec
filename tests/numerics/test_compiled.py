from __future__ import annotations

import math
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest

from pipeline.numerics import compiled, loop_code
from pipeline.numerics.element_code import BFLOAT16
from pipeline.numerics.loop_code import BLOCK, gram_loop
from pipeline.numerics.vector_code import Processor

KINDS = ("uint16", "float16", "float32", "float64")
EPSILON = sys.float_info.epsilon / 2


def points_of(kind: str, count: int, elements: int, seed: int = 0) -> list[np.ndarray]:
    """Points that share some of the first one's elements."""
    generator = np.random.default_rng(seed)
    first = generator.standard_normal(elements) * 0.02
    points = []
    for number in range(count):
        moved = generator.random(elements) < number / count
        values = np.where(moved, first + 1e-3 * generator.standard_normal(elements), first)
        points.append(from_doubles(values, kind))
    return points


def from_doubles(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "uint16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(kind)


def doubles(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def gram(points: list[np.ndarray], reference: int) -> tuple[np.ndarray, np.ndarray]:
    products, unchanged = np.zeros((len(points), len(points))), np.zeros(len(points), dtype=np.int64)
    addresses = np.array([point.ctypes.data for point in points], dtype=np.int64)
    compiled.gram(addresses, points[0], len(points[0]), reference, products, unchanged)
    return products, unchanged


def combine(
    points: list[np.ndarray], factors: np.ndarray, anchor: int, anchor_factor: float, out: str
) -> tuple[np.ndarray, np.ndarray, float]:
    values, squared = np.empty(len(points[0]), dtype=out), np.zeros(len(points))
    addresses = np.array([point.ctypes.data for point in points], dtype=np.int64)
    rounding = compiled.combine(addresses, points[0], factors, anchor, anchor_factor, values, squared)
    return values, squared, rounding


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    return combine([values], np.ones(1), 0, 1.0, kind)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [1, BLOCK - 1, BLOCK, 5 * BLOCK + 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 12])
def test_products_are_as_exact_as_their_additions(kind: str, elements: int, count: int) -> None:
    points = points_of(kind, count, elements)
    reference = count // 2
    products, unchanged = gram(points, reference)
    differences = np.array([doubles(point) for point in points]) - doubles(points[reference])
    assert unchanged.tolist() == (differences == 0).sum(axis=1).tolist()
    assert not np.tril(products, k=-1).any()
    # A lane adds 32 products of a block, one sum a block; the lanes are three additions.
    additions = BLOCK // 8 + elements // BLOCK + 4
    for i in range(count):
        for j in range(i, count):
            exact = sum(Fraction(a) * Fraction(b) for a, b in zip(differences[i], differences[j], strict=True))
            size = math.fsum(abs(a * b) for a, b in zip(differences[i], differences[j], strict=True))
            assert abs(Fraction(products[i, j]) - exact) <= Fraction(1.01 * additions * EPSILON * size), (i, j)


def test_products_and_counts_are_added_to_what_is_there() -> None:
    points = points_of("uint16", 3, 700)
    once, counts = gram(points, 0)
    twice, double_counts = once.copy(), counts.copy()
    addresses = np.array([point.ctypes.data for point in points], dtype=np.int64)
    compiled.gram(addresses, points[0], 700, 0, twice, double_counts)
    assert np.array_equal(twice, 2 * once)
    assert np.array_equal(double_counts, 2 * counts)


@pytest.mark.parametrize("count", [4, 6, 10])
def test_no_bit_depends_on_the_registers_of_the_processor(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = points_of("uint16", count + 1, 3 * BLOCK)
    results = []
    for width, registers in ((2, 16), (4, 16), (8, 32)):
        monkeypatch.setattr(loop_code, "processor", lambda w=width, r=registers: Processor(doubles=w, registers=r))
        made = gram_loop.__wrapped__(BFLOAT16, count)  # type: ignore[attr-defined]
        monkeypatch.setattr(compiled, "gram_loop", lambda *_, made=made: made)
        results.append(gram(points, 0)[0].tobytes())
    assert len(set(results)) == 1


def test_points_that_are_not_finite_show_in_the_products() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        points = [np.zeros(300, dtype=np.float32) for _ in range(3)]
        points[1][299] = bad
        assert not np.isfinite(gram(points, 0)[0][1, 1])
        assert np.isfinite(gram(points, 0)[0][2, 2])
        # As the reference it is in every difference.
        assert not np.isfinite(np.diagonal(gram(points, 1)[0])[[0, 2]]).any()


@pytest.mark.parametrize("out", KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "elements"), [(1, 40), (2, BLOCK), (3, 1), (8, 3 * BLOCK + 5), (40, BLOCK + 31)])
def test_a_combination_is_rounded_once_and_measured(kind: str, out: str, count: int, elements: int) -> None:
    points = points_of(kind, count, elements, seed=3)
    factors = np.random.default_rng(count).random(count)
    factors /= factors.sum()
    anchor = int(factors.argmax())
    values, squared, rounding = combine(points, factors, anchor, 1.0, out)
    exact = combine(points, factors, anchor, 1.0, "float64")[0]
    wide = np.array([doubles(point) for point in points])
    np.testing.assert_allclose(exact, factors @ wide, rtol=1e-12, atol=1e-16)
    assert np.array_equal(values, nearest(exact, out))
    written = doubles(values)
    np.testing.assert_allclose(squared, ((wide - written) ** 2).sum(axis=1), rtol=1e-13, atol=1e-32)
    np.testing.assert_allclose(rounding, ((written - exact) ** 2).sum(), rtol=1e-13)


def nearest(values: np.ndarray, kind: str) -> np.ndarray:
    """The nearest values of a dtype, ties to even; for bfloat16 by search among all of them."""
    if kind != "uint16":
        return values.astype(kind)
    bits = np.arange(0x7F81, dtype=np.uint16)
    size = np.abs(values)
    # What infinity stands for when it is rounded to: the next power of two.
    known = np.append(doubles(bits[:-1]), 2.0**128)
    above = np.clip(np.searchsorted(known, size), 1, len(known) - 1)
    middle = (known[above - 1] + known[above]) / 2
    up = (size > middle) | ((size == middle) & (above % 2 == 0))
    return np.where(up, above, above - 1).astype(np.uint16) | (np.signbit(values) * np.uint16(0x8000))


@pytest.mark.parametrize("kind", ["uint16", "float16", "float32"])
def test_rounding_is_right_at_every_tie(kind: str) -> None:
    if kind == "float32":
        # Near the smallest numbers, near the largest, and around 1.
        starts = (0, 0x007FFF00, 0x3F7FFF00, 0x7F7FFF00)
        known = np.concatenate([np.arange(start, start + 255, dtype=np.uint32) for start in starts])
        known = known.view(np.float32).astype(np.float64)
    else:
        largest = 0x7F7F if kind == "uint16" else 0x7BFF
        bits = np.arange(largest + 1, dtype=np.uint16)
        known = doubles(bits if kind == "uint16" else bits.view(np.float16))
    ties = (known[1:] + known[:-1]) / 2
    overflow = known[-1] + (known[-1] - known[-2]) / 2
    values = np.concatenate([known, ties, [overflow, 1e300, 5e-324, 1e-310]])
    values = np.concatenate([values, np.nextafter(values, np.inf), np.nextafter(values, 0), values * (1 + 2**-30)])
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore"):
        assert np.array_equal(rounded(values, kind).view(np.uint8), nearest(values, kind).view(np.uint8))


@pytest.mark.parametrize("out", KINDS)
def test_what_is_no_number_stays_so(out: str) -> None:
    payloads = np.array(
        [0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF, 0xFFF8000000000000, 0xFFFFFFFFFFFFFFFF], dtype=np.uint64
    )
    values, _, rounding = combine([payloads.view(np.float64)], np.ones(1), 0, 1.0, out)
    assert np.isnan(doubles(values)).all()
    assert np.isnan(rounding)
    single = [np.array([1.0, math.inf, -math.inf]), np.array([math.nan, 1.0, 1.0])]
    assert not np.isfinite(doubles(combine(single, np.array([0.5, 0.5]), 0, 1.0, out)[0])).any()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_points_give_themselves_bit_for_bit(kind: str) -> None:
    point = from_doubles(np.append(np.random.default_rng(0).standard_normal(600), [-0.0, 0.0]), kind)
    values, squared, rounding = combine([point, point.copy(), point.copy()], np.full(3, 1 / 3), 1, 1.0, kind)
    assert values.tobytes() == point.tobytes()
    assert not squared.any()
    assert rounding == 0.0


def test_the_anchors_share_is_scaled() -> None:
    points = points_of("float64", 3, 300)
    factors = np.array([0.5, 0.25, 1.0])
    values, _, _ = combine(points, factors, 2, float(factors.sum()), "float64")
    np.testing.assert_allclose(values, factors @ np.array(points), rtol=1e-13)


@pytest.mark.parametrize("elements", [0, 1, BLOCK, BLOCK + 1])
def test_nothing_is_written_beside_the_output(elements: int) -> None:
    points = points_of("uint16", 3, elements)
    memory = np.full(elements + 64, 0x1234, dtype=np.uint16)
    addresses = np.array([point.ctypes.data for point in points], dtype=np.int64)
    squared = np.zeros(3)
    compiled.combine(addresses, points[0], np.full(3, 1 / 3), 0, 1.0, memory[32 : 32 + elements], squared)
    assert (memory[:32] == 0x1234).all()
    assert (memory[32 + elements :] == 0x1234).all()


def test_points_may_lie_at_any_address() -> None:
    points = points_of("uint16", 3, 1000)
    moved = [
        np.append(np.zeros(number + 1, dtype=np.uint16), point)[number + 1 :] for number, point in enumerate(points)
    ]
    assert gram(points, 0)[0].tobytes() == gram(moved, 0)[0].tobytes()


def test_threads_that_need_the_same_loop_first_all_get_it() -> None:
    points = points_of("float32", 24, 5000)
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(gram(points, 0)[0].tobytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(set(results)) == 1
