"""What is wrong with the store of several models is said once, what is wrong with a model for each."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import CheckpointError, SettingsError, StorageError
from pipeline.merging import load_recipe
from pipeline.planning.sources import open_sources
from pipeline.recipe import Recipe

MODELS = ("chat", "code", "math", "base")


def recipe(folder: Path, place: str, storage: str = "{}") -> Recipe:
    models = "".join(f"  - model: {place}/{name}\n" for name in MODELS)
    file = folder / "recipe.yaml"
    file.write_text(f"merge_method: geometric_median\nmodels:\n{models}pipeline: {{storage: {storage}}}\n")
    return load_recipe(str(file))[0]


def test_one_cause_for_all_models_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: MemoryFileSystem, path: str, **_: object) -> None:
        raise PermissionError(f"https://storage.example/{path}?list: denied")

    for verb in ("info", "ls", "find", "cat_file"):
        monkeypatch.setattr(MemoryFileSystem, verb, denied)
    with pytest.raises(StorageError) as caught:
        open_sources(recipe(tmp_path, f"memory://{uuid.uuid4().hex}"))
    (problem,) = caught.value.problems
    assert problem.where.endswith(" and 3 more")
    assert "/chat" in problem.where
    assert problem.what.endswith("denied (PermissionError)")


def test_an_unusable_setting_of_all_models_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        open_sources(recipe(tmp_path, "s3://bucket", "{s3: {config_kwargs: {nonsense: 1}}}"))
    (problem,) = caught.value.problems
    assert "nonsense" in problem.what
    assert problem.where.endswith(" and 3 more")


def test_models_that_are_not_there_are_each_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_sources(recipe(tmp_path, str(tmp_path)))
    assert len(caught.value.problems) == len(MODELS)
    for name, problem in zip(MODELS, caught.value.problems, strict=True):
        assert str(tmp_path / name) in str(problem)
