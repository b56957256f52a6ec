"""The geometric median in a metric: merges of small families against dense vectors that were mapped beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import CheckpointError, RecipeError
from pipeline.events import Event, PassStarted
from pipeline.merging import Resources, load_recipe, merge, plan_merge
from pipeline.planning.blocks import block_of
from pipeline.storage import open_store
from tests.support.adapters import Layout, linears, make_adapters, materialised
from tests.support.cases import before_writing, refused, without_retention
from tests.support.families import Family, llama_shapes, load_folder, make_family, random_weights, save_model
from tests.support.metrics import by_diagonals, by_grams, random_diagonals, random_grams, save_metric
from tests.support.reference import assert_within_rounding, dense_median, digests

SHAPES = llama_shapes()
GRAMS, DIAGONALS = random_grams(SHAPES, 1), random_diagonals(SHAPES, 2)
OUTSIDE = {"model.embed_tokens.weight": "an embedding", "lm_head.weight": "a head"}
SCOPES: dict[str, Callable[[str], str]] = {
    "model": lambda name: "model",
    "block": block_of,
    "tensor": lambda name: name,
}
Map = Callable[[str, torch.Tensor], np.ndarray]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 5, dtype=torch.bfloat16, shards=2, loud=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Statistics of both kinds; keys and values share the Gram of the queries."""
    root = tmp_path_factory.mktemp("statistics")
    return {
        "gram": save_metric(root / "gram", GRAMS, "input_gram", outside=OUTSIDE),
        "diagonal": save_metric(root / "diagonal", DIAGONALS, "diagonal"),
    }


def recipe_of(
    family: Family,
    kind: str,
    folder: Path,
    *,
    name: str = "metric.yaml",
    pipeline: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Path:
    metric = {"kind": kind, "statistics": str(folder)}
    return family.recipe(name=name, pipeline={"metric": metric, **(pipeline or {})}, **keys)


def mapped(values: Mapping[str, torch.Tensor], names: list[str], mapping: Map) -> np.ndarray:
    return np.concatenate([mapping(name, values[name]) for name in names] or [np.zeros(0)])


def reference(
    family: Family, weights: list[float], group_of: Callable[[str], str], mapping: Map, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Merged tensors, coefficients by group, from mapped dense vectors; the weights' shares where nothing is seen."""
    groups: dict[str, list[str]] = {}
    for name in family.values[0]:
        groups.setdefault(group_of(name), []).append(name)
    merged, found = {}, {}
    for group, names in groups.items():
        points = np.stack([mapped(model, names, mapping) for model in family.values])
        shares = np.array(weights) / sum(weights)
        found[group] = dense_median(points, weights) if points.shape[1] else shares
        for name in names:
            exact = sum(c * m[name].double() for c, m in zip(found[group], family.values, strict=True))
            merged[name] = exact.to(dtype)  # type: ignore[union-attr]
    return merged, found


@pytest.mark.parametrize("kind", ["diagonal", "gram"])
@pytest.mark.parametrize(
    ("scope", "distances"), [("model", "gram"), ("model", "stream"), ("block", "gram"), ("tensor", "gram")]
)
def test_equals_the_dense_median_of_mapped_models(
    family: Family, folders: dict[str, Path], tmp_path: Path, kind: str, scope: str, distances: str
) -> None:
    weights = [1.0, 2.0, 0.5, 1.0, 1.5]
    pipeline = {"scope": scope, "distances": distances, "file_size": "20KB"}
    recipe = recipe_of(family, kind, folders[kind], pipeline=pipeline, weights=weights, name=f"{kind}-{scope}.yaml")
    report = merge(str(recipe), str(tmp_path / "out"))
    mapping = by_grams(GRAMS) if kind == "gram" else by_diagonals(DIAGONALS)
    merged, coefficients = reference(family, weights, SCOPES[scope], mapping, torch.bfloat16)
    assert {group["name"] for group in report["groups"]} == set(coefficients)
    for group in report["groups"]:
        np.testing.assert_allclose(group["coefficients"], coefficients[group["name"]], rtol=0, atol=1e-10)
        assert 0 <= group["relative_gap"] <= 1e-10
    found = load_folder(tmp_path / "out")
    assert_within_rounding(found, merged)
    names = {name: [n for n in SHAPES if SCOPES[scope](n) == name] for name in coefficients}
    for group in report["groups"]:
        written = mapped(found, names[group["name"]], mapping)
        points = [mapped(model, names[group["name"]], mapping) for model in family.values]
        wanted = [np.linalg.norm(point - written) for point in points]
        np.testing.assert_allclose(group["written"]["distances"], wanted, rtol=1e-9, atol=1e-14)
        base = mapped(family.base_values, names[group["name"]], mapping)
        np.testing.assert_allclose(
            group["norms"], [np.linalg.norm(point - base) for point in points], rtol=1e-9, atol=1e-14
        )


def test_the_identity_gives_the_plain_median(family: Family, tmp_path: Path) -> None:
    ones = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    folder = save_metric(tmp_path / "ones", ones, "diagonal")
    found = {}
    for name, recipe in (
        ("plain", family.recipe(name="plain.yaml")),
        ("metric", recipe_of(family, "diagonal", folder)),
    ):
        report = merge(str(recipe), str(tmp_path / name))
        found[name] = report["groups"][0]
        shares = [model["unchanged_share"] for model in report["models"]]
        found[name]["shares"] = shares
    np.testing.assert_allclose(found["metric"]["coefficients"], found["plain"]["coefficients"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["metric"]["distances"], found["plain"]["distances"], rtol=1e-12)
    np.testing.assert_allclose(found["metric"]["written"]["rounding"], found["plain"]["written"]["rounding"], rtol=1e-9)
    assert found["metric"]["shares"] == found["plain"]["shares"]


def test_identity_grams_give_the_plain_median_of_the_matrices(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name in GRAMS}
    family = make_family(tmp_path, 4, shapes=shapes)
    eyes = {name: np.eye(shape[1], dtype=np.float32) for name, shape in shapes.items()}
    recipe = recipe_of(family, "gram", save_metric(tmp_path / "eyes", eyes, "input_gram"))
    plain = merge(str(family.recipe(name="plain.yaml")), str(tmp_path / "plain"))
    report = merge(str(recipe), str(tmp_path / "metric"))
    one, other = (item["groups"][0] for item in (plain, report))
    np.testing.assert_allclose(one["coefficients"], other["coefficients"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(one["cosines"], other["cosines"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["diagonal", "gram"])
def test_scaling_the_metric_changes_nothing(
    family: Family, folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    arrays, stored = (GRAMS, "input_gram") if kind == "gram" else (DIAGONALS, "diagonal")
    found = {}
    for name, factor in (("one", 1.0), ("exact", 4.0**-12), ("small", 1e-8), ("large", 3e8)):
        scaled = {key: (value * np.float32(factor)).astype(np.float32) for key, value in arrays.items()}
        folder = save_metric(tmp_path / f"s{name}", scaled, stored, outside=OUTSIDE if kind == "gram" else None)
        report = merge(str(recipe_of(family, kind, folder)), str(tmp_path / name))
        found[name] = report["groups"][0]["coefficients"]
    for name in ("small", "large"):
        np.testing.assert_allclose(found[name], found["one"], rtol=0, atol=1e-7)
    assert found["exact"] == found["one"]
    assert digests(tmp_path / "exact") == digests(tmp_path / "one")


@pytest.mark.parametrize("kind", ["diagonal", "gram"])
def test_workers_threads_and_memory_leave_no_trace(
    family: Family, folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    recipe = recipe_of(family, kind, folders[kind], pipeline={"file_size": "20KB"})
    merge(str(recipe), str(tmp_path / "one"))
    small = without_retention(recipe, tmp_path / "three").memory_bytes
    merge(str(recipe), str(tmp_path / "three"), resources=Resources(workers=3, memory_bytes=small))
    assert digests(tmp_path / "three") == digests(tmp_path / "one")


def test_an_interrupted_merge_goes_on_to_the_same_bits(
    family: Family, folders: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_of(family, "gram", folders["gram"], pipeline={"file_size": "20KB"})
    merge(str(recipe), str(tmp_path / "whole"))

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(str(recipe), str(tmp_path / "out"), listener=before_writing(stop))
    events: list[Event] = []
    merge(str(recipe), str(tmp_path / "out"), listener=events.append)
    assert [event.name for event in events if isinstance(event, PassStarted)] == ["write"]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_statistics_may_lie_in_an_object_store(family: Family, folders: dict[str, Path], tmp_path: Path) -> None:
    store = open_store("memory://metric-test/gram")
    for file in folders["gram"].iterdir():
        store.write(file.name, file.read_bytes())
    merge(str(recipe_of(family, "gram", folders["gram"])), str(tmp_path / "local"))
    recipe = family.recipe(name="remote.yaml", pipeline={"metric": {"kind": "gram", "statistics": store.url}})
    report = merge(str(recipe), str(tmp_path / "remote"))
    assert any(store.url in note for note in report["notes"])
    assert digests(tmp_path / "remote") == digests(tmp_path / "local")


def test_distances_are_taken_over_within_one_metric_only(
    family: Family, folders: dict[str, Path], tmp_path: Path
) -> None:
    first = recipe_of(family, "gram", folders["gram"])
    merge(str(first), str(tmp_path / "first"))
    again = recipe_of(family, "gram", folders["gram"], weights=[1, 2, 1, 1, 1], name="again.yaml")
    others = {
        "other": recipe_of(family, "diagonal", folders["diagonal"], name="other.yaml"),
        "plain": family.recipe(name="plain.yaml"),
    }
    for name, recipe in {"again": again, **others}.items():
        report = merge(str(recipe), str(tmp_path / name), reuse=(str(tmp_path / "first"),))
        taken = any("were taken from" in note for note in report["notes"])
        assert taken == (name == "again"), name
    merge(str(others["plain"]), str(tmp_path / "alone"))
    assert digests(tmp_path / "plain") == digests(tmp_path / "alone")


def test_parameters_that_share_a_gram(family: Family, tmp_path: Path) -> None:
    share = {name: name.replace(".v_", ".q_") for name in GRAMS if ".v_proj" in name}
    grams = {name: GRAMS[share.get(name, name)] for name in GRAMS}
    results = []
    for name, shared in (("apart", {}), ("shared", share)):
        folder = save_metric(tmp_path / f"s{name}", grams, "input_gram", outside=OUTSIDE, share=shared)
        merge(str(recipe_of(family, "gram", folder)), str(tmp_path / name))
        results.append(digests(tmp_path / name))
    assert results[0] == results[1]


def test_what_the_metric_does_not_see_takes_the_coefficients(family: Family, tmp_path: Path) -> None:
    seen = {name: value for name, value in DIAGONALS.items() if "layers.1" in name}
    names = ["*.0.*", "*.2.*", "model.norm.*", "model.embed_tokens.weight", "lm_head.weight"]
    folder = save_metric(tmp_path / "s", DIAGONALS, "diagonal")
    recipe = recipe_of(family, "diagonal", folder, pipeline={"average": names}, out_dtype="float64")
    report = merge(str(recipe), str(tmp_path / "out"))
    wanted, coefficients = reference(family, [1.0] * 5, SCOPES["model"], by_diagonals(seen), torch.float64)
    np.testing.assert_allclose(report["groups"][0]["coefficients"], coefficients["model"], rtol=0, atol=1e-11)
    for name, value in load_folder(tmp_path / "out").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-12)
    (note,) = [note for note in report["notes"] if "metric of" in note]
    assert f"{len(SHAPES) - len(seen)} tensors of" in note
    assert "have no say in them" in note
    planned = plan_merge(load_recipe(str(recipe))[0], open_store(str(tmp_path / "p")), Resources(), probe=False).plan
    assert note in planned.notes


def test_tokens_fewer_than_inputs(family: Family, tmp_path: Path) -> None:
    grams = random_grams(SHAPES, 4, rank=5)
    folder = save_metric(tmp_path / "s", grams, "input_gram", outside=OUTSIDE)
    report = merge(str(recipe_of(family, "gram", folder)), str(tmp_path / "out"))
    _, coefficients = reference(family, [1.0] * 5, SCOPES["model"], by_grams(grams), torch.bfloat16)
    np.testing.assert_allclose(report["groups"][0]["coefficients"], coefficients["model"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["diagonal", "gram"])
def test_adapters_are_measured_as_the_models_they_stand_for(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    base = save_model(tmp_path / "base", random_weights(0))
    layouts = [Layout(modules=linears(SHAPES, *ends)) for ends in (("q_proj", "v_proj"), ("_proj",), ("down_proj",))]
    adapters = make_adapters(tmp_path, base, layouts)
    dense = materialised(adapters, tmp_path / "dense")
    found = []
    for name, family in (("a", adapters), ("d", dense)):
        recipe = recipe_of(family, kind, folders[kind], out_dtype="float64")
        group = merge(str(recipe), str(tmp_path / name))["groups"][0]
        found.append((group["coefficients"], group["distances"], load_folder(tmp_path / name)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-9)
    for name, value in found[0][2].items():
        torch.testing.assert_close(value, found[1][2][name], rtol=1e-9, atol=1e-12)


# What is refused.


def change(arrays: Mapping[str, np.ndarray], name: str, value: np.ndarray | None) -> dict[str, np.ndarray]:
    rest = {key: array for key, array in arrays.items() if key != name}
    return rest if value is None else {**rest, name: value}


Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
NAN = GRAMS[Q].copy()
NAN[3, 4] = np.nan
INDEFINITE = np.ones_like(GRAMS[Q]) * 2 - np.eye(32, dtype=np.float32)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("gram", None, ("there is no input Gram", Q, f"average: [{Q}]")),
        ("gram", np.eye(31, dtype=np.float32), ("shape [31, 31]", "[32, 32]", Q, "average")),
        ("gram", NAN, ("is nan, not a finite number", Q, "input gram", "collect the statistics again")),
        ("gram", INDEFINITE, ("no mean of outer products", Q)),
        ("diagonal", None, ("there is no diagonal", Q, f"average: [{Q}]")),
        ("diagonal", np.ones((32, 31), np.float32), ("shape [32, 31]", "[32, 32]", Q)),
        ("diagonal", -np.ones((32, 32), np.float32), ("is -1; a mean of squares is never negative", Q)),
        ("diagonal", np.full((32, 32), np.inf, np.float32), ("is inf, not a finite number", Q)),
    ],
)
def test_statistics_that_make_no_metric(
    family: Family, tmp_path: Path, kind: str, value: np.ndarray | None, words: tuple[str, ...]
) -> None:
    arrays, stored = (GRAMS, "input_gram") if kind == "gram" else (DIAGONALS, "diagonal")
    outside = OUTSIDE if kind == "gram" else None
    folder = save_metric(tmp_path / "s", change(arrays, Q, value), stored, outside=outside)
    refused(recipe_of(family, kind, folder), tmp_path / "out", CheckpointError, str(folder), *words)


def test_statistics_that_do_not_fit_at_all(family: Family, folders: dict[str, Path], tmp_path: Path) -> None:
    everything = recipe_of(family, "gram", folders["gram"], pipeline={"average": ["*"]})
    refused(everything, tmp_path / "out", CheckpointError, "input Gram of no tensor that is merged")
    missing = recipe_of(family, "gram", folders["gram"], pipeline={"average": ["nothing.*"]})
    refused(missing, tmp_path / "out", RecipeError, "'nothing.*' matches no tensor")
    other = recipe_of(family, "gram", folders["diagonal"])
    refused(other, tmp_path / "out", CheckpointError, "holds no input Gram, only diagonal", "metric.kind")
    few = {name: value for name, value in GRAMS.items() if ".0." in name}
    some = recipe_of(family, "gram", save_metric(tmp_path / "few", few, "input_gram"))
    refused(some, tmp_path / "out", CheckpointError, "9 problems", "there is no input Gram", "more of this kind")
    refused(recipe_of(family, "gram", family.base), tmp_path / "out", CheckpointError, "is a model, not statistics")


def test_an_adapter_cannot_be_written(folders: dict[str, Path], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", random_weights(0))
    family = make_adapters(tmp_path, base, [Layout(modules=linears(SHAPES, "q_proj"))] * 2)
    recipe = recipe_of(family, "gram", folders["gram"], pipeline={"output": "adapter"})
    refused(recipe, tmp_path / "out", RecipeError, "`pipeline.output: adapter` is not possible with `metric`")


def test_statistics_that_change_during_the_merge(family: Family, tmp_path: Path) -> None:
    folder = save_metric(tmp_path / "s", GRAMS, "input_gram", outside=OUTSIDE)
    file = folder / "00001.statistics"

    def replace() -> None:
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)

    recipe = recipe_of(family, "gram", folder, pipeline={"file_size": "20KB"})
    listener = before_writing(replace)
    refused(recipe, tmp_path / "out", CheckpointError, "changed since", "00001.statistics", listener=listener)


def test_memory_is_planned_for_the_factors(family: Family, folders: dict[str, Path], tmp_path: Path) -> None:
    terms = {}
    for kind in ("gram", "diagonal"):
        recipe, _ = load_recipe(str(recipe_of(family, kind, folders[kind])))
        terms[kind] = plan_merge(recipe, open_store(str(tmp_path / "out")), Resources(), probe=False).memory.terms
    # At least two matrices of the largest size, and what making one of them takes.
    assert terms["gram"]["metric"] >= 8 * 48 * 48 * 2 + 12 * 48 * 48
    assert "metric" not in terms["diagonal"]
