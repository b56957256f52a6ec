"""Merges from and to a real S3 server: the bits of local ones, and what goes wrong is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.engine.status import status
from pipeline.engine.verify import verify
from pipeline.errors import PipelineError
from pipeline.merging import merge
from pipeline.storage import open_store
from tests.support.adapters import Layout, linears, make_adapters
from tests.support.families import Family, make_family
from tests.support.s3 import KEY, SECRET, prefix, upload


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 3)


@pytest.fixture(scope="module")
def remote(family: Family, s3_url: str) -> dict[str, str]:
    """The family's folders in the bucket, by their local paths."""
    place = prefix(s3_url)
    return {str(folder): upload(folder, f"{place}/{folder.name}") for folder in (family.base, *family.models)}


def moved(recipe: Path, remote: dict[str, str], url: str) -> str:
    """Put a recipe into the bucket, its models named where they lie there."""
    text = recipe.read_text()
    for local, there in sorted(remote.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(local, there)
    assert "s3://" in text
    open_store(url).write("recipe.yaml", text.encode())
    return f"{url}/recipe.yaml"


def weights(url: str) -> dict[str, bytes]:
    """The weight files of an output."""
    store = open_store(url)
    return {path: store.read(path) for path in store.list() if path.endswith(".safetensors")}


@pytest.mark.parametrize("keys", [{}, {"scope": "tensor", "file_size": "20KB"}, {"file_size": "20KB"}])
def test_the_bits_are_those_of_a_local_merge(
    family: Family, remote: dict[str, str], s3_url: str, tmp_path: Path, keys: dict[str, object]
) -> None:
    recipe = family.recipe(pipeline=keys)
    merge(str(recipe), str(tmp_path / "out"))
    place = prefix(s3_url)
    report = merge(moved(recipe, remote, place), f"{place}/out")
    assert report["bytes_written"] > 0
    assert weights(f"{place}/out") == weights(str(tmp_path / "out"))
    output = open_store(f"{place}/out")
    assert status(output)["state"] == "committed"
    assert verify(output)["files"] == len(report["files"])
    assert merge(f"{place}/recipe.yaml", f"{place}/out")["fingerprint"] == report["fingerprint"]


def test_adapters_in_the_bucket(family: Family, remote: dict[str, str], s3_url: str, tmp_path: Path) -> None:
    modules = linears(family.base_values, "q_proj", "v_proj")
    adapters = make_adapters(tmp_path, family.base, [Layout(modules=modules, rank=rank) for rank in (2, 3, 4)])
    place = prefix(s3_url)
    there = {str(folder): upload(folder, f"{place}/{folder.name}") for folder in adapters.models}
    there[str(family.base)] = remote[str(family.base)]
    recipe = adapters.recipe(pipeline={"output": "adapter"})
    merge(str(recipe), str(tmp_path / "out"))
    merge(moved(recipe, there, place), f"{place}/out")
    assert weights(f"{place}/out") == weights(str(tmp_path / "out"))


def test_a_killed_merge_resumes_in_the_bucket(family: Family, remote: dict[str, str], s3_url: str) -> None:
    recipe = family.recipe(pipeline={"file_size": "20KB"})
    place = prefix(s3_url)
    whole = merge(moved(recipe, remote, place), f"{place}/whole")
    output = open_store(f"{place}/cut")

    class Cut(BaseException):
        pass

    def listener(event: object) -> None:
        if type(event).__name__ == "FileWritten":
            raise Cut

    with pytest.raises(Cut):
        merge(f"{place}/recipe.yaml", f"{place}/cut", listener=listener)
    assert "model.safetensors.index.json" not in output.list()
    report = merge(f"{place}/recipe.yaml", f"{place}/cut")
    assert report["resumed_files"] > 0
    assert [entry["sha256"] for entry in report["files"]] == [entry["sha256"] for entry in whole["files"]]


def test_a_wrong_secret_is_a_storage_error(family: Family, remote: dict[str, str], s3_url: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    entries = [{"model": remote[str(folder)]} for folder in family.models]
    recipe.write_text(yaml.safe_dump({"merge_method": "geometric_median", "models": entries}))
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "another"}
    command = [sys.executable, "-m", "pipeline", "merge", str(recipe), str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 5, done.stderr
    assert remote[str(family.models[0])] in done.stderr
    for secret in (KEY, SECRET, "another"):
        assert secret not in done.stderr + done.stdout


def test_no_credentials_in_what_a_merge_leaves(family: Family, remote: dict[str, str], s3_url: str) -> None:
    place = prefix(s3_url)
    merge(moved(family.recipe(), remote, place), f"{place}/out")
    output = open_store(f"{place}/out")
    for path in output.list():
        content = output.read(path)
        assert KEY.encode() not in content
        assert SECRET.encode() not in content


def test_a_recipe_says_where_the_server_is(family: Family, remote: dict[str, str], s3_url: str, tmp_path: Path) -> None:
    """The environment leads to nobody; every process of the merge takes the server from the plan."""
    place, endpoint = prefix(s3_url), os.environ["AWS_ENDPOINT_URL"]
    document = yaml.safe_load(family.recipe(pipeline={"file_size": "20KB"}).read_text())
    merge(str(family.recipe(pipeline={"file_size": "20KB"})), str(tmp_path / "whole"))
    document["pipeline"]["storage"] = {"s3": {"region": "nowhere-1"}, s3_url: {"endpoint_url": endpoint}}
    recipe = tmp_path / "recipe.yaml"
    text = yaml.safe_dump(document)
    for local, there in sorted(remote.items(), key=lambda pair: -len(pair[0])):
        text = text.replace(local, there)
    recipe.write_text(text)
    # Nobody listens there.
    environment = {**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "pipeline", "merge", str(recipe), f"{place}/out", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert weights(f"{place}/out") == weights(str(tmp_path / "whole"))
    assert open_store(f"{place}/out").leftovers() == ()


def test_a_missing_model_is_named(s3_url: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"merge_method": "linear", "models": [{"model": f"{s3_url}/nowhere"}]}))
    with pytest.raises(PipelineError) as caught:
        merge(str(recipe), str(tmp_path / "out"))
    assert "nowhere" in str(caught.value)
    assert "check the path and the credentials" in str(caught.value)
