"""Reading of YAML: lines, duplicates, merges, and files that attack the reader."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RecipeError
from pipeline.recipe.document import read_document


def test_lines_of_keys_and_values() -> None:
    document = read_document("a: 1\nb:\n  - x\n  - c:\n      5\n", "f")
    assert document.data == {"a": 1, "b": ["x", {"c": 5}]}
    assert [document.line(path) for path in [("a",), ("b",), ("b", 0), ("b", 1), ("b", 1, "c")]] == [1, 3, 3, 4, 5]
    assert [document.line(path, key=True) for path in [("b",), ("b", 1, "c")]] == [2, 4]
    assert document.line(("b", "tag of a union", 1, "c")) == 5
    assert document.line(("a", "no such key")) == 1
    assert document.line(()) == 1


def test_duplicate_keys_name_both_lines_and_the_first_value_is_kept() -> None:
    document = read_document("a: 1\nb: {c: 1, c: 2}\n\na: 2\n", "f")
    assert [str(problem) for _, problem in document.problems] == [
        "f:2: the key `c` is given twice, first in line 2 (keep one of them)",
        "f:4: the key `a` is given twice, first in line 1 (keep one of them)",
    ]
    assert document.data == {"a": 1, "b": {"c": 1}}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: [1, 2\nb: 3", 2, "this is no valid YAML: expected ',' or ']'"),
        ("a: 'x", 1, "this is no valid YAML: found unexpected end of stream"),
        ("a: 1\n\tb: 2", 2, "this is no valid YAML: found character '\\t'"),
        ("a: *x", 1, "found undefined alias 'x'"),
        ("a: 1\n---\nb: 2", 2, "there is more than one document in the file (write one merge per file)"),
    ],
)
def test_syntax_errors_have_a_line(text: str, line: int, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_document(text, "f")
    assert str(error.value).startswith(f"f:{line}: ")
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_empty_text_is_an_error_or_null(text: str) -> None:
    if text.startswith("---"):
        assert read_document(text, "f").data is None
        return
    with pytest.raises(RecipeError, match="f: the recipe is empty"):
        read_document(text, "f")


def test_control_characters_are_no_yaml() -> None:
    with pytest.raises(RecipeError, match="f: this is no YAML text: "):
        read_document("a: \x00", "f")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!python/object/apply:os.system [ls]", "the YAML tag !!python/object/apply:os.system is not allowed"),
        ("a: !!set {b}", "the YAML tag !!set is not allowed"),
        ("a: !own b", "the YAML tag !own is not allowed"),
        ("a: !!binary aGk=", "the YAML tag !!binary is not allowed"),
        ("a: !!int x", "'x' is no int"),
        ("a: !!bool x", "'x' is no bool"),
        ("1: a", "the key `1` is not text (put it in quotes)"),
        ("yes: a", "the key `yes` is not text"),
        ("? [a]\n: b", "the key of this entry is not text"),
        ("<<: 3", "`<<` merges mappings only"),
    ],
)
def test_odd_yaml_is_a_problem_and_never_an_object(text: str, said: str) -> None:
    document = read_document(text, "f")
    assert [said in str(problem) for _, problem in document.problems] == [True]
    assert document.data in ({"a": None}, {})


def test_dates_and_equal_signs_are_text() -> None:
    assert read_document("{a: 2024-05-06, b: =}", "f").data == {"a": "2024-05-06", "b": "="}


def test_aliases_and_merges_read_as_the_yaml_library_does() -> None:
    text = """
one: &one {a: 1, b: 2}
two: &two {b: 3, c: 4}
own: {<<: [*one, *two], a: 9}
list: [*one, *one]
"""
    document = read_document(text, "f")
    assert document.data == yaml.safe_load(text)
    assert document.problems == ()
    assert document.line(("own", "b")) == 2
    assert document.line(("own", "c"), key=True) == 3


def test_alias_bomb_is_refused() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
    with pytest.raises(RecipeError, match="more than 200000 values once its aliases are expanded"):
        read_document(bomb, "f")


def test_merge_bomb_is_refused() -> None:
    bomb = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 30))
    with pytest.raises(RecipeError, match="more than 200000 values"):
        read_document(bomb, "f")


@pytest.mark.parametrize("text", ["&a [*a]", "&a {b: *a}", "&a {<<: *a}", "[" * 40 + "]" * 40])
def test_endless_nesting_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="f:1: the YAML nests too deeply"):
        read_document(text, "f")


def test_nesting_beyond_the_stack_is_refused() -> None:
    with pytest.raises(RecipeError, match="f: the YAML is nested too deeply"):
        read_document("[" * 20_000, "f")


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(_PLAIN)
def test_plain_data_comes_back(data: object) -> None:
    document = read_document(yaml.safe_dump(data), "f")
    assert document.data == data
    assert document.problems == ()


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#\n ,<?%@`1.", max_size=30))
def test_any_text_is_data_or_a_recipe_error(text: str) -> None:
    lines = text.count("\n") + 1
    try:
        document = read_document(text, "f")
    except RecipeError as error:
        found = error.problems
    else:
        found = tuple(problem for _, problem in document.problems)
    assert all(problem.where == "f" or 1 <= int(problem.where.removeprefix("f:")) <= lines for problem in found)
