"""Single values: what counts as a number, how models are compared, what is hidden in messages."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recipe import model_key, without_credentials
from pipeline.recipe.values import RefusalError, describe, read_boolean, read_number, read_size


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_and_its_text_is_that_number(number: float) -> None:
    assert read_number(number) == number
    assert read_number(repr(number)) == number


@pytest.mark.parametrize("raw", [math.nan, math.inf, -math.inf, "1e999", 10**400])
def test_non_finite_numbers_are_refused(raw: object) -> None:
    with pytest.raises(RefusalError) as error:
        read_number(raw)
    assert error.value.what.startswith("must be a finite number, not ")


@pytest.mark.parametrize("raw", [True, None, "nan", "inf", "1_000", "١", "0x10", "", [1], {}])
def test_what_is_no_number(raw: object) -> None:
    with pytest.raises(RefusalError, match="must be a number, not "):
        read_number(raw)


@pytest.mark.parametrize(("raw", "expected"), [(True, True), (False, False), (1, True), (0.0, False)])
def test_switches(raw: object, expected: bool) -> None:
    assert read_boolean(raw) is expected


@pytest.mark.parametrize("raw", ["true", 2, 0.5, None, math.nan, []])
def test_what_is_no_switch(raw: object) -> None:
    with pytest.raises(RefusalError, match="must be true or false, not "):
        read_boolean(raw)


def test_a_size_beyond_floating_point_is_refused() -> None:
    with pytest.raises(RefusalError, match="must be a size"):
        read_size("9" * 400)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a", "./a/", True),
        ("a/../b", "b", True),
        ("/a//b", "/a/b", True),
        ("a", "A", False),
        ("s3://b/a", "s3://b/a/", True),
        ("s3://b/a", "s3://b/./a", False),
    ],
)
def test_spellings_of_one_model(one: str, other: str, same: bool) -> None:
    assert (model_key(one) == model_key(other)) is same


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("ftp://user:pa@ss@host/x?y=z", "ftp://host/x"),
        ("https://host?sig=1/2", "https://host"),
        ("./a@b?c", "./a@b?c"),
    ],
)
def test_credentials_are_removed_from_urls_only(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


def test_long_values_are_cut_in_messages() -> None:
    assert describe("x" * 500) == '"' + "x" * 79 + '…"'
    assert [describe(raw) for raw in (None, True, 1.5, [1], {"a": 1})] == [
        "nothing",
        "true",
        "1.5",
        "a list",
        "a mapping",
    ]
