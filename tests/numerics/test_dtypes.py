"""Names of element types, promotion, and casts that round once."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.numerics import torch_dtypes
from pipeline.numerics.dtypes import array_dtype, cast, config_name, finite, header_name, is_mergeable, promote, widen
from pipeline.numerics.kernels import combine
from pipeline.numerics.torch_dtypes import torch_dtype
from tests.numerics.arrays import NAMES, as_array, as_tensor

FLOATS = {name: dtype for dtype, name in NAMES.items()}


def round_combined(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the compiled loops write of a combination that is its only, finite point."""
    return as_tensor(combine([as_array(values)], [1.0], array_dtype(NAMES[dtype])).values_E)


# Both ways to round once; what they do is one thing.
WAYS = {"torch": torch_dtypes.round_once, "loops": round_combined}
both = pytest.mark.parametrize("round_once", WAYS.values(), ids=WAYS)
Round = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
# Binary digits of the significand, exponent of the smallest normal number, largest finite number.
FORMATS = {
    torch.float32: (24, -126, Fraction(2) ** 128 - Fraction(2) ** 104),
    torch.bfloat16: (8, -126, Fraction(2) ** 128 - Fraction(2) ** 120),
    torch.float16: (11, -14, Fraction(65504)),
    torch.float8_e4m3fn: (4, -6, Fraction(448)),
    torch.float8_e5m2: (3, -14, Fraction(57344)),
}


def nearest(value: float, dtype: torch.dtype) -> float:
    """The number of a format nearest to a float64, ties to even, by exact fractions."""
    if value == 0.0 or not math.isfinite(value):
        return value
    digits, smallest, largest = FORMATS[dtype]
    exponent = max(math.frexp(value)[1] - 1, smallest)
    quantum = Fraction(2) ** (exponent - digits + 1)
    rounded = round(abs(Fraction(value)) / quantum) * quantum  # Python rounds fractions half to even
    return math.copysign(math.inf if rounded > largest else float(rounded), value)


def same(first: float, second: float) -> bool:
    """Equal with the sign of zeros."""
    return first == second and math.copysign(1, first) == math.copysign(1, second)


def test_exactly_the_floats_that_torch_knows_are_merged() -> None:
    assert {name for name in DTYPES if is_mergeable(name)} == set(FLOATS)
    for name, dtype in FLOATS.items():
        assert torch_dtype(name) == dtype
        assert array_dtype(name).name == config_name(name)
        assert DTYPES[name].bits == 8 * dtype.itemsize == 8 * array_dtype(name).itemsize
        assert DTYPES[name].kind == "float"
        assert f"torch.{config_name(name)}" == str(dtype)
        assert header_name(config_name(name)) == name


def test_what_is_no_float_has_no_type() -> None:
    for of in (torch_dtype, array_dtype):
        with pytest.raises(KeyError):
            of("I64")
    assert not is_mergeable("F8_E8M0")
    assert not is_mergeable("C64")


@pytest.mark.parametrize("first", FLOATS)
@pytest.mark.parametrize("second", FLOATS)
def test_promotion_holds_both_and_does_not_depend_on_the_order(first: str, second: str) -> None:
    result = promote((first, second))
    assert result == promote((second, first)) == promote((first, second, first))
    values = torch.tensor([1.0, -0.0, 1.5, 2.0**-6, 0.0625])
    for name in (first, second):
        # Every pattern of the narrow type survives, tested on a few and on the extremes.
        kind = FLOATS[name]
        extremes = torch.tensor([torch.finfo(kind).max, torch.finfo(kind).tiny, 1 + torch.finfo(kind).eps]).double()
        points = torch.cat([values.double(), extremes]).to(kind)
        assert torch.equal(points.to(FLOATS[result]).double(), points.double())


@pytest.mark.parametrize(
    ("names", "result"),
    [
        (("BF16",), "BF16"),
        (("BF16", "F16"), "F32"),
        (("F16", "F16"), "F16"),
        (("F8_E4M3",), "BF16"),
        (("F8_E4M3", "F8_E5M2"), "BF16"),
        (("F8_E5M2", "F16"), "F32"),
        (("BF16", "F32", "F64"), "F64"),
    ],
)
def test_promotion(names: tuple[str, ...], result: str) -> None:
    assert promote(names) == result


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_tie_of_the_16_bit_types_and_its_neighbours(round_once: Round, dtype: torch.dtype, sign: float) -> None:
    infinity = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
    patterns = torch.arange(infinity + 1, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype).double()
    values[-1] = 2 * values[-2] - values[-3]  # where the format would go on
    middles = (values[:-1] + values[1:]) / 2  # exact in float64
    lower, upper = patterns[:-1], patterns[1:]
    even = torch.where(lower % 2 == 0, lower, upper)
    below = torch.nextafter(middles, torch.zeros(()).double())
    above = torch.nextafter(middles, torch.full((), math.inf).double())
    for points, wanted in ((middles, even), (below, lower), (above, upper)):
        rounded = round_once(sign * points, dtype)
        assert rounded.dtype == dtype
        assert torch.equal(rounded.abs().view(torch.int16), wanted)
        assert bool((rounded.signbit() == (sign < 0)).all())


@pytest.mark.parametrize(
    ("round_once", "dtype"),
    [(WAYS[way], dtype) for way in WAYS for dtype in FORMATS if way == "torch" or dtype.itemsize > 1],
)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_rounding_is_to_the_nearest_ties_to_even(round_once: Round, dtype: torch.dtype, data: st.DataObject) -> None:
    largest = float(FORMATS[dtype][2])
    # The eight-bit types have no common word for overflow, so they are held to what they can show.
    bound = largest if dtype.itemsize == 1 else None
    spread = st.floats(min_value=-bound if bound else None, max_value=bound, allow_nan=False)
    small = st.floats(-1.0, 1.0).map(lambda x: x * 2.0 ** (FORMATS[dtype][1] - 2))
    middle = st.floats(-100.0, 100.0)
    value = data.draw(st.one_of(spread, small, middle).filter(math.isfinite))
    rounded = round_once(torch.tensor([value], dtype=torch.float64), dtype)
    assert same(float(rounded.double()), nearest(value, dtype))


@both
def test_torchs_own_cast_rounds_twice_where_ours_does_not(round_once: Round) -> None:
    # Just above a tie of bfloat16: float32 makes a tie of it, which then goes to the even neighbour below.
    value = torch.tensor([1.0 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert float(value.to(torch.float32).to(torch.bfloat16)) == 1.0
    assert float(round_once(value, torch.bfloat16)) == 1.0 + 2.0**-7


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_overflow_is_infinite_and_zeros_keep_their_sign(round_once: Round, dtype: torch.dtype) -> None:
    points = torch.tensor([1e300, -1e300, 3.4028236e38, 0.0, -0.0], dtype=torch.float64)
    rounded = round_once(points, dtype).double().tolist()
    assert rounded[:3] == [math.inf, -math.inf, math.inf]
    assert same(rounded[3], 0.0)
    assert same(rounded[4], -0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    points = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    rounded = torch_dtypes.round_once(points, dtype).double().tolist()
    assert math.isnan(rounded[0])
    assert rounded[1:] == [math.inf, -math.inf]


@pytest.mark.parametrize(
    ("round_once", "dtype"),
    [(WAYS[way], dtype) for way in WAYS for dtype in NAMES if way == "torch" or dtype.itemsize > 1],
)
def test_what_the_type_holds_is_not_touched(round_once: Round, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype)
    assert torch.equal(round_once(points.double(), dtype).double(), points.double())


@both
def test_float64_is_returned_as_it_is(round_once: Round) -> None:
    points = torch.tensor([0.1, 5e-324, 1e308], dtype=torch.float64)
    assert torch.equal(round_once(points, torch.float64), points)


@both
def test_nothing_is_rounded_to_nothing(round_once: Round) -> None:
    assert round_once(torch.empty(0, dtype=torch.float64), torch.bfloat16).shape == (0,)


@pytest.mark.parametrize("name", FLOATS)
def test_promotion_is_torchs(name: str) -> None:
    for other in FLOATS:
        wide = [torch.bfloat16 if FLOATS[one].itemsize == 1 else FLOATS[one] for one in (name, other)]
        assert FLOATS[promote((name, other))] == torch.promote_types(*wide)


def every_pattern(name: str) -> torch.Tensor:
    """All values of a type of 8 or 16 bits, or many of a wider one: any exponent, ties of the narrower types."""
    dtype = FLOATS[name]
    if dtype.itemsize <= 2:
        bits = torch.arange(1 << (8 * dtype.itemsize), dtype=torch.int64)
        return bits.to({1: torch.uint8, 2: torch.int16}[dtype.itemsize]).view(dtype)
    halves = torch.cat([every_pattern("BF16"), every_pattern("F16")]).double()
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(20_000, generator=generator, dtype=torch.float64)
    scaled = spread * torch.exp2(torch.randint(-160, 140, (20_000,), generator=generator).double())
    middles = (halves[:-1] + halves[1:]) / 2
    single = torch.cat([halves, middles, torch.nextafter(middles.float(), halves[1:].float()).double(), scaled])
    return single.to(dtype)


def same_values(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal bits, but that a NaN may be any NaN."""
    broken = wanted.double().isnan()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[wanted.element_size()]
    assert found.dtype == wanted.dtype
    return bool(torch.where(broken, found.double().isnan(), found.view(bits) == wanted.view(bits)).all())


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("wide", ["F32", "F64"])
def test_widening_is_torchs(name: str, wide: str) -> None:
    values = every_pattern(name)
    assert same_values(as_tensor(widen(as_array(values), array_dtype(wide))), values.to(FLOATS[wide]))


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("narrow", ["F64", "F32", "BF16", "F16"])
def test_casts_are_torchs(name: str, narrow: str) -> None:
    values = every_pattern(name)
    assert same_values(as_tensor(cast(as_array(values), array_dtype(narrow))), values.to(FLOATS[narrow]))


@pytest.mark.parametrize("name", FLOATS)
def test_what_is_finite_is_torchs(name: str) -> None:
    values = every_pattern(name)
    assert np.array_equal(finite(as_array(values)), torch.isfinite(values.double()).numpy())


def test_what_is_of_a_type_already_is_not_copied() -> None:
    for name in FLOATS:
        values = np.ones(3, dtype=array_dtype(name))
        assert cast(values, values.dtype) is values
    for name in ("F32", "F64"):
        values = np.ones(3, dtype=array_dtype(name))
        assert widen(values, values.dtype) is values
