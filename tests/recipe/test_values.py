"""Single values: what counts as a number or a model, what is hidden in messages."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recipe.values import (
    RefusalError,
    describe,
    read_boolean,
    read_count,
    read_model,
    read_number,
    read_size,
    split_model,
    without_credentials,
)


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


@pytest.mark.parametrize(("raw", "expected"), [(1, 1), (320, 320), (10**30, 10**30)])
def test_counts(raw: object, expected: int) -> None:
    assert read_count(raw) == expected


@pytest.mark.parametrize("raw", [0, -1, 1.0, True, "8", None, [8]])
def test_what_is_no_count(raw: object) -> None:
    with pytest.raises(RefusalError, match="must be a whole number greater than 0, not "):
        read_count(raw)


@pytest.mark.parametrize(
    "model", ["a", "a+b", r"a\+b", r"c\+\++s3://b/l@2", "s3://b/a?v=1+s3://b/l", "s3://b+l", "c:\\a"]
)
def test_models_stay_as_written(model: str) -> None:
    assert read_model(model) == model


@given(st.text(min_size=1).filter(str.strip), st.none() | st.text(min_size=1).filter(str.strip))
def test_object_form_takes_any_path_literally(path: str, adapter: str | None) -> None:
    raw = {"model": {"path": path, "revision": None}, "lora": None if adapter is None else {"path": adapter}}
    assert split_model(read_model(raw)) == (path, adapter)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:sec+ret@bucket/a",
        "s3://key:sec+ret@bucket/a+lora",
        "s3://bucket/a?sig=sec+ret",
        "base+s3://key:sec+ret@bucket/a",
        "base+s3://bucket/a?sig=sec+ret",
        "s3://bucket/a?sig=sec+ret+lora",
    ],
)
def test_plus_sign_in_a_secret_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(RefusalError) as error:
        read_model(url)
    assert "plus sign" in error.value.what
    assert r"\+" in error.value.remedy
    assert not {"sec", "ret"} & set(re.split(r"\W", error.value.what + error.value.remedy))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (r"s3://key:sec\+ret@bucket/a", "s3://bucket/a"),
        (r"b+s3://bucket/a?sig=sec\+ret", "b+s3://bucket/a"),
        ({"model": {"path": "s3://bucket/a?sig=sec+ret"}, "lora": {"path": "lora"}}, "s3://bucket/a+lora"),
    ],
)
def test_escaped_plus_sign_in_a_secret_is_accepted_and_hidden(raw: object, expected: str) -> None:
    assert without_credentials(read_model(raw)) == expected


def test_long_values_are_cut_in_messages() -> None:
    assert describe("x" * 500) == '"' + "x" * 79 + '…"'
    assert [describe(raw) for raw in (None, True, 1.5, [1], {"a": 1})] == [
        "nothing",
        "true",
        "1.5",
        "a list",
        "a mapping",
    ]
