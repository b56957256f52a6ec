"""Sizes and durations as people write and read them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.units import format_bytes, format_seconds, parse_bytes, parse_seconds

UNITS = {
    "": 1,
    "B": 1,
    "K": 1000,
    "KB": 1000,
    "MB": 1000**2,
    "M": 1000**2,
    "GB": 1000**3,
    "g": 1000**3,
    "TB": 1000**4,
    "PB": 1000**5,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "gib": 1 << 30,
    "TIB": 1 << 40,
    "PiB": 1 << 50,
}


@pytest.mark.parametrize(("unit", "factor"), UNITS.items())
def test_every_unit_has_its_factor(unit: str, factor: int) -> None:
    assert parse_bytes(f"3{unit}") == 3 * factor
    assert parse_bytes(f"  12 {unit} ") == 12 * factor


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GB", 4_000_000_000), ("512 MiB", 536_870_912), ("1.5KB", 1500), ("0.25 KiB", 256), (7, 7), ("1000000", 10**6)],
)
def test_sizes_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "-4GB", "4 GBB", "1e9", "4,5GB", "4G B", ".5GB", "٤GB?", "nan", "inf", True, False, None]
)
def test_what_is_no_size_is_refused_by_its_text(text: object) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [0, -1, "0", "0GB", "0.0001"])
def test_a_size_is_positive(text: str | int) -> None:
    with pytest.raises(ValueError, match="positive"):
        parse_bytes(text)


@given(st.integers(1, 10**18))
def test_an_integer_is_itself_and_its_digits_too(count: int) -> None:
    assert parse_bytes(count) == count
    if count < 2**53:
        assert parse_bytes(str(count)) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1_234_567, "1.23 MB"),
        (999_499, "999 KB"),
        (999_500, "1 MB"),
        (5_000_000_000, "5 GB"),
        (141_107_412_992, "141 GB"),
        (2.5e12, "2.5 TB"),
        (3.2e15, "3.2 PB"),
        (-2_000_000, "-2 MB"),
    ],
)
def test_counts_are_shown_with_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(1, 10**17))
def test_what_is_shown_can_be_read_back_within_its_digits(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= 0.0051 * count


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.42, "0.42 s"),
        (9.94, "9.9 s"),
        (12.4, "12 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("90s", 90), ("1.5 min", 90), ("1h", 3600), ("0.5H", 1800), (" 2 d ", 172_800)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1h", "1 hour", "1m", "1h30min", "nan", "inf"])
def test_what_is_no_duration_is_refused_by_its_text(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_seconds(text)
