"""The editors' schema says the same as the reader."""

import json

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recipe import ModelEntry, NamedPatterns, PipelineSettings, Recipe, recipe_schema
from pipeline.recipe.content import keys_of
from pipeline.recipe.values import RefusalError, read_model

from .examples import ACCEPTED, METHODS, problems
from .refused import REFUSED

SCHEMA = recipe_schema(METHODS)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_schema_is_valid_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts_what_the_reader_accepts(name: str) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(ACCEPTED[name]))] == []


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_the_reader_refuses(name: str) -> None:
    assert not VALIDATOR.is_valid(yaml.safe_load(REFUSED[name][0]))


@pytest.mark.parametrize(
    "size",
    ["5GB", "5 gb", "1.5KiB", "7", "7B", "5G", "5GiBs", "-1", "5i", "5iB", "1e9", "", "2 TIB", "3PB", "1.GB", 3, -3],
)
def test_sizes_agree_with_the_reader(size: object) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "a"}], "pipeline": {"file_size": size}}
    assert VALIDATOR.is_valid(recipe) == (problems(yaml.safe_dump(recipe)) == [])


@pytest.mark.parametrize(
    "number", ["1e-5", "+2", "-2", ".5", "5.", "0", "0.0e3", "00.10", "1_0", "0x1", "nan", "e5", ".", "1e", " 1 ", True]
)
@pytest.mark.parametrize("method", ["linear", "geometric_median"])
def test_numbers_agree_with_the_reader(number: object, method: str) -> None:
    recipe = {"merge_method": method, "models": [{"model": "a"}], "parameters": {"weight": number}}
    assert VALIDATOR.is_valid(recipe) == (problems(yaml.safe_dump(recipe)) == [])


# As YAML users meet them; the test below draws the odd ones.
PLAIN_PATHS = ["a", "a@b", "s3://a@b/c", "git+ssh://a/b", "", "~/x y", "c:/a", "c:\\a\\", r"a\+b"]
ADAPTER_PATHS = ["a+b", "s3://a/b+c", "+", "a+", "+b", "a+b+c", "a@1+b", "a+b@1", "a+s3://b@1", "s3://k:s+s@b/x"]


@pytest.mark.parametrize("path", [*PLAIN_PATHS, *ADAPTER_PATHS])
def test_paths_agree_with_the_reader(path: str) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": path}]}
    assert VALIDATOR.is_valid(recipe) == (problems(yaml.safe_dump(recipe)) == [])


@given(st.text(alphabet="a\\+@:/ ", max_size=14))
def test_any_notation_agrees_with_the_reader(model: str) -> None:
    try:
        read = read_model(model)
    except RefusalError:
        read = None
    assert VALIDATOR.is_valid({"merge_method": "linear", "models": [{"model": model}]}) == (read is not None)


@pytest.mark.parametrize("output", ["model", "adapter", None, "full"])
@pytest.mark.parametrize("rank", [8, 0, -1, True, 1.5, "8", None])
def test_ranks_agree_with_the_reader(output: object, rank: object) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "a"}], "pipeline": {"output": output, "rank": rank}}
    assert VALIDATOR.is_valid(recipe) == (problems(yaml.safe_dump(recipe)) == [])


def test_every_key_and_parameter_is_described() -> None:
    properties = SCHEMA["properties"]
    assert isinstance(properties, dict)
    pipeline = properties["pipeline"]["properties"]
    sets = pipeline["scope"]["anyOf"][1]["items"]["properties"]
    entry = properties["models"]["items"]["properties"]
    for model, found in [
        (Recipe, properties),
        (ModelEntry, entry),
        (PipelineSettings, pipeline),
        (NamedPatterns, sets),
    ]:
        assert [key for key in keys_of(model) if not found[key]["description"]] == []
    for condition, method in zip(SCHEMA["allOf"], METHODS.values(), strict=False):
        settings = condition["then"]["properties"]["parameters"]["properties"]
        assert {p.name: p.description for p in method.parameters} == {
            p.name: settings[p.name]["description"] for p in method.parameters
        }
