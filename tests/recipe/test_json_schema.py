"""The editors' schema says the same as the reader."""

import json

import jsonschema
import pytest
import yaml

from pipeline.recipe import ModelEntry, NamedPatterns, PipelineSettings, Recipe, recipe_schema
from pipeline.recipe.content import keys_of

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


@pytest.mark.parametrize("path", ["a", "a+b", "a@b", "s3://a@b/c", "s3://a/b+c", "git+ssh://a/b", "", "~/x y", "c:/a"])
def test_paths_agree_with_the_reader(path: str) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": path}]}
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
