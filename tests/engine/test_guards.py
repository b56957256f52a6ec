"""What must not slip through: a model too far to measure, a source replaced during a read, an old model's leftovers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoints.tables import read_table
from pipeline.engine import worker as worker_module
from pipeline.engine.executors.local import LocalExecutor
from pipeline.engine.output import prepare
from pipeline.engine.run_folder import FOLDER, INDEX, MEASURED, PLAN, SOLUTIONS, WRITTEN, written_path
from pipeline.engine.status import status
from pipeline.engine.verify import verify
from pipeline.errors import CheckpointError, ClaimedError, VerificationError
from pipeline.events import Event, FileWritten, PassEnded, PassStarted
from pipeline.merging import Resources, load_recipe, merge, plan_merge
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from tests.support.families import fine_tune, load_folder, make_family, save_model
from tests.support.reference import digests


@pytest.mark.parametrize("distances", ["gram", "stream"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_flipped_exponent_is_refused_by_name(tmp_path: Path, scope: str, distances: str) -> None:
    family = make_family(tmp_path, 7, dtype=torch.bfloat16, loud=2)
    values = dict(family.values[5])
    flipped = values["model.norm.weight"].clone()
    # The top bit of one exponent: -0.02 becomes -6.8e36, which is finite.
    flipped[3] = -6.8e36
    save_model(family.models[5], {**values, "model.norm.weight": flipped}, dtype=torch.bfloat16)
    recipe = family.recipe(pipeline={"scope": scope, "distances": distances})
    with pytest.raises(CheckpointError, match="times farther away") as caught:
        merge(str(recipe), str(tmp_path / "out"))
    (problem,) = caught.value.problems
    assert "expert5" in problem.where
    assert ("model.norm.weight" in problem.where) == (scope == "tensor")
    assert not (tmp_path / "out" / INDEX).exists()


@pytest.mark.parametrize("times", [1e2, 1e5, 1e7])
def test_an_outlier_within_reach_does_not_move_the_median(tmp_path: Path, times: float) -> None:
    family = make_family(tmp_path, 5, dtype=torch.float64)
    near = merge(str(family.recipe(name="near.yaml")), str(tmp_path / "near"))
    base = family.base_values
    far = {name: base[name] + times * (value - base[name]) for name, value in family.values[4].items()}
    save_model(family.models[4], far, dtype=torch.float64)
    report = merge(str(family.recipe(name="far.yaml")), str(tmp_path / "far"))
    moved = load_folder(tmp_path / "far")
    before = load_folder(tmp_path / "near")
    step = np.sqrt(sum(float((moved[name] - before[name]).square().sum()) for name in moved))
    # Its unit pull is all that an outlier has: the median moves by less than the near models' own distance from it.
    assert step < max(near["groups"][0]["distances"])
    assert report["groups"][0]["coefficients"][4] < 1.0 / times
    assert report["groups"][0]["relative_gap"] <= 1e-10


@pytest.mark.parametrize(
    ("method", "scope"), [("linear", None), ("geometric_median", "model"), ("geometric_median", "tensor")]
)
def test_a_source_replaced_while_it_is_read_is_not_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, scope: str | None
) -> None:
    family = make_family(tmp_path, 4, dtype=torch.float32)
    recipe = family.recipe(method, base=False, **({"pipeline": {"scope": scope}} if scope else {}))
    original = worker_module.ShardWorker._in_order
    replaced = []

    def interrupted(*given: Any) -> object:
        for result in original(*given):
            if not replaced:
                replaced.append(save_model(family.models[2], fine_tune(family.values[2], 9), dtype=torch.float32))
            yield result

    monkeypatch.setattr(worker_module.ShardWorker, "_in_order", interrupted)
    with pytest.raises(CheckpointError, match="changed since the merge was planned") as caught:
        merge(str(recipe), str(tmp_path / "out"))
    assert "expert2" in caught.value.problems[0].where
    assert replaced
    assert not (tmp_path / "out" / INDEX).exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("distances", ["gram", "stream"])
def test_values_taken_from_the_base_are_counted_and_said(tmp_path: Path, distances: str) -> None:
    family = make_family(tmp_path, 4, dtype=torch.float32)
    damaged = {name: value.clone() for name, value in family.values[1].items()}
    damaged["lm_head.weight"][:3, 0] = float("nan")
    damaged["model.norm.weight"][5] = float("inf")
    save_model(family.models[1], damaged)
    recipe = family.recipe(pipeline={"non_finite": "base", "distances": distances, "file_size": "30KB"})
    report = merge(str(recipe), str(tmp_path / "out"))
    assert [note for note in report["notes"] if "4 values were NaN or infinite" in note and "expert1" in note]
    repaired = {
        name: torch.where(torch.isfinite(value), value, family.base_values[name]) for name, value in damaged.items()
    }
    save_model(family.models[1], repaired)
    clean = family.recipe(name="clean.yaml", pipeline={"distances": distances, "file_size": "30KB"})
    merge(str(clean), str(tmp_path / "clean"))
    found, wanted = load_folder(tmp_path / "out"), load_folder(tmp_path / "clean")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)


def test_overwrite_leaves_nothing_of_the_old_model(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3)
    out = tmp_path / "out"
    for name in ("vocab.txt", "chat_template.jinja", "pytorch_model.bin", "adapter_config.json"):
        out.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    (out / "notes.md").write_text("mine")
    (family.base / "extra.json").write_text("{}")
    merge(str(family.recipe()), str(out), overwrite=True)
    assert (out / "notes.md").read_text() == "mine"
    assert (out / "extra.json").exists()
    (family.base / "extra.json").unlink()
    merge(str(family.recipe("linear", name="linear.yaml")), str(out), overwrite=True)
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert not names & {"vocab.txt", "chat_template.jinja", "pytorch_model.bin", "adapter_config.json", "extra.json"}


def test_a_finished_output_that_was_cut_is_written_again(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3)
    out = tmp_path / "out"
    merge(str(family.recipe(pipeline={"file_size": "20KB"})), str(out))
    whole = digests(out)
    victim = sorted(out.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    report = merge(str(family.recipe(pipeline={"file_size": "20KB"})), str(out))
    assert digests(out) == whole
    assert report["resumed_files"] > 0


def test_the_iterations_survive_a_resume(tmp_path: Path) -> None:
    family = make_family(tmp_path, 4)
    out = tmp_path / "out"
    recipe = family.recipe(pipeline={"file_size": "20KB"})
    merge(str(recipe), str(out))
    before = read_table(open_store(str(out)), "_geomerge/iterations.parquet")
    (out / INDEX).unlink()
    next(iter(out.glob("*.safetensors"))).unlink()
    merge(str(recipe), str(out), resources=Resources(workers=2))
    assert read_table(open_store(str(out)), "_geomerge/iterations.parquet") == before
    assert len(before["iteration"]) > 1


def test_a_large_scale_is_no_false_alarm(tmp_path: Path) -> None:
    family = make_family(tmp_path, 2, dtype=torch.float64)
    base = family.base_values
    opposite = {name: base[name] - (1 + 1e-5) * (value - base[name]) for name, value in family.values[0].items()}
    save_model(family.models[1], opposite, dtype=torch.float64)
    report = merge(str(family.recipe(pipeline={"scale": "norm"})), str(tmp_path / "out"))
    assert report["groups"][0]["scale"] > 1e3
    assert json.loads((tmp_path / "out" / "geomerge_report.json").read_text()) == report


def test_a_lost_side_file_is_noticed_and_written_again(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3)
    out = tmp_path / "out"
    merge(str(family.recipe()), str(out))
    whole = digests(out)
    (out / "config.json").unlink()
    with pytest.raises(VerificationError, match=r"config\.json: is gone"):
        verify(open_store(str(out)))
    merge(str(family.recipe()), str(out))
    assert digests(out) == whole
    next(iter(out.glob("*.safetensors"))).unlink()
    assert status(open_store(str(out)))["state"] == "damaged"


def test_a_refused_merge_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3)
    damaged = {name: value.clone() for name, value in family.values[1].items()}
    damaged["lm_head.weight"][0, 0] = float("nan")
    save_model(family.models[1], damaged)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        merge(str(family.recipe()), str(out))
    report = merge(str(family.recipe(name="repaired.yaml", pipeline={"non_finite": "base"})), str(out))
    assert report["files"]


def test_a_file_that_somebody_else_replaces_is_not_committed(tmp_path: Path) -> None:
    """A worker that the network had cut off, of a merge by another recipe, writes its last file and marker."""
    family, out = make_family(tmp_path, 3), tmp_path / "out"
    recipe = family.recipe(pipeline={"file_size": "20KB"})
    other = tmp_path / "other"
    merge(str(family.recipe("linear", name="linear.yaml", pipeline={"file_size": "20KB"})), str(other))

    def late(event: Event) -> None:
        if isinstance(event, PassEnded) and event.name == "write":
            name = min(path.name for path in other.glob("*.safetensors"))
            for path in (name, written_path(name)):
                (out / path).write_bytes((other / path).read_bytes())

    with pytest.raises(VerificationError, match="was replaced or lost since it was written"):
        merge(str(recipe), str(out), listener=late)
    assert not (out / INDEX).exists()
    merge(str(recipe), str(out), overwrite=True)
    verify(open_store(str(out)))


def notes_of(recipe: Path, output: Path) -> tuple[str, ...]:
    return plan_merge(load_recipe(str(recipe))[0], open_store(str(output)), Resources(), probe=True).plan.notes


def test_planning_says_what_stands_in_the_way(tmp_path: Path) -> None:
    family, out = make_family(tmp_path, 3), tmp_path / "out"
    recipe = family.recipe()
    assert notes_of(recipe, out) == ()
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (said,) = notes_of(recipe, out)
    assert "holds no merge of ours" in said
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    found: list[tuple[str, ...]] = []
    merge(
        str(recipe),
        str(out),
        listener=lambda event: found.append(notes_of(recipe, out)) if isinstance(event, FileWritten) else None,
    )
    assert "may be in use: process" in found[0][0]
    assert notes_of(recipe, out) == ("the output holds this very merge, finished",)
    (said,) = notes_of(family.recipe("linear", name="linear.yaml"), out)
    assert "differs in the recipe" in said


def test_planning_says_what_will_end_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make_family(tmp_path, 3)
    recipe = family.recipe()
    (tmp_path / "file").write_text("mine")
    (said,) = notes_of(recipe, tmp_path / "file" / "out")
    assert f"cannot be made: {tmp_path}/file is no folder" in said
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked)
    (said,) = notes_of(recipe, locked / "out")
    assert f"may not be written, nor may {locked} (check the permissions)" in said
    monkeypatch.setattr(LocalStore, "free_bytes", lambda _: 10)
    (said,) = notes_of(recipe, tmp_path / "out")
    assert "the disk has 10 B free" in said
    assert not (tmp_path / "out").exists()


def test_planning_does_not_know_an_empty_prefix_from_one_that_cannot_be_written(tmp_path: Path) -> None:
    recipe, output = make_family(tmp_path, 3).recipe(), open_store(f"memory://{tmp_path.name}/merged")
    planned = plan_merge(load_recipe(str(recipe))[0], output, Resources(), probe=True)
    (said,) = planned.plan.notes
    assert "nothing is there yet, so it may not exist or not be writable" in said
    output.write("notes.txt", b"mine")
    planned = plan_merge(load_recipe(str(recipe))[0], output, Resources(), probe=True)
    assert [note for note in planned.plan.notes if "nothing is there yet" in note] == []


def test_an_executor_serves_one_merge_after_another_and_stays_open(tmp_path: Path) -> None:
    family, executor = make_family(tmp_path, 3), LocalExecutor()
    closed: list[bool] = []
    first = family.recipe(pipeline={"file_size": "20KB"})
    second = family.recipe("linear", name="linear.yaml")
    with pytest.MonkeyPatch.context() as patch:
        for number, recipe in enumerate((first, second, first)):
            report = merge(
                str(recipe), str(tmp_path / f"out{number}"), resources=Resources(workers=1 + number), executor=executor
            )
            alone = merge(str(recipe), str(tmp_path / f"alone{number}"))
            assert report["bytes_read"] == alone["bytes_read"]
            assert digests(tmp_path / f"out{number}") == digests(tmp_path / f"alone{number}")
        patch.setattr(LocalExecutor, "close", lambda self: closed.append(True))
        # Nothing is left to do, so it is not even started again.
        merge(str(first), str(tmp_path / "out0"), executor=executor)
        assert closed == []
    assert executor.usage().read_bytes > 0
    executor.close()


@pytest.mark.parametrize("marked", [True, False])
def test_a_late_worker_of_another_plan_does_not_get_its_bytes_committed(tmp_path: Path, marked: bool) -> None:
    """Its file and marker appear when this merge has begun and has not written yet; or its marker is of old times."""
    family, out, other = make_family(tmp_path, 3), tmp_path / "out", tmp_path / "other"
    recipe = family.recipe(pipeline={"file_size": "20KB"})
    merge(str(recipe), str(tmp_path / "alone"))
    merge(str(family.recipe("linear", name="linear.yaml", pipeline={"file_size": "20KB"})), str(other))

    def late(event: Event) -> None:
        if isinstance(event, PassStarted) and event.name == "measure":
            for file in other.glob("*.safetensors"):
                shutil.copy(file, out)
                marker = json.loads((other / written_path(file.name)).read_text())
                if not marked:
                    del marker["fingerprint"]
                (out / WRITTEN).mkdir(exist_ok=True)
                (out / written_path(file.name)).write_text(json.dumps(marker))

    report = merge(str(recipe), str(out), listener=late)
    assert report["resumed_files"] == 0
    assert digests(out) == digests(tmp_path / "alone")
    verify(open_store(str(out)))


def test_statistics_and_solutions_of_another_plan_are_made_anew(tmp_path: Path) -> None:
    family, out, other = make_family(tmp_path, 3), tmp_path / "out", tmp_path / "other"
    recipe = family.recipe(pipeline={"file_size": "20KB"})
    merge(str(recipe), str(tmp_path / "alone"))
    strangers = make_family(tmp_path / "strangers", 3, loud=1)
    merge(str(strangers.recipe(pipeline={"file_size": "20KB"})), str(other))
    store = open_store(str(out))
    plan = plan_merge(load_recipe(str(recipe))[0], store, Resources(), probe=False).plan
    prepare(plan, store, overwrite=False)
    for path in (MEASURED, SOLUTIONS, WRITTEN):
        copy = shutil.copytree if (other / path).is_dir() else shutil.copy
        copy(other / path, out / path)
    report = merge(str(recipe), str(out))
    assert report["resumed_files"] == 0
    assert digests(out) == digests(tmp_path / "alone")


def test_a_folder_that_holds_another_merge_by_now_is_not_committed(tmp_path: Path) -> None:
    """That merge came and went while this process was stopped: no run file tells of it any more."""
    family, out, other = make_family(tmp_path, 3), tmp_path / "out", tmp_path / "other"
    merge(str(family.recipe("linear", name="linear.yaml")), str(other))

    def late(event: Event) -> None:
        if isinstance(event, PassEnded) and event.name == "write":
            shutil.copytree(other, out, dirs_exist_ok=True)

    before = digests(other)
    with pytest.raises(ClaimedError, match="taken over by a merge of another recipe"):
        merge(str(family.recipe()), str(out), listener=late)
    assert digests(out) == before


class Killed(KeyboardInterrupt):
    """Ends a merge from inside a store."""


def test_killed_while_it_clears_it_is_still_known_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make_family(tmp_path, 3)
    old, recipe = family.recipe("linear", name="linear.yaml", pipeline={"file_size": "20KB"}), family.recipe()
    merge(str(recipe), str(tmp_path / "alone"))
    original, left = LocalStore.delete, [0]

    def delete(self: LocalStore, path: str) -> None:
        if path.startswith((f"{FOLDER}/runs", ".probe")) or self.url != str(out):
            original(self, path)
            return
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        original(self, path)

    monkeypatch.setattr(LocalStore, "delete", delete)
    ended = False
    for number in (1, 2, 3, 5, 8, 13, 21, 34, 55):
        out = tmp_path / f"out{number}"
        merge(str(old), str(out))
        (out / "notes.md").write_text("mine")
        left[0] = number
        try:
            merge(str(recipe), str(out), overwrite=True)
            ended = True
        except Killed:
            assert number == 1 or not (out / INDEX).exists()
            assert json.loads((out / PLAN).read_text())["parts"]
            assert status(open_store(str(out)))["state"] in ("committed", "interrupted")
        left[0] = 0
        if number % 2:
            # What is left of the old merge can be gone on with.
            merge(str(old), str(out))
            verify(open_store(str(out)))
        merge(str(recipe), str(out), overwrite=True)
        assert (out / "notes.md").read_text() == "mine"
        (out / "notes.md").unlink()
        assert digests(out) == digests(tmp_path / "alone")
        if ended:
            return
    pytest.fail("the clearing has more steps than were tried")
