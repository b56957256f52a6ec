"""From recipes and files to plans."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError, PipelineError, RecipeError
from pipeline.merging import load_recipe
from pipeline.planning.sources import open_sources
from tests.planning.plans import SMALL_SHAPES, plan_and_sources, plan_of, small_family
from tests.support.families import Family, make_family, save_model


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return small_family(tmp_path)


def error(recipe: Path, kind: type[PipelineError]) -> PipelineError:
    with pytest.raises(kind) as caught:
        plan_of(recipe)
    return caught.value


def test_places_are_those_of_the_files(family: Family) -> None:
    """Each planned range, read by hand, holds the tensor."""
    plan = plan_of(family.recipe())
    folders = [family.base, *family.models]
    values = [family.base_values, *family.values]
    for item in plan.tensors:
        for index, source in enumerate(item.sources):
            path = folders[index] / plan.inputs[index].files[source.file].path
            raw = path.read_bytes()[source.start : source.start + 4 * item.elements]
            found = torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(item.shape)
            assert torch.equal(found, values[index][item.name])


def test_places_in_shards(tmp_path: Path) -> None:
    family = small_family(tmp_path, shards=3)
    plan = plan_of(family.recipe())
    assert [len(item.files) for item in plan.inputs] == [3] * 4
    assert {source.file for item in plan.tensors for source in item.sources} == {0, 1, 2}
    for item in plan.tensors:
        source = item.sources[2]
        raw = (family.models[1] / plan.inputs[2].files[source.file].path).read_bytes()
        found = torch.frombuffer(bytearray(raw[source.start : source.start + 4 * item.elements]), dtype=torch.float32)
        assert torch.equal(found, family.values[1][item.name].flatten())


def test_groups_by_scope(family: Family) -> None:
    names = {
        scope: [group.name for group in plan_of(family.recipe(pipeline={"scope": scope})).groups]
        for scope in ("model", "block", "tensor")
    }
    assert names["model"] == ["model"]
    assert sorted(names["block"]) == ["model.layers.0", "model.layers.1", "rest"]
    assert sorted(names["tensor"]) == sorted(SMALL_SHAPES)
    for scope in names:
        plan = plan_of(family.recipe(pipeline={"scope": scope}))
        for index, group in enumerate(plan.groups):
            assert group.elements == sum(item.elements for item in plan.tensors if item.group == index)
            assert group.coefficients is None


def test_groups_by_pattern(family: Family) -> None:
    scope = [{"name": "attention", "tensors": ["*.self_attn.*"]}, {"name": "mlp", "tensors": ["*.mlp.*"]}]
    plan = plan_of(family.recipe(pipeline={"scope": scope}))
    members = {
        group.name: sorted(item.name for item in plan.tensors if item.group == index)
        for index, group in enumerate(plan.groups)
    }
    assert {name: len(found) for name, found in members.items()} == {"attention": 2, "mlp": 2, "rest": 3}
    assert plan.settings.scope == "patterns"
    scope.append({"name": "typo", "tensors": ["*.mpl.*"]})
    assert "'*.mpl.*'" in str(error(family.recipe(pipeline={"scope": scope}), RecipeError))


def test_average_coefficients_are_in_the_plan(family: Family) -> None:
    plan = plan_of(family.recipe("linear", weights=[1.0, 1.0, 2.0]))
    assert [(group.name, group.coefficients) for group in plan.groups] == [("model", (0.25, 0.25, 0.5))]
    assert not plan.settings.measured
    assert plan.settings.scale == 1.0


def test_averages_by_layer_make_groups_of_equal_weights(family: Family) -> None:
    plan = plan_of(family.recipe("linear", weights=[[0.0, 1.0], [1.0, 0.0], 1.0]))
    assert {group.name for group in plan.groups} == {"weights 1", "weights 2"}
    found = {item.name: plan.groups[item.group].coefficients for item in plan.tensors}
    assert found["model.layers.0.mlp.up_proj.weight"] == found["model.norm.weight"] == (0.0, 0.5, 0.5)
    assert found["model.layers.1.mlp.up_proj.weight"] == (0.5, 0.0, 0.5)


def test_a_filter_that_matches_nothing_is_a_typo(family: Family) -> None:
    weights = [[{"filter": "mpl", "value": 0.5}, {"value": 1.0}], 1.0, 1.0]
    assert "mpl" in str(error(family.recipe("linear", weights=weights), RecipeError))


@pytest.mark.parametrize(
    ("keys", "dtypes"),
    [
        ({}, "F32"),
        ({"dtype": "bfloat16"}, "BF16"),
        ({"out_dtype": "float16"}, "F16"),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, "F32"),
    ],
)
def test_output_types_of_a_recipe(family: Family, keys: dict[str, object], dtypes: str) -> None:
    plan = plan_of(family.recipe(**keys))  # type: ignore[arg-type]
    assert {item.dtype for item in plan.tensors} == {dtypes}
    assert plan.settings.cast == ("BF16" if "dtype" in keys else None)


def test_without_a_word_the_models_types_are_promoted_and_the_bases_is_not(tmp_path: Path) -> None:
    weights = {"w": torch.ones(4, dtype=torch.float64), "ids": torch.arange(3)}
    family = Family(root=tmp_path, base=save_model(tmp_path / "base", weights, dtype=torch.float64))
    family.models = [
        save_model(tmp_path / "a", weights, dtype=torch.bfloat16),
        save_model(tmp_path / "b", weights, dtype=torch.float16),
    ]
    plan = plan_of(family.recipe())
    assert {item.name: (item.dtype, item.group) for item in plan.tensors} == {"w": ("F32", 0), "ids": ("I64", -1)}
    family.models.pop()
    assert {item.name: item.dtype for item in plan_of(family.recipe()).tensors} == {"w": "BF16", "ids": "I64"}


def test_the_donor_of_configuration_and_tokenizer(family: Family) -> None:
    assert plan_of(family.recipe()).donor == 0
    assert plan_of(family.recipe(tokenizer_source="base")).donor == 0
    assert plan_of(family.recipe(tokenizer_source=str(family.models[1]))).donor == 2
    assert plan_of(family.recipe(base=False)).donor == 0
    assert plan_of(family.recipe(base=False, tokenizer_source=str(family.models[2]))).donor == 2


def test_a_tokenizer_that_was_asked_for_must_be_there(family: Family) -> None:
    for path in family.models[1].glob("tokenizer*"):
        path.unlink()
    found = error(family.recipe(tokenizer_source=str(family.models[1])), CheckpointError)
    assert found.problems[0].where == f"model {family.models[1]}"
    assert plan_of(family.recipe()).notes == ()


def test_what_is_legal_but_odd_is_noted(tmp_path: Path) -> None:
    family = small_family(tmp_path, models=1)
    for path in family.models[0].glob("tokenizer*"):
        path.unlink()
    (family.models[0] / "config.json").unlink()
    notes = plan_of(family.recipe(base=False)).notes
    assert len(notes) == 4
    for words in ("no tokenizer files", "no config.json", "one model only", "no base_model"):
        assert sum(words in note for note in notes) == 1


def test_every_model_that_cannot_be_opened_is_named(family: Family) -> None:
    missing, empty = family.root / "missing", family.root / "empty"
    empty.mkdir()
    broken = family.models[0] / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    family.models += [missing, empty]
    found = error(family.recipe(), CheckpointError)
    assert [
        str(path) in problem.where for path, problem in zip([broken, missing, empty], found.problems, strict=True)
    ] == [True] * 3


def test_each_checkpoint_is_opened_once(family: Family) -> None:
    family.models.insert(1, family.base)
    sources = open_sources(load_recipe(str(family.recipe()))[0])
    assert sources.names == tuple(str(path) for path in (family.base, family.models[0], *family.models[2:]))
    assert [checkpoint.url for checkpoint in sources.members] == list(sources.names)
    assert sources.base == 0
    assert sources.models == (1, 0, 2, 3)


def test_a_base_that_linear_averages_too_is_a_model(family: Family) -> None:
    plan = plan_of(family.recipe("linear", parameters={"weight": 1.0}))
    assert plan.models == (1, 2, 3, 0)
    assert plan.groups[0].coefficients == (0.25,) * 4
    assert any("averages the base" in note for note in plan.notes)


def test_a_family_of_integers_has_nothing_to_merge(tmp_path: Path) -> None:
    family = Family(root=tmp_path, base=save_model(tmp_path / "base", {"ids": torch.arange(3)}))
    family.models = [save_model(tmp_path / "a", {"ids": torch.arange(3)})]
    assert "nothing to merge" in str(error(family.recipe(), CheckpointError))


def test_one_file_for_a_small_model_many_for_small_files(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2)
    whole, _ = plan_and_sources(family.recipe())
    assert [file.fused for file in whole.files] == [True]
    parts, sources = plan_and_sources(family.recipe(pipeline={"scope": "block", "file_size": "40KB"}))
    assert len(parts.files) > 3
    assert all(file.size_bytes <= 40_000 for file in parts.files)
    assert sum(file.size_bytes for file in parts.files) == sources.members[0].data_bytes
    layers = {parts.groups[parts.tensors[t].group].name for file in parts.files if file.fused for t in file.tensors}
    assert {"model.layers.0", "model.layers.1", "model.layers.2"} <= layers
    stream = plan_of(family.recipe(pipeline={"scope": "block", "distances": "stream"}))
    assert not any(file.fused for file in stream.files)


def test_credentials_in_urls_are_refused_all_together_and_not_shown(family: Family) -> None:
    urls = [f"memory://user:hunter2@{name}" for name in ("base", "a", "b")]
    document = {
        "merge_method": "geometric_median",
        "base_model": urls[0],
        "models": [{"model": url} for url in (f"{urls[0]}+{urls[1]}", urls[2])],
    }
    recipe = family.root / "secret.yaml"
    recipe.write_text(json.dumps(document))
    found = error(recipe, RecipeError)
    places = [problem.where for problem in found.problems]
    assert places == ["model memory://base", "model memory://a", "model memory://b"]
    assert "belong in the environment" in str(found)
    assert "hunter2" not in str(found)
