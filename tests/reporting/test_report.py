"""The report of a real merge, checked against the tensors on disk."""

import json
import math
from typing import Any

import pytest
import torch

from pipeline.checkpoints.tables import read_table
from pipeline.engine.run_folder import DISTANCES, ITERATIONS, REPORT
from pipeline.merging import Resources, merge
from pipeline.storage import open_store
from tests.planning.plans import SMALL_SHAPES, small_family
from tests.support.families import Family, load_folder

WEIGHTS = [1.0, 2.0, 1.5, 1.0]


def flat(weights: dict[str, torch.Tensor], names: list[str] | None = None) -> torch.Tensor:
    """All values as one float64 vector."""
    return torch.cat([weights[name].double().flatten() for name in sorted(names or weights)])


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return small_family(tmp_path_factory.mktemp("family"), 4, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def report(family: Family) -> dict[str, Any]:
    recipe = family.recipe(weights=WEIGHTS, pipeline={"scope": "block"})
    return merge(str(recipe), str(family.root / "out"), resources=Resources(executor="local"))


def members(group: str) -> list[str]:
    return [name for name in SMALL_SHAPES if (group in name if group != "rest" else "layers" not in name)]


def test_the_report_is_what_lies_in_the_folder(report: dict[str, Any], family: Family) -> None:
    assert json.loads((family.root / "out" / REPORT).read_text()) == json.loads(json.dumps(report))


def test_it_says_what_went_in(report: dict[str, Any], family: Family) -> None:
    assert (report["schema"], report["method"], report["scope"]) == (1, "geometric_median", "block")
    assert report["base_model"] == str(family.base)
    assert [entry["model"] for entry in report["models"]] == [str(path) for path in family.models]
    assert [entry["bytes"] for entry in report["models"]] == [
        (path / "model.safetensors").stat().st_size for path in family.models
    ]
    assert report["weights"] == WEIGHTS
    assert report["recipe"]["merge_method"] == "geometric_median"
    base = flat(family.base_values)
    for entry, values in zip(report["models"], family.values, strict=True):
        assert entry["unchanged_share"] == float((flat(values) == base).double().mean())


def test_every_group_is_measured_as_it_is_written(report: dict[str, Any], family: Family) -> None:
    written = load_folder(family.root / "out")
    assert sorted(group["name"] for group in report["groups"]) == ["model.layers.0", "model.layers.1", "rest"]
    for group in report["groups"]:
        names = members(group["name"])
        merged, base = flat(written, names), flat(family.base_values, names)
        models = [flat(values, names) for values in family.values]
        assert group["elements"] == len(merged)
        distances = [float((merged - model).norm()) for model in models]
        assert group["written"]["distances"] == pytest.approx(distances, rel=1e-12)
        objective = math.fsum(weight * distance for weight, distance in zip(WEIGHTS, distances, strict=True))
        assert group["written"]["objective"] == pytest.approx(objective, rel=1e-12)
        exact = sum(c * model for c, model in zip(group["coefficients"], models, strict=True))
        assert group["written"]["rounding"] == pytest.approx(float((merged - exact).norm()), rel=1e-6)
        assert group["norms"] == pytest.approx([float((model - base).norm()) for model in models], rel=1e-12)
        first, second = models[0] - base, models[1] - base
        cosine = float(first @ second / first.norm() / second.norm())
        assert group["cosines"][0][1] == pytest.approx(cosine, abs=1e-12)


def test_every_group_is_certified(report: dict[str, Any], family: Family) -> None:
    for group in report["groups"]:
        models = [flat(values, members(group["name"])) for values in family.values]
        median = sum(c * model for c, model in zip(group["coefficients"], models, strict=True))
        distances = [float((median - model).norm()) for model in models]
        assert sum(group["coefficients"]) == pytest.approx(1.0, abs=1e-12)
        assert group["distances"] == pytest.approx(distances, rel=1e-9)
        objective = math.fsum(weight * distance for weight, distance in zip(WEIGHTS, distances, strict=True))
        assert group["objective"] == pytest.approx(objective, rel=1e-9)
        assert group["lower_bound"] <= group["objective"]
        assert 0 <= group["relative_gap"] <= 1e-10
        assert group["unique"] is True
        # No model and no mean does better.
        mean = sum(models) / len(models)
        for other in (*models, mean):
            value = math.fsum(w * float((other - model).norm()) for w, model in zip(WEIGHTS, models, strict=True))
            assert value >= group["lower_bound"]


def test_it_says_what_was_done(report: dict[str, Any], family: Family) -> None:
    files = {path.name: path for path in (family.root / "out").glob("*.safetensors")}
    assert {entry["name"]: entry["bytes"] for entry in report["files"]} == {
        name: path.stat().st_size for name, path in files.items()
    }
    assert report["bytes_written"] == sum(path.stat().st_size for path in files.values())
    elements = sum(math.prod(shape) for shape in SMALL_SHAPES.values())
    # One read: the family fits into the default memory.
    assert report["bytes_read"] == 5 * 2 * elements
    assert report["bytes_reused_from_memory"] == 4 * 2 * elements
    assert report["passes"] == 1.0
    assert (report["executor"], report["workers"], report["resumed_files"]) == ("local", 1, 0)
    assert all(value >= 0 for value in report["seconds"].values())
    assert min(report["peak_memory_bytes"].values()) > 10_000_000
    assert report["notes"] == []


def test_the_tables_beside_it(report: dict[str, Any], family: Family) -> None:
    store = open_store(str(family.root / "out"))
    table = read_table(store, DISTANCES)
    assert sorted(table["tensor"]) == sorted(SMALL_SHAPES)
    points = [family.base_values, *family.values]
    for name, elements, squares, unchanged in zip(
        table["tensor"], table["elements"], table["squared_distances"], table["unchanged"], strict=True
    ):
        assert elements == math.prod(SMALL_SHAPES[name])
        flats = [point[name].double().flatten() for point in points]
        wanted = [float((flats[i] - flats[j]).square().sum()) for i in range(5) for j in range(i + 1, 5)]
        assert squares == pytest.approx(wanted, rel=1e-12)
        assert unchanged == pytest.approx([float((value == flats[0]).double().mean()) for value in flats])
    iterations = read_table(store, ITERATIONS)
    assert set(iterations["group"]) == {group["name"] for group in report["groups"]}


def test_an_average_has_null_for_what_it_does_not_measure(family: Family) -> None:
    recipe = family.recipe("linear", name="linear.yaml")
    report = merge(str(recipe), str(family.root / "average"), resources=Resources(executor="local"))
    (group,) = report["groups"]
    assert group["coefficients"] == [0.25] * 4
    for key in ("objective", "lower_bound", "relative_gap", "iterations", "optimum", "unique", "distances", "norms"):
        assert group[key] is None
    assert [entry["unchanged_share"] for entry in report["models"]] == [None] * 4
    written = flat(load_folder(family.root / "average"))
    wanted = [float((written - flat(values)).norm()) for values in family.values]
    assert group["written"]["distances"] == pytest.approx(wanted, rel=1e-12)


def test_copies_and_ties_are_observed(family: Family) -> None:
    """Two copies of the base: a median that is not unique, of models that are no news."""
    models = family.models
    pair = Family(root=family.root, base=family.base, models=models[:2])
    report = merge(str(pair.recipe(name="pair.yaml")), str(family.root / "pair"), resources=Resources(executor="local"))
    assert [note.split(":")[0] for note in report["notes"]] == ["the geometric median is not unique in model"]
    assert report["groups"][0]["optimum"] == "segment"
    assert report["groups"][0]["unique"] is False
    copy = Family(root=family.root, base=family.base, models=[models[0], family.base, models[1]])
    report = merge(str(copy.recipe(name="copy.yaml")), str(family.root / "copy"), resources=Resources(executor="local"))
    assert f"{family.base} has the same values as the base model, {family.base}" in report["notes"]
