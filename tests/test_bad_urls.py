"""URLs that name a place by another word, or none at all: nothing is deleted, nothing is written beside them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.errors import OutputError, PipelineError, RecipeError
from pipeline.merging import merge
from pipeline.storage import open_store
from tests.support.cases import run_cli, tiny_family
from tests.support.families import Family
from tests.support.s3 import prefix, upload

PASSWORD = "hunter22"


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return tiny_family(tmp_path)


def content(url: str) -> dict[str, str]:
    """Every object below a URL with its version."""
    store = open_store(url)
    return {path: store.stat(path).version for path in store.list()}


def recipe_of(root: Path, *models: str) -> Path:
    """Write a recipe over models by their URLs."""
    recipe = root / "urls.yaml"
    entries = [{"model": model} for model in models]
    recipe.write_text(yaml.safe_dump({"merge_method": "geometric_median", "models": entries}))
    return recipe


@pytest.mark.parametrize(
    ("model", "output", "below", "overwrite"),
    [
        ("s3", "s3a", "", True),
        ("s3", "s3a", "", False),
        ("s3", "s3a", "/merged", True),
        ("s3a", "s3", "", True),
        ("S3", "s3A", "", True),
        ("s3", "s3", "", True),
    ],
)
def test_a_source_in_a_bucket_by_another_scheme(
    family: Family, s3_url: str, tmp_path: Path, model: str, output: str, below: str, overwrite: bool
) -> None:
    place = prefix(s3_url)
    folders = [upload(folder, f"{place}/{folder.name}") for folder in family.models]
    recipe = recipe_of(tmp_path, *(url.replace("s3", model, 1) for url in folders))
    before = content(place)
    with pytest.raises(OutputError, match="overlaps with the folder of model"):
        merge(str(recipe), folders[1].replace("s3", output, 1) + below, overwrite=overwrite)
    assert content(place) == before


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("form", ["local://{}", "LOCAL://{}", "file://{}", "/{}", "{}/./", "local://localhost{}"])
@pytest.mark.parametrize("at", ["output", "model"])
def test_a_source_in_a_folder_by_another_scheme(
    family: Family, tmp_path: Path, form: str, at: str, overwrite: bool
) -> None:
    source = family.models[1]
    alias = form.format(source)
    recipe = recipe_of(tmp_path, str(family.models[0]), alias if at == "model" else str(source))
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="overlaps with the folder of model"):
        merge(str(recipe), alias if at == "output" else str(source), overwrite=overwrite)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("below", ["", "new"])
def test_a_source_that_is_mounted_at_another_place(family: Family, tmp_path: Path, overwrite: bool, below: str) -> None:
    source, mounted = family.models[1], tmp_path / "mounted"
    mounted.mkdir()
    command = ["mount", "--bind", str(source), str(mounted)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a folder can only be mounted by root")
    try:
        before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
        with pytest.raises(OutputError, match="overlaps with the folder of model"):
            merge(str(family.recipe()), str(mounted / below), overwrite=overwrite)
        assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("form", ["s3:///{}", "s3://{}//", "s3:/{}", "s3://{}/./", "s3://{}/x/..", "s3:////{}"])
def test_output_urls_that_hide_what_lies_there(
    family: Family, s3_url: str, tmp_path: Path, form: str, overwrite: bool
) -> None:
    place = prefix(s3_url)
    foreign = upload(family.models[0], f"{place}/foreign")
    before = content(s3_url)
    url = form.format(foreign.removeprefix("s3://"))
    with pytest.raises(RecipeError) as caught:
        merge(str(family.recipe()), url, overwrite=overwrite)
    assert caught.value.exit_code == 2
    assert content(s3_url) == before
    assert not Path("s3:").exists()


def test_doubled_slashes_within_a_url(family: Family, s3_url: str) -> None:
    place = prefix(s3_url)
    foreign = upload(family.models[0], f"{place}/foreign")
    with pytest.raises(RecipeError, match=r"'\.\.' part in its path"):
        merge(str(family.recipe()), foreign.replace("/foreign", "//foreign"))
    assert content(place).keys() == {f"foreign/{path.name}" for path in family.models[0].iterdir()}


def test_models_and_recipes_by_such_urls(family: Family, s3_url: str, tmp_path: Path) -> None:
    place = prefix(s3_url)
    folders = [upload(folder, f"{place}/{folder.name}") for folder in family.models]
    bad = [folders[0].replace("s3://", "s3:///"), folders[1].replace(place, f"{place}/")]
    with pytest.raises(RecipeError) as caught:
        merge(str(recipe_of(tmp_path, *bad, folders[2])), str(tmp_path / "out"))
    assert [problem.where for problem in caught.value.problems] == [f"model {url}" for url in bad]
    assert not (tmp_path / "out").exists()
    open_store(place).write("r.yaml", recipe_of(tmp_path, *folders).read_bytes())
    with pytest.raises(RecipeError, match="an empty"):
        merge(f"{place}//r.yaml", str(tmp_path / "out"))


def test_a_scheme_in_capitals_is_the_same_place(family: Family, s3_url: str, tmp_path: Path) -> None:
    place = prefix(s3_url)
    folders = [upload(folder, f"{place}/{folder.name}") for folder in family.models]
    recipe = recipe_of(tmp_path, *(url.replace("s3", "S3", 1) for url in folders))
    report = merge(str(recipe), f"{place}/out".replace("s3", "S3", 1))
    assert merge(str(recipe), f"{place}/out")["fingerprint"] == report["fingerprint"]


USER = f"s3://key:{PASSWORD}@bkt/x"


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "{recipe}", USER),
        ("merge", f"{USER}/r.yaml", "{out}"),
        ("merge", "{bad}", "{out}"),
        ("plan", "{recipe}", USER),
        ("plan", "{bad}", "{out}"),
        ("status", USER),
        ("verify", USER),
        ("clean", USER),
        ("batch", USER, "{out}"),
        ("batch", "{recipes}", USER),
    ],
    ids=lambda words: f"{words[0]}-{words[1].count('@')}",
)
def test_a_password_in_a_url_is_refused_at_once_and_shown_nowhere(
    family: Family, tmp_path: Path, words: tuple[str, ...]
) -> None:
    recipe = family.recipe()
    (tmp_path / "recipes").mkdir()
    shutil.copy(recipe, tmp_path / "recipes" / "r.yaml")
    places = {
        "recipe": recipe,
        "recipes": tmp_path / "recipes",
        "out": tmp_path / "out",
        "bad": recipe_of(tmp_path, str(family.models[0]), USER),
    }
    done = run_cli(*(word.format(**places) for word in words))
    assert done.returncode == RecipeError.exit_code, done.stderr
    assert "a user has no meaning here" in done.stderr
    assert "environment" in done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    for path in (tmp_path / "out").rglob("*"):
        assert PASSWORD not in (path.read_text(errors="replace") if path.is_file() else path.name)


def test_a_model_on_the_web_takes_no_password(family: Family, tmp_path: Path) -> None:
    """Workers would read by the plan's URL, which has none."""
    recipe = recipe_of(tmp_path, str(family.models[0]), f"http://me:{PASSWORD}@127.0.0.1:9/model")
    with pytest.raises(RecipeError, match=r"model http://127.0.0.1:9/model: a user has no meaning here") as caught:
        merge(str(recipe), str(tmp_path / "out"))
    assert PASSWORD not in str(caught.value)


def test_the_root_of_all_buckets_is_not_cleaned() -> None:
    done = run_cli("clean", "s3://")
    assert done.returncode == RecipeError.exit_code
    assert "names no bucket" in done.stderr


def test_a_folder_that_is_not_there_is_not_clean(tmp_path: Path) -> None:
    done = run_cli("clean", tmp_path / "nowhere")
    assert done.returncode == 5
    assert f"{tmp_path}/nowhere: there is no such folder" in done.stderr


@pytest.mark.parametrize("call", ["merge", "plan"])
def test_the_web_is_no_output(family: Family, call: str) -> None:
    done = run_cli(call, family.recipe(), "http://127.0.0.1:9/out")
    assert done.returncode == OutputError.exit_code, done.stderr
    assert "http cannot be written" in done.stderr


def test_an_empty_key_of_storage(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe(pipeline={"storage": {"": {}}})
    with pytest.raises(PipelineError, match="neither a scheme nor a URL prefix") as caught:
        merge(str(recipe), str(tmp_path / "out"))
    assert caught.value.exit_code == 2
