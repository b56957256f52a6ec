"""Stores that cannot be used as the recipe, the command line or the environment have them: exit code 2, and at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import s3fs

from pipeline.errors import PipelineError, RecipeError
from pipeline.merging import load_recipe, merge
from pipeline.storage import counters

from .support.cases import run_cli, tiny_family


def settle(recipe: Path, output: str) -> PipelineError:
    """Merge and return the error, which no request was repeated for."""
    before = counters()
    with pytest.raises(PipelineError) as caught:
        merge(str(recipe), output)
    assert counters().retries == before.retries
    assert caught.value.exit_code == 2
    return caught.value


def test_an_output_of_an_unknown_scheme(tmp_path: Path) -> None:
    assert "Protocol not known: foo" in str(settle(tiny_family(tmp_path, 2).recipe(), "foo://x"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nonsense": 1}, "unexpected keyword argument 'nonsense'"),
        ({"profile": "nobody-has-it"}, "The config profile (nobody-has-it) could not be found"),
        ({"region": "a b"}, "'a b' doesn't match a supported format"),
    ],
)
def test_options_that_show_when_the_output_is_opened(tmp_path: Path, options: dict[str, object], words: str) -> None:
    recipe = tiny_family(tmp_path, 2).recipe(pipeline={"storage": {"s3": options}})
    assert words in str(settle(recipe, "s3://bucket/out"))


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"loop": 1}, "loop"),
        ({"session": "x"}, "session"),
        ({"asynchronous": True}, "asynchronous"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"config_kwargs": {"max_pool_connections": -1}}, "config_kwargs.max_pool_connections"),
        ({"config_kwargs": {"read_timeout": "zwölf"}}, "config_kwargs.read_timeout"),
    ],
)
def test_options_that_the_recipe_is_refused_for_with_the_line(
    tmp_path: Path, options: dict[str, object], place: str
) -> None:
    recipe = tiny_family(tmp_path, 2).recipe(pipeline={"storage": {"s3": options}})
    error = settle(recipe, "s3://bucket/out")
    assert isinstance(error, RecipeError)
    line = 1 + recipe.read_text().split(f'"{place.rpartition(".")[2]}"')[0].count("\n")
    assert f"{recipe}:{line}: `pipeline.storage.s3.{place}`: is" in str(error)


def test_a_credential_with_a_line_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22hunter22\n")
    s3fs.S3FileSystem.clear_instance_cache()
    result = run_cli("merge", tiny_family(tmp_path, 2).recipe(), "s3://bucket/out", "--progress", "json")
    assert result.returncode == 2
    (problem,) = json.loads(result.stderr.splitlines()[-1])["problems"]
    assert problem["what"].startswith("AWS_SECRET_ACCESS_KEY holds a line break")
    assert problem["where"] == "s3://bucket/out"
    assert problem["remedy"] == "set AWS_SECRET_ACCESS_KEY again without it"
    assert "hunter22" not in result.stdout + result.stderr


@pytest.mark.parametrize("by", ["path", "memory"])
def test_a_recipe_as_long_as_a_model_is_not_read(tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.yaml"
    with file.open("wb") as stream:
        # Longer than the memory: to read it would end the process.
        stream.truncate(1 << 42)
    url = str(file)
    if by == "memory":
        from fsspec.implementations.memory import MemoryFileSystem

        url = f"memory://{tmp_path.name}/recipe.yaml"
        MemoryFileSystem().pipe_file(url, b"#" * 1_000_001)
        monkeypatch.setattr(MemoryFileSystem, "cat_file", None)
    with pytest.raises(RecipeError, match=r"^recipe .*recipe\.yaml: is .* long, which no recipe is: at most 1"):
        load_recipe(url)


def test_a_recipe_of_the_greatest_length_is_read(tmp_path: Path) -> None:
    recipe = tiny_family(tmp_path, 2).recipe()
    text = recipe.read_text()
    recipe.write_text(text + "\n" + "#" * (1_000_000 - len(text) - 1))
    assert load_recipe(str(recipe))[1].startswith(text)
