"""What must not slip through: a model too far to measure, a source replaced during a read, an old model's leftovers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoints.tables import read_table
from pipeline.engine import worker as worker_module
from pipeline.engine.run_folder import INDEX
from pipeline.engine.status import status
from pipeline.engine.verify import verify
from pipeline.errors import CheckpointError, VerificationError
from pipeline.merging import Resources, merge
from pipeline.storage import open_store
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

    def interrupted(self: object, task: object, chunks: object) -> object:
        for result in original(self, task, chunks):  # type: ignore[arg-type]
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
