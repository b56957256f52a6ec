"""What plan, report and card say of a merge that solves linear systems."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from pipeline.engine.run_folder import REPORT
from pipeline.engine.system_records import SystemRecord
from pipeline.merging import Resources, load_recipe, merge, plan_merge
from pipeline.planning.plan import Plan
from pipeline.reporting.plan_view import plan_summary
from pipeline.reporting.text_view import layer_patterns, plan_view, report_view
from pipeline.reporting.treatments import system_notes
from pipeline.storage import open_store
from tests.planning.plans import plan_of
from tests.support.families import make_family
from tests.support.moments import EMBEDDING, MATRICES, SHAPES, Moments, with_statistics

REST = sorted(set(SHAPES) - set(MATRICES))


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Moments:
    family = make_family(tmp_path_factory.mktemp("family"), 2, shapes=SHAPES)
    shapes = {name: SHAPES[name] for name in MATRICES}
    return with_statistics(family, ["input_gram", "output_gram"], shapes, outside={EMBEDDING: "an embedding"})


@pytest.fixture(scope="module")
def recipe(moments: Moments) -> Path:
    parameters = {"objective": "kfac", "iterations": 3, "off_diagonal": 0.5}
    pipeline = {"start": "task_arithmetic", "start_scale": 0.3}
    return moments.recipe("mats", models=[{"weight": 1}, {"weight": 3}], parameters=parameters, pipeline=pipeline)


@pytest.fixture(scope="module")
def report(recipe: Path) -> dict[str, Any]:
    return merge(str(recipe), str(recipe.parent / "out"), resources=Resources(executor="local"))


def printed(parts: Sequence[str | Table]) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


def test_the_plan_says_what_becomes_of_every_parameter(recipe: Path) -> None:
    planned = plan_merge(load_recipe(str(recipe))[0], open_store(str(recipe.parent / "none")), Resources(), probe=True)
    summary = plan_summary(planned.plan, planned.memory, planned.cost, planned.rates, planned.workers, planned.seconds)
    assert json.loads(json.dumps(summary)) == summary
    found = summary["treatments"]
    assert sorted(found["solved"]["names"]) == sorted(MATRICES)
    assert sorted(found["averaged"]["names"]) == REST
    assert found["copied"] == {"tensors": 0, "elements": 0, "names": []}
    assert sum(entry["elements"] for entry in found.values()) == summary["elements"]
    assert summary["solver"] == {
        "objective": "kfac", "rule": "iterative", "start": "task_arithmetic", "start_scale": 0.3, "iterations": 3,
        "tolerance": 1e-5, "off_diagonal": 0.5, "normalize": False, "prior": None,
        "statistics": [item.name for item in planned.plan.statistics],
    }  # fmt: skip
    assert summary["seconds"]["solve"] >= 0.0
    lines = list(plan_view(summary))
    assert "systems  kfac moments, iterative, start task_arithmetic, at most 3 iterations to 1e-05" in lines
    assert "solved   5 tensors, 276 elements" in lines
    assert any(line.startswith("averaged 3 tensors, 72 elements: model.embed_tokens.weight, ") for line in lines)
    assert not [line for line in lines if line.startswith(("groups", "copied"))]


def test_the_report_has_every_system(report: dict[str, Any], recipe: Path) -> None:
    assert json.loads((recipe.parent / "out" / REPORT).read_text()) == json.loads(json.dumps(report))
    assert [entry["tensor"] for entry in report["systems"]] == sorted(MATRICES)
    for entry in report["systems"]:
        assert (entry["iterations"], entry["converged"], entry["stopped"]) == (3, False, "iterations")
        assert 1e-5 < entry["relative_residual"] < 1.0
        assert len(entry["traces"]) == 2
        assert entry["null_directions"] == 0
    # Coefficients are of what is averaged only.
    assert [(group["name"], group["coefficients"]) for group in report["groups"]] == [("averaged", [0.25, 0.75])]
    assert any("5 of 5 systems ended before the tolerance was reached" in note for note in report["notes"])


def test_people_read_the_same(report: dict[str, Any], recipe: Path) -> None:
    text = printed(list(report_view(report, "out")))
    assert "solved 5 tensors, averaged 3 tensors; 5 systems did not reach the tolerance; 1 file" in text
    assert "coefficient" not in text
    card = (recipe.parent / "out" / "README.md").read_text()
    assert "5 tensors are solutions of linear systems with kfac moments" in card
    assert "at most 3 conjugate gradient steps from task_arithmetic; 3 averaged" in card
    assert f"| {report['models'][1]['model']} | 3 |" in card


def test_names_that_differ_by_their_layer_are_one_line() -> None:
    names = [f"model.layers.{layer}.norm.weight" for layer in (0, 1, 20)]
    found = layer_patterns(["model.norm.weight", *names, "head.0.bias"])
    assert found == ["model.norm.weight", "model.layers.*.norm.weight (3)", "head.0.bias"]


def record(plan: Plan, **facts: Any) -> SystemRecord:
    tensor = next(index for index, planned in enumerate(plan.tensors) if planned.system is not None)
    return SystemRecord(**{"tensor": tensor, "traces": (1.0, 1.0), "null_directions": 0, **facts})


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, ""),
        ({"null_directions": 4}, "4 directions that no model's statistics see keep the start's values"),
        ({"converged": False, "relative_residual": 0.25}, "with relative residuals of up to 2.5e-01"),
        ({"traces": (1.0, 2000.0)}, "weigh more than 1000 times differently"),
        ({"traces": (1.0, 0.0)}, "expert1 are zero everywhere, and so is their say, in lm_head.weight"),
        ({"traces": (0.0, 0.0)}, ""),
    ],
)
def test_notes_on_what_a_user_should_know(recipe: Path, facts: dict[str, Any], said: str) -> None:
    plan = plan_of(recipe)
    notes = system_notes(plan, [record(plan, **facts)])
    assert len(notes) == bool(said)
    assert all(said in note for note in notes)
