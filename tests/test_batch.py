"""A folder of recipes: what is merged, what is not and why, and what is left to read afterwards."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from pipeline import batch as batch_module
from pipeline.batch import FOLDER, SUMMARY, TABLE, Row, batch, exit_code, find_recipes
from pipeline.checkpoints.tables import read_table, read_table_metadata
from pipeline.cli import main
from pipeline.engine.claim import Claim
from pipeline.engine.executors import create_executor
from pipeline.engine.executors.base import Executor
from pipeline.engine.executors.local import LocalExecutor
from pipeline.engine.verify import verify
from pipeline.errors import CheckpointError, ClaimedError, OutputError, Problem, RecipeError, StorageError, WorkerError
from pipeline.events import Event, Note, PassStarted
from pipeline.merging import Resources, merge
from pipeline.reporting.batch_summary import STATES
from pipeline.reporting.batch_view import RecipeEnded, RecipeStarted
from pipeline.storage import counters, open_store
from tests.support.cases import MLP, edit, tiny_family
from tests.support.families import Family, make_family
from tests.support.s3 import prefix, upload

LOCAL = Resources(executor="local")
# Of one matrix: more than the headers of all models, which are read in pieces of 256 KB.
MODEL_BYTES = 1024 * 1024 * 4


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return tiny_family(tmp_path / "family")


def recipes_of(family: Family, *names: str) -> Path:
    """A folder of recipes: "linear" averages, "broken" names no model, anything else is a median."""
    folder = family.root / "recipes"
    folder.mkdir(exist_ok=True)
    for name in names:
        stem = name.partition(".")[0]
        members = replace(family, models=[*family.models, family.root / "nowhere"]) if stem == "broken" else family
        path = members.recipe("linear" if stem == "linear" else "geometric_median")
        path.rename(folder / (name if "." in name else f"{name}.yaml"))
    return folder


def states(summary: dict[str, Any]) -> dict[str, str]:
    return {merge["recipe"]: merge["state"] for merge in summary["merges"]}


def tree(folder: Path) -> dict[Path, int]:
    """All files below a folder with the instants of their last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_two_are_merged_and_one_is_reported(family: Family) -> None:
    recipes, outputs = recipes_of(family, "a", "broken", "linear.yml"), family.root / "outputs"
    heard: list[Event] = []
    summary = batch(str(recipes), str(outputs), resources=LOCAL, listener=heard.append)
    assert states(summary) == {"a": "committed", "broken": "failed", "linear": "committed"}
    assert summary["counts"] == {**dict.fromkeys(STATES, 0), "committed": 2, "failed": 1}
    assert summary["exit_code"] == CheckpointError.exit_code
    for name, recipe in (("a", "a.yaml"), ("linear", "linear.yml")):
        merge(str(recipes / recipe), str(family.root / "alone" / name), resources=LOCAL)
        (weights,) = (outputs / name).glob("*.safetensors")
        assert weights.read_bytes() == (family.root / "alone" / name / weights.name).read_bytes()
        assert verify(open_store(str(outputs / name)))["files"] == 1
    assert not (outputs / "broken").exists()
    started = [event for event in heard if isinstance(event, RecipeStarted)]
    assert [(event.recipe, event.number, event.count) for event in started] == [
        ("a", 1, 3), ("broken", 2, 3), ("linear", 3, 3)
    ]  # fmt: skip
    assert [event.state for event in heard if isinstance(event, RecipeEnded)] == ["committed", "failed", "committed"]


def test_the_same_models_are_measured_once(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3, shapes={"model.layers.0.mlp.weight": (1024, 1024)})
    recipes, outputs = recipes_of(family, "a"), tmp_path / "outputs"
    family.recipe(weights=[1, 2, 1]).rename(recipes / "b.yaml")
    turned = replace(family, models=family.models[::-1])
    turned.recipe().rename(recipes / "c.yaml")
    heard: list[Event] = []
    summary = batch(str(recipes), str(outputs), resources=LOCAL, listener=heard.append)
    assert states(summary) == dict.fromkeys("abc", "committed")
    measured = [merge["bytes_read"] > 3 * MODEL_BYTES for merge in summary["merges"]]
    # The base is read to measure only. The models of the last are the same in another order: measured all the same.
    assert measured == [True, False, True]
    assert [text for text in notes(heard) if "not measured again" in text and str(outputs / "a") in text]
    merge(str(recipes / "b.yaml"), str(tmp_path / "alone"), resources=LOCAL)
    (weights,) = (outputs / "b").glob("*.safetensors")
    assert weights.read_bytes() == (tmp_path / "alone" / weights.name).read_bytes()


def notes(heard: Sequence[Event]) -> list[str]:
    return [event.text for event in heard if isinstance(event, Note)]


def test_the_summary_is_kept_beside_the_outputs(family: Family) -> None:
    recipes, outputs = recipes_of(family, "a", "broken"), family.root / "outputs"
    summary = batch(str(recipes), str(outputs), resources=LOCAL)
    place = open_store(str(outputs / FOLDER))
    assert json.loads(place.read(SUMMARY)) == summary
    assert (summary["state"], summary["recipes"], summary["outputs"]) == ("finished", str(recipes), str(outputs))
    good, bad = summary["merges"]
    report = json.loads((outputs / "a" / "geomerge_report.json").read_text())
    for key in ("fingerprint", "bytes_read", "bytes_written"):
        assert good[key] == report[key]
    assert (good["error"], good["exit_code"], good["output"]) == ("", 0, str(outputs / "a"))
    assert "nowhere" in bad["error"]
    assert (bad["exit_code"], bad["fingerprint"], bad["bytes_written"]) == (3, "", 0)
    for entry in (good, bad):
        assert entry["seconds"] >= 0
        assert summary["started"] <= entry["started"] <= entry["ended"] <= summary["ended"]
        assert entry["started"].endswith("Z")
    table = read_table(place, TABLE)
    assert table == {key: [good[key], bad[key]] for key in good}
    assert read_table_metadata(place, TABLE)["exit_code"] == "3"
    # Nobody is at it any more.
    with Claim.take(place):
        pass


def test_a_second_run_reads_no_weights(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3, shapes={"model.layers.0.mlp.weight": (1024, 1024)})
    recipes, outputs = recipes_of(family, "a", "b", "broken"), family.root / "outputs"
    batch(str(recipes), str(outputs), resources=LOCAL)
    kept = {path: moment for path, moment in tree(outputs).items() if FOLDER not in path.parts}
    heard: list[Event] = []
    before = counters().read_bytes
    summary = batch(str(recipes), str(outputs), resources=LOCAL, listener=heard.append)
    assert states(summary) == {"a": "unchanged", "b": "unchanged", "broken": "failed"}
    # Headers, and what is read along with them: less than one of the models.
    assert counters().read_bytes - before < MODEL_BYTES
    assert not any(isinstance(event, PassStarted) for event in heard)
    assert {path: moment for path, moment in tree(outputs).items() if FOLDER not in path.parts} == kept
    assert [entry["bytes_read"] for entry in summary["merges"]] == [0, 0, 0]
    report = json.loads((outputs / "a" / "geomerge_report.json").read_text())
    assert summary["merges"][0]["fingerprint"] == report["fingerprint"]
    assert summary["exit_code"] == 3


def test_what_changed_is_replaced_only_when_told_to(family: Family) -> None:
    recipes, outputs = recipes_of(family, "a", "b"), family.root / "outputs"
    assert batch(str(recipes), str(outputs), resources=LOCAL)["exit_code"] == 0
    text = (recipes / "b.yaml").read_text()
    (recipes / "b.yaml").write_text(text.replace("geometric_median", "linear"))
    before = tree(outputs / "a") | tree(outputs / "b")
    summary = batch(str(recipes), str(outputs), resources=LOCAL)
    assert states(summary) == {"a": "unchanged", "b": "failed"}
    assert summary["exit_code"] == OutputError.exit_code
    assert "differs in the recipe" in summary["merges"][1]["error"]
    assert "--overwrite" in summary["merges"][1]["error"]
    assert tree(outputs / "a") | tree(outputs / "b") == before
    notes: list[str] = []
    summary = batch(
        str(recipes), str(outputs), resources=LOCAL, overwrite=True,
        listener=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )  # fmt: skip
    assert states(summary) == {"a": "unchanged", "b": "committed"}
    assert sum("is replaced" in note for note in notes) == 1
    assert {path: before[path] for path in tree(outputs / "a")} == tree(outputs / "a")
    merge(str(recipes / "b.yaml"), str(family.root / "alone"), resources=LOCAL)
    (weights,) = (outputs / "b").glob("*.safetensors")
    assert weights.read_bytes() == (family.root / "alone" / weights.name).read_bytes()
    assert set(states(batch(str(recipes), str(outputs), resources=LOCAL, overwrite=True)).values()) == {"unchanged"}


def test_changed_sources_are_merged_again_with_overwrite(family: Family) -> None:
    recipes, outputs = recipes_of(family, "a"), family.root / "outputs"
    first = batch(str(recipes), str(outputs), resources=LOCAL)["merges"][0]["fingerprint"]
    edit(family.models[0], lambda tensors: tensors[MLP].mul_(2))
    assert "the models' files" in batch(str(recipes), str(outputs), resources=LOCAL)["merges"][0]["error"]
    second = batch(str(recipes), str(outputs), resources=LOCAL, overwrite=True)
    assert states(second) == {"a": "committed"}
    assert second["merges"][0]["fingerprint"] != first


def test_overwrite_leaves_what_is_not_ours(family: Family) -> None:
    recipes, outputs = recipes_of(family, "a"), family.root / "outputs"
    (outputs / "a").mkdir(parents=True)
    (outputs / "a" / "thesis.safetensors").write_text("mine")
    for overwrite in (False, True):
        summary = batch(str(recipes), str(outputs), resources=LOCAL, overwrite=overwrite)
        assert states(summary) == {"a": "failed"}
        assert "is not empty and holds no merge of ours (choose other outputs;" in summary["merges"][0]["error"]
        assert "--overwrite" not in summary["merges"][0]["error"]
    assert [path.name for path in (outputs / "a").iterdir()] == ["thesis.safetensors"]


def test_overwrite_replaces_a_damaged_plan(family: Family) -> None:
    recipes, outputs = recipes_of(family, "a"), family.root / "outputs"
    batch(str(recipes), str(outputs), resources=LOCAL)
    (outputs / "a" / "_geomerge" / "plan.json").write_text("{half")
    assert states(batch(str(recipes), str(outputs), resources=LOCAL)) == {"a": "failed"}
    assert states(batch(str(recipes), str(outputs), resources=LOCAL, overwrite=True)) == {"a": "committed"}


def test_overwrite_replaces_neither_this_very_merge_nor_one_under_way(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, outputs = recipes_of(family, "a", "b"), family.root / "outputs"
    batch(str(recipes), str(outputs), resources=LOCAL)
    text = (recipes / "b.yaml").read_text()
    (recipes / "b.yaml").write_text(text.replace("geometric_median", "linear"))
    told: list[bool] = []

    def refused(recipe: str, output: str, *, overwrite: bool = False, **_: Any) -> dict[str, Any]:
        told.append(overwrite)
        kind = OutputError if recipe.endswith("a.yaml") else ClaimedError
        raise kind(Problem(what="is not to be had"))

    monkeypatch.setattr(batch_module, "merge", refused)
    summary = batch(str(recipes), str(outputs), resources=LOCAL, overwrite=True)
    assert states(summary) == {"a": "failed", "b": "busy"}
    assert told == [False, False]


def test_recipes_are_those_of_the_folder_itself_by_name(family: Family) -> None:
    recipes = recipes_of(family, "b", "a.yml", "c.d.yaml")
    for other in (".hidden.yaml", "notes.txt", "recipe.yaml~", "more/x.yaml"):
        (recipes / other).parent.mkdir(exist_ok=True)
        (recipes / other).write_text("nothing: here")
    rows = find_recipes(str(recipes), "s3://bucket/merged")
    assert [(row.recipe, row.recipe_url, row.output) for row in rows] == [
        ("a", f"{recipes}/a.yml", "s3://bucket/merged/a"),
        ("b", f"{recipes}/b.yaml", "s3://bucket/merged/b"),
        ("c.d", f"{recipes}/c.d.yaml", "s3://bucket/merged/c.d"),
    ]
    assert {row.state for row in rows} == {"not started"}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), ("holds no recipes", "*.yaml")),
        (("a.yaml", "a.yml", "b.yml", "b.yaml", "c.yaml"), ("a.yaml and a.yml", "b.yaml and b.yml", "one output")),
        ((f"{FOLDER}.yaml", "_geomerge.yml"), (f"may not be called {FOLDER}", "called _geomerge:")),
        ((os.fsdecode(b"caf\xe9.yaml"), "a.yaml"), (r"'caf\udce9.yaml' is no UTF-8 text",)),
    ],
)
def test_what_cannot_be_sorted_out_is_refused_before_work(
    tmp_path: Path, names: Sequence[str], words: Sequence[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    for name in names:
        (tmp_path / "recipes" / name).write_text("")
    with pytest.raises(RecipeError) as caught:
        batch(str(tmp_path / "recipes"), str(tmp_path / "outputs"))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "outputs").exists()


def test_a_file_is_no_folder_of_recipes(family: Family) -> None:
    recipes = recipes_of(family, "a")
    with pytest.raises(RecipeError, match=r"a\.yaml: is a file \(name its folder"):
        batch(str(recipes / "a.yaml"), str(family.root / "outputs"))


def test_suffixes_in_capitals_are_left_alone_and_told(family: Family) -> None:
    recipes, heard = recipes_of(family, "linear", "UP.YAML", "Next.Yml"), list[Event]()
    batch(str(recipes), str(family.root / "outputs"), resources=LOCAL, listener=heard.append)
    (text,) = notes(heard)[:1]
    assert text.endswith("left alone, for recipes end in .yaml or .yml: Next.Yml, UP.YAML")
    (recipes / "linear.yaml").unlink()
    with pytest.raises(RecipeError, match=r"rename Next\.Yml, UP\.YAML"):
        batch(str(recipes), str(family.root / "outputs"))


@pytest.mark.parametrize(
    ("outputs", "words"),
    [("recipes", "are the same folder"), ("recipes/out", "OUTPUTS lies in RECIPES"), (".", "RECIPES lies in OUTPUTS")],
)
def test_outputs_among_recipes_or_models_are_told(family: Family, outputs: str, words: str) -> None:
    recipes, heard = recipes_of(family, "linear"), list[Event]()
    summary = batch(str(recipes), str(family.root / outputs), resources=LOCAL, listener=heard.append)
    assert states(summary) == {"linear": "committed"}
    assert sum(words in text for text in notes(heard)) == 1
    among = [text for text in notes(heard) if "lies in OUTPUTS, and no recipe here makes it" in text]
    assert len(among) == (len(family.models) + 1 if outputs == "." else 0)


def test_a_folder_that_is_not_there_holds_no_recipes(tmp_path: Path) -> None:
    result = run("batch", tmp_path / "nowhere", tmp_path / "outputs")
    assert result.exit_code == RecipeError.exit_code
    assert f"error: recipes {tmp_path}/nowhere: holds no recipes" in result.stderr


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 0), 0), ((0, 3), 3), ((3, 3, 0), 3), ((3, 9), 1), ((143, 143), 143), ((1,), 1)]
)
def test_the_exit_code_is_that_of_the_failures(codes: Sequence[int], code: int) -> None:
    rows = [Row(recipe=f"{n}", recipe_url="", output="", exit_code=value) for n, value in enumerate(codes)]
    assert exit_code(rows) == code


class Counted:
    """Stands for `create_executor` and keeps what it made; one that is told to loses its first worker."""

    def __init__(self, *, lose: bool = False) -> None:
        self.made: list[LocalExecutor] = []
        self.closed: list[LocalExecutor] = []
        self._lose = lose

    def __call__(self, *_: object, **__: object) -> Executor:
        executor = LocalExecutor()
        if self._lose and not self.made:
            executor.map = self._lost  # type: ignore[method-assign]
        close = executor.close
        executor.close = lambda: (self.closed.append(executor), close())[1]  # type: ignore[method-assign,func-returns-value]
        self.made.append(executor)
        return executor

    def _lost(self, *_: object) -> Iterator[Any]:
        raise WorkerError(Problem(what="all workers are gone", remedy="the same command resumes"))
        yield


def test_all_recipes_share_the_workers(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted()
    monkeypatch.setattr(batch_module, "create_executor", counted)
    recipes = recipes_of(family, "a", "b", "broken", "linear")
    summary = batch(str(recipes), str(family.root / "outputs"), resources=replace(LOCAL, workers=2))
    assert states(summary) == {"a": "committed", "b": "committed", "broken": "failed", "linear": "committed"}
    assert len(counted.made) == 1
    assert {*map(id, counted.closed)} == {*map(id, counted.made)}


def test_lost_workers_do_not_spoil_the_next_merge(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(lose=True)
    monkeypatch.setattr(batch_module, "create_executor", counted)
    summary = batch(str(recipes_of(family, "a", "b", "c")), str(family.root / "outputs"), resources=LOCAL)
    assert states(summary) == {"a": "failed", "b": "committed", "c": "committed"}
    assert summary["exit_code"] == WorkerError.exit_code
    assert len(counted.made) == 2
    assert {*map(id, counted.closed)} == {*map(id, counted.made)}


def test_on_ray_the_same_actors_serve_all_recipes(
    family: Family, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Executor] = []

    def create(*arguments: Any, **keys: Any) -> Executor:
        made.append(create_executor(*arguments, **keys))
        return made[-1]

    monkeypatch.setattr(batch_module, "create_executor", create)
    recipes, outputs = recipes_of(family, "a", "broken", "linear"), family.root / "outputs"
    (recipes / "wide.yaml").write_text(family.recipe(pipeline={"file_size": "200"}).read_text())
    resources = Resources(executor="ray", address=ray_cluster, workers=2)
    summary = batch(str(recipes), str(outputs), resources=resources)
    wanted = {"a": "committed", "broken": "failed", "linear": "committed", "wide": "committed"}
    assert states(summary) == wanted, summary
    assert len(made) == 1
    assert states(batch(str(recipes), str(family.root / "local"), resources=LOCAL)) == wanted
    for path in (family.root / "local").glob("*/*.safetensors"):
        assert (outputs / path.parent.name / path.name).read_bytes() == path.read_bytes()


def test_an_output_that_another_run_writes_is_busy(family: Family) -> None:
    recipes, outputs = recipes_of(family, "a", "b"), family.root / "outputs"
    with Claim.take(open_store(str(outputs / "a"))):
        summary = batch(str(recipes), str(outputs), resources=LOCAL)
    assert states(summary) == {"a": "busy", "b": "committed"}
    assert f"process {os.getpid()}" in summary["merges"][0]["error"]
    assert summary["exit_code"] == OutputError.exit_code
    assert states(batch(str(recipes), str(outputs), resources=LOCAL)) == {"a": "committed", "b": "unchanged"}


def test_two_batches_do_not_meet(family: Family) -> None:
    recipes, outputs = recipes_of(family, "a"), family.root / "outputs"
    with Claim.take(open_store(str(outputs / FOLDER))):
        result = run("batch", recipes, outputs)
    assert result.exit_code == OutputError.exit_code
    assert f"process {os.getpid()}" in result.stderr
    assert not (outputs / "a").exists()
    assert run("batch", recipes, outputs).exit_code == 0


def test_an_interrupted_batch_says_how_far_it_came_and_goes_on(family: Family) -> None:
    recipes, outputs = recipes_of(family, "a", "b", "c"), family.root / "outputs"

    def interrupt(event: Event) -> None:
        if isinstance(event, RecipeStarted):
            interrupt.recipe = event.recipe  # type: ignore[attr-defined]
        if isinstance(event, PassStarted) and interrupt.recipe == "b":  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch(str(recipes), str(outputs), resources=LOCAL, listener=interrupt)
    summary = json.loads((outputs / FOLDER / SUMMARY).read_text())
    assert (summary["state"], summary["exit_code"]) == ("stopped", 130)
    assert states(summary) == {"a": "committed", "b": "stopped", "c": "not started"}
    assert [entry["exit_code"] for entry in summary["merges"]] == [0, 130, 130]
    assert read_table(open_store(str(outputs / FOLDER)), TABLE)["started"][2] == ""
    assert states(batch(str(recipes), str(outputs), resources=LOCAL)) == {
        "a": "unchanged", "b": "committed", "c": "committed"
    }  # fmt: skip


def test_an_error_that_is_not_ours_ends_its_recipe_alone(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def merged(recipe: str, *arguments: Any, **keys: Any) -> dict[str, Any]:
        if recipe.endswith("a.yaml"):
            raise KeyError(os.fsdecode(b"caf\xe9"))
        return merge(recipe, *arguments, **keys)

    monkeypatch.setattr(batch_module, "merge", merged)
    recipes, outputs = recipes_of(family, "a", "b"), family.root / "outputs"
    summary = batch(str(recipes), str(outputs), resources=LOCAL)
    assert states(summary) == {"a": "failed", "b": "committed"}
    assert (summary["exit_code"], summary["merges"][0]["exit_code"]) == (1, 1)
    assert summary["merges"][0]["error"].startswith("KeyError: ")
    assert json.loads((outputs / FOLDER / SUMMARY).read_text()) == summary
    assert read_table(open_store(str(outputs / FOLDER)), TABLE)["state"] == ["failed", "committed"]


@pytest.mark.parametrize("savable", [True, False])
def test_what_told_it_to_stop_is_not_hidden(family: Family, monkeypatch: pytest.MonkeyPatch, savable: bool) -> None:
    """Neither by what clearing up meets, nor by a summary that cannot be saved."""

    def stopped(*_: object, **__: object) -> dict[str, Any]:
        try:
            sys.exit(143)
        finally:
            raise StorageError(Problem(what="cannot be cleared up"))

    def unsaved(*_: object) -> dict[str, Any]:
        raise StorageError(Problem(what="cannot be written"))

    monkeypatch.setattr(batch_module, "merge", stopped)
    if not savable:
        monkeypatch.setattr(batch_module, "save", unsaved)
    recipes, outputs = recipes_of(family, "a", "b"), family.root / "outputs"
    with pytest.raises(SystemExit) as caught:
        batch(str(recipes), str(outputs), resources=LOCAL)
    assert caught.value.code == 143
    if savable:
        summary = json.loads((outputs / FOLDER / SUMMARY).read_text())
        assert states(summary) == {"a": "stopped", "b": "not started"}
        assert summary["exit_code"] == 143


def test_a_batch_in_the_handling_of_a_stop_goes_on(family: Family) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        summary = batch(str(recipes_of(family, "broken", "c")), str(family.root / "outputs"), resources=LOCAL)
    assert states(summary) == {"broken": "failed", "c": "committed"}


def test_outputs_need_a_place(family: Family) -> None:
    result = run("batch", recipes_of(family, "a"), "")
    assert result.exit_code == OutputError.exit_code
    assert "the URL of the outputs is empty" in result.stderr


def test_the_summary_of_a_batch_that_runs_can_be_read(family: Family) -> None:
    recipes, outputs = recipes_of(family, "a", "b"), family.root / "outputs"
    seen: list[dict[str, Any]] = []

    def look(event: Event) -> None:
        if isinstance(event, RecipeStarted) and event.number == 2:
            seen.append(json.loads((outputs / FOLDER / SUMMARY).read_text()))

    batch(str(recipes), str(outputs), resources=LOCAL, listener=look)
    assert [(summary["state"], states(summary)) for summary in seen] == [
        ("running", {"a": "committed", "b": "not started"})
    ]


def test_the_command_prints_a_table_and_ends_with_the_code(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    recipes, outputs = recipes_of(family, "a", "broken"), family.root / "outputs[x]"
    result = run("batch", recipes, outputs, "--executor", "local")
    assert result.exit_code == CheckpointError.exit_code
    for word in ("recipe", "committed", "failed"):
        assert word in result.stdout
    # Whole, in one line, as a URL must be; a table would break it.
    (told,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert told.startswith("broken: failed")
    assert str(family.root / "nowhere") in told
    assert result.stdout.splitlines()[-1].startswith(f"{outputs}: 2 recipes, 1 committed, 1 failed, ")
    result = run("batch", recipes, outputs, "--executor", "local", "--json")
    assert result.exit_code == CheckpointError.exit_code
    assert states(json.loads(result.stdout)) == {"a": "unchanged", "broken": "failed"}


def test_a_nightly_batch_in_the_bucket(tmp_path: Path, s3_url: str) -> None:
    """Three recipes and their models on a real server, one model with a NaN in it."""
    family = make_family(tmp_path / "family", 4, shapes={"model.layers.0.mlp.weight": (1024, 1024)})
    edit(family.models[3], lambda tensors: tensors["model.layers.0.mlp.weight"].view(-1)[7].fill_(torch.nan))
    place = prefix(s3_url)
    there = {folder: upload(folder, f"{place}/{folder.name}") for folder in (family.base, *family.models)}
    store = open_store(f"{place}/recipes")
    for name, models in (("chat", (0, 1, 2)), ("code", (0, 2)), ("poetry", (0, 1, 3))):
        text = replace(family, models=[family.models[number] for number in models]).recipe().read_text()
        for folder, url in there.items():
            text = text.replace(str(folder), url)
        store.write(f"{name}.yaml", text.encode())
    result = run("batch", f"{place}/recipes/chat.yaml", f"{place}/merged", "--executor", "local")
    assert result.exit_code == RecipeError.exit_code
    assert f"{place}/recipes/chat.yaml: is a file (name its folder" in result.stderr
    result = run("batch", f"{place}/recipes", f"{place}/merged", "--executor", "local", "--json")
    first = json.loads(result.stdout)
    assert states(first) == {"chat": "committed", "code": "committed", "poetry": "failed"}
    assert result.exit_code == first["exit_code"] == CheckpointError.exit_code
    assert there[family.models[3]] in first["merges"][2]["error"]
    merged = open_store(f"{place}/merged")
    written = {path: merged.stat(path) for path in merged.list() if path.startswith(("chat/", "code/"))}
    before = counters().read_bytes
    second = json.loads(run("batch", f"{place}/recipes", f"{place}/merged", "--json").stdout)
    assert states(second) == {"chat": "unchanged", "code": "unchanged", "poetry": "failed"}
    # The NaN is found by reading one recipe's inputs; of the others nothing is read but headers.
    assert counters().read_bytes - before < 5 * MODEL_BYTES
    assert {path: merged.stat(path) for path in written} == written
    assert json.loads(merged.read(f"{FOLDER}/{SUMMARY}")) == second
    assert read_table(merged, f"{FOLDER}/{TABLE}")["state"] == ["unchanged", "unchanged", "failed"]
    # A new expert over night: with --overwrite its recipe is merged again, and no other.
    edit(family.models[1], lambda tensors: tensors["model.layers.0.mlp.weight"].mul_(2))
    upload(family.models[1], there[family.models[1]])
    third = json.loads(run("batch", f"{place}/recipes", f"{place}/merged", "--overwrite", "--json").stdout)
    assert states(third) == {"chat": "committed", "code": "unchanged", "poetry": "failed"}
