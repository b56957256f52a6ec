"""The notation of models: what is split, what is escaped, which spellings are equal, what is hidden."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recipe import join_model, model_key, split_model, without_credentials
from pipeline.recipe.references import halves_of, shown

# What the notation is made of, so that runs of backslashes meet plus signs often.
NOTATION = st.text(alphabet="a/\\+:@?.", max_size=12)


@pytest.mark.parametrize(
    ("model", "path", "adapter"),
    [
        ("a", "a", None),
        ("a+b", "a", "b"),
        ("./a/+s3://b/c", "./a/", "s3://b/c"),
        (r"a\+b", "a+b", None),
        (r"c\+\++d\+", "c++", "d+"),
        (r"a\\+b", "a\\", "b"),
        (r"a\\\+b", "a\\+b", None),
        (r"c:\a\b", r"c:\a\b", None),
        ("a\\", "a\\", None),
        (r"a+b" + "\\", "a", "b\\"),
    ],
)
def test_notation(model: str, path: str, adapter: str | None) -> None:
    assert split_model(model) == (path, adapter)
    assert join_model(path, adapter) == model


@given(NOTATION, st.none() | NOTATION)
def test_every_pair_of_paths_has_a_text_that_splits_into_it(path: str, adapter: str | None) -> None:
    assert split_model(join_model(path, adapter)) == (path, adapter)


@given(NOTATION)
def test_every_text_is_the_only_one_of_its_paths(model: str) -> None:
    if len(halves_of(model)) <= 2:
        assert join_model(*split_model(model)) == model


@pytest.mark.parametrize("model", ["a+b+c", "++", r"a\\+b+c"])
def test_two_adapters_cannot_be_split(model: str) -> None:
    with pytest.raises(ValueError, match="more than one adapter"):
        split_model(model)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a", "./a/", True),
        ("a/../b", "b", True),
        ("/a//b", "/a/b", True),
        ("a", "A", False),
        ("s3://b/a", "s3://b/a/", True),
        ("s3://b/a", "s3://b/./a", False),
        ("./a/+b/", "a+./b", True),
        ("s3://b/a/+./l", "s3://b/a+l/", True),
        ("a+b", "b+a", False),
        ("a+b", r"a\+b", False),
        (r"./a\+b/", r"a\+b", True),
        ("a+b", "a", False),
    ],
)
def test_spellings_of_one_model(one: str, other: str, same: bool) -> None:
    assert (model_key(one) == model_key(other)) is same


@given(NOTATION.filter(bool), st.none() | NOTATION.filter(bool))
def test_key_of_a_key_is_itself(path: str, adapter: str | None) -> None:
    key = model_key(join_model(path, adapter))
    assert model_key(key) == key
    assert len(halves_of(key)) == (1 if adapter is None else 2)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("ftp://user:pa@ss@host/x?y=z", "ftp://host/x"),
        ("https://host?sig=1/2", "https://host"),
        ("./a@b?c", "./a@b?c"),
        ("ftp://u:p@host/x?y=z+ftp://u:p@host/l@1?y=z", "ftp://host/x+ftp://host/l@1"),
        ("./a@b?c+s3://k:s@b/l", "./a@b?c+s3://b/l"),
        ("s3://k:s@b/x+./l@1?y", "s3://b/x+./l@1?y"),
        (r"ftp://u:p\+@host/x\+y?z\++l\+", r"ftp://host/x\+y+l\+"),
    ],
)
def test_credentials_are_removed_from_urls_only(url: str, expected: str) -> None:
    assert without_credentials(url) == expected


def test_text_of_unknown_meaning_is_cut_rather_than_shown() -> None:
    assert shown("s3://k:a+b@host/x+y?c+d@e") == "s3://host/x+y"
    assert shown("a+s3://k:s@b/x+s3://k:s@c/y") == "a+s3://b/x+s3://c/y"
    assert shown("no url@ at+all?") == "no url@ at+all?"
