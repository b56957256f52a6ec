"""Whole merges against the dense reference: every scope, dtype, layout and scale."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.merging import merge
from pipeline.planning.blocks import block_of
from tests.support.cases import without_retention
from tests.support.families import Family, load_folder, make_family, save_model
from tests.support.reference import assert_within_rounding, digests, flatten, reference_median

SCOPES = {"model": lambda name: "model", "block": block_of, "tensor": lambda name: name}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Six sharded models in bfloat16, one of them far away."""
    return make_family(tmp_path_factory.mktemp("family"), 6, dtype=torch.bfloat16, shards=3, loud=4)


@pytest.mark.parametrize("distances", ["gram", "stream"])
@pytest.mark.parametrize("scope", SCOPES)
def test_equals_the_dense_median(family: Family, tmp_path: Path, scope: str, distances: str) -> None:
    weights = [1.0, 2.0, 0.5, 1.0, 1.0, 1.5]
    recipe = family.recipe(
        weights=weights, pipeline={"scope": scope, "distances": distances, "file_size": "20KB"}, name=f"{scope}.yaml"
    )
    report = merge(str(recipe), str(tmp_path / "out"))
    merged, coefficients = reference_median(family.values, weights, SCOPES[scope], torch.bfloat16)
    assert {group["name"] for group in report["groups"]} == set(coefficients)
    for group in report["groups"]:
        np.testing.assert_allclose(group["coefficients"], coefficients[group["name"]], rtol=0, atol=1e-11)
        assert 0 <= group["relative_gap"] <= 1e-10
        assert group["lower_bound"] <= group["objective"]
    assert len(report["files"]) > 2
    assert_within_rounding(load_folder(tmp_path / "out"), merged)


def test_both_distances_give_the_same_coefficients(family: Family, tmp_path: Path) -> None:
    found = {}
    for distances in ("gram", "stream"):
        recipe = family.recipe(pipeline={"distances": distances, "scope": "block"}, name=f"{distances}.yaml")
        report = merge(str(recipe), str(tmp_path / distances))
        found[distances] = np.array([group["coefficients"] for group in report["groups"]])
        assert (report["iterations_over_parameters"] > 0) == (distances == "stream")
    np.testing.assert_allclose(found["gram"], found["stream"], rtol=0, atol=1e-12)


def test_named_patterns_are_groups(family: Family, tmp_path: Path) -> None:
    scope = [{"name": "attention", "tensors": ["*.self_attn.*"]}, {"name": "mlp", "tensors": ["*.mlp.*"]}]

    def group_of(name: str) -> str:
        return "attention" if ".self_attn." in name else "mlp" if ".mlp." in name else "rest"

    report = merge(str(family.recipe(pipeline={"scope": scope}, name="patterns.yaml")), str(tmp_path / "out"))
    merged, coefficients = reference_median(family.values, [1.0] * 6, group_of, torch.bfloat16)
    assert {group["name"] for group in report["groups"]} == {"attention", "mlp", "rest"}
    for group in report["groups"]:
        np.testing.assert_allclose(group["coefficients"], coefficients[group["name"]], rtol=0, atol=1e-11)
    assert_within_rounding(load_folder(tmp_path / "out"), merged)


def test_the_outlier_hardly_counts(family: Family, tmp_path: Path) -> None:
    report = merge(str(family.recipe(name="plain.yaml")), str(tmp_path / "out"))
    coefficients = report["groups"][0]["coefficients"]
    assert coefficients[4] < 0.01
    assert min(coefficients[:4] + coefficients[5:]) > 0.15


def test_linear_equals_the_weighted_mean(family: Family, tmp_path: Path) -> None:
    weights = [1.0, 2.0, 0.5, 1.0, 1.0, 1.5]
    merge(str(family.recipe("linear", base=False, weights=weights, name="linear.yaml")), str(tmp_path / "out"))
    wanted = {
        name: (sum(w * m[name].double() for w, m in zip(weights, family.values, strict=True)) / 7.0).to(torch.bfloat16)
        for name in family.values[0]
    }
    assert_within_rounding(load_folder(tmp_path / "out"), wanted)


def test_linear_takes_gradients_and_filters_as_mergekit_does(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe(
        "linear",
        base=False,
        weights=[[{"filter": "mlp", "value": 0.0}, {"value": [0.0, 1.0]}], 1.0, 0.0, 0.0, 0.0, 0.0],
        name="gradient.yaml",
    )
    report = merge(str(recipe), str(tmp_path / "out"))
    found = load_folder(tmp_path / "out")
    first, second = family.values[:2]
    # Outside layers a gradient takes its first value, at the last of three layers its last: (1·a + 1·b) / 2.
    torch.testing.assert_close(found["lm_head.weight"], second["lm_head.weight"], rtol=0, atol=0)
    torch.testing.assert_close(
        found["model.layers.1.mlp.up_proj.weight"], second["model.layers.1.mlp.up_proj.weight"], rtol=0, atol=0
    )
    name = "model.layers.2.self_attn.q_proj.weight"
    wanted = ((first[name].double() + second[name].double()) / 2).to(torch.bfloat16)
    torch.testing.assert_close(found[name], wanted, rtol=0, atol=0)
    assert [group["coefficients"][0] for group in report["groups"]] == [0.0, pytest.approx(1 / 3), 0.5]


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_scale_lengthens_the_task_vector(family: Family, tmp_path: Path, scale: float) -> None:
    recipe = family.recipe(pipeline={"scale": scale}, out_dtype="float64", name="scale.yaml")
    report = merge(str(recipe), str(tmp_path / "out"))
    coefficients = report["groups"][0]["coefficients"]
    found = load_folder(tmp_path / "out")
    for name, value in found.items():
        base = family.base_values[name].double()
        median = sum(c * m[name].double() for c, m in zip(coefficients, family.values, strict=True))
        torch.testing.assert_close(value, base + scale * (median - base), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("rule", ["norm", "median_norm"])
def test_scale_by_the_norms_of_the_task_vectors(family: Family, tmp_path: Path, rule: str) -> None:
    recipe = family.recipe(pipeline={"scale": rule}, out_dtype="float64", name="norm.yaml", weights=[1, 2, 1, 1, 1, 1])
    report = merge(str(recipe), str(tmp_path / "out"))
    names = list(family.base_values)
    base = flatten(family.base_values, names)
    norms = np.array([np.linalg.norm(flatten(model, names) - base) for model in family.values])
    weights = np.array([1, 2, 1, 1, 1, 1])
    order = np.argsort(norms)
    median = norms[order[np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)]]
    wanted = np.average(norms, weights=weights) if rule == "norm" else median
    found = np.linalg.norm(flatten(load_folder(tmp_path / "out"), names) - base)
    assert found == pytest.approx(wanted, rel=1e-10)
    assert report["groups"][0]["scale"] > 1
    np.testing.assert_allclose(report["groups"][0]["norms"], norms, rtol=1e-10)
    warned = [note for note in report["notes"] if "scale: norm follows the task vector of" in note]
    assert bool(warned) == (rule == "norm")


def test_report_says_what_the_numbers_are(family: Family, tmp_path: Path) -> None:
    report = merge(str(family.recipe(out_dtype="float64", name="facts.yaml")), str(tmp_path / "out"))
    group = report["groups"][0]
    names = list(family.base_values)
    points = np.stack([flatten(model, names) for model in family.values])
    written = flatten(load_folder(tmp_path / "out"), names)
    base = flatten(family.base_values, names)
    distances = np.linalg.norm(points - written, axis=1)
    np.testing.assert_allclose(group["distances"], distances, rtol=1e-9)
    np.testing.assert_allclose(group["written"]["distances"], distances, rtol=1e-12)
    assert group["objective"] == pytest.approx(distances.sum(), rel=1e-10)
    tasks = points - base
    lengths = np.linalg.norm(tasks, axis=1)
    np.testing.assert_allclose(group["cosines"], tasks @ tasks.T / np.outer(lengths, lengths), atol=1e-10)
    shares = [(model == base).mean() for model in points]
    np.testing.assert_allclose([model["unchanged_share"] for model in report["models"]], shares, atol=1e-12)
    assert json.loads((tmp_path / "out/geomerge_report.json").read_text()) == report


def test_layouts_and_dtypes_may_differ_in_one_family(tmp_path: Path) -> None:
    family = make_family(tmp_path, 4, dtype=torch.float32)
    plain = merge(str(family.recipe(name="a.yaml")), str(tmp_path / "one"))
    save_model(family.models[1], family.values[1], shards=4)
    (family.models[1] / "model.safetensors").unlink()
    reordered = dict(reversed(family.values[2].items()))
    save_model(family.models[2], reordered)
    other = merge(str(family.recipe(name="b.yaml")), str(tmp_path / "two"))
    assert plain["groups"][0]["coefficients"] == other["groups"][0]["coefficients"]
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    save_model(family.models[3], family.values[3], dtype=torch.bfloat16)
    save_model(family.models[0], family.values[0], dtype=torch.float64)
    values = [
        family.values[0],
        family.values[1],
        family.values[2],
        {name: value.to(torch.bfloat16) for name, value in family.values[3].items()},
    ]
    report = merge(str(family.recipe(name="c.yaml")), str(tmp_path / "three"))
    merged, coefficients = reference_median(values, [1.0] * 4, lambda name: "model", torch.float64)
    np.testing.assert_allclose(report["groups"][0]["coefficients"], coefficients["model"], atol=1e-11)
    found = load_folder(tmp_path / "three")
    for name, value in found.items():
        torch.testing.assert_close(value, merged[name], rtol=1e-9, atol=1e-14)


def test_dtype_casts_the_inputs_as_in_mergekit(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3, dtype=torch.float32)
    recipe = family.recipe("linear", base=False, dtype="bfloat16", out_dtype="float32", name="cast.yaml")
    merge(str(recipe), str(tmp_path / "out"))
    found = load_folder(tmp_path / "out")
    for name, value in found.items():
        wanted = sum(model[name].to(torch.bfloat16).double() for model in family.values) / 3
        torch.testing.assert_close(value, wanted.float(), rtol=1e-7, atol=1e-12)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"


def test_a_group_that_fits_in_memory_is_read_once(family: Family, tmp_path: Path) -> None:
    one = merge(str(family.recipe(name="one.yaml")), str(tmp_path / "one"))
    assert one["passes"] == 1
    assert one["bytes_reused_from_memory"] > 0
    recipe = family.recipe(name="two.yaml", pipeline={"file_size": "20KB"})
    small = without_retention(recipe, tmp_path / "two")
    two = merge(str(recipe), str(tmp_path / "two"), resources=small)
    # The models are read twice and the base, which the write needs not, once.
    assert two["bytes_reused_from_memory"] == 0
    assert two["passes"] == pytest.approx(13 / 7, abs=0.01)
    assert load_folder(tmp_path / "one").keys() == load_folder(tmp_path / "two").keys()
