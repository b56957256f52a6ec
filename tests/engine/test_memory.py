"""A worker holds what the plan projected, whatever the model's size: measured on a family ten times the budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.merging import Resources, load_recipe, merge, plan_merge
from pipeline.storage import open_store
from tests.support.sparse import save_sparse

BUDGET_BYTES = 720_000_000
MODELS = 8


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight models and their base of 840 MB each, by their apparent size."""
    root = tmp_path_factory.mktemp("sparse")
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (2048, 5120) for layer in range(40)}
    shapes |= {"model.norm.weight": (4096,)}
    folders = [save_sparse(root / name, shapes, files=3) for name in ["base", *(f"expert{i}" for i in range(MODELS))]]
    path = root / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "merge_method": "geometric_median",
                "base_model": str(folders[0]),
                "models": [{"model": str(folder)} for folder in folders[1:]],
                "pipeline": {"file_size": "200MB"},
            }
        )
    )
    return path


def test_the_local_process_stays_within_projection_and_budget(recipe: Path, tmp_path: Path) -> None:
    resources = Resources(workers=1, memory_bytes=BUDGET_BYTES)
    planned = plan_merge(load_recipe(str(recipe))[0], open_store(str(tmp_path / "out")), resources, probe=False)
    inputs = sum(file.size_bytes for item in planned.plan.inputs for file in item.files)
    assert inputs >= 10 * BUDGET_BYTES
    assert planned.memory.total_bytes <= BUDGET_BYTES
    command = [sys.executable, "-m", "pipeline", "merge", str(recipe), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--memory", str(BUDGET_BYTES), "--executor", "local", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["peak_memory_bytes"]["process"] <= planned.memory.total_bytes <= BUDGET_BYTES
    assert report["bytes_read"] >= 1.7 * inputs


def test_every_ray_worker_stays_within_projection_and_budget(ray_cluster: str, recipe: Path, tmp_path: Path) -> None:
    resources = Resources(workers=2, memory_bytes=BUDGET_BYTES, executor="ray")
    planned = plan_merge(load_recipe(str(recipe))[0], open_store(str(tmp_path / "out")), resources, probe=False)
    report = merge(str(recipe), str(tmp_path / "out"), resources=resources)
    peaks = [peak for name, peak in report["peak_memory_bytes"].items() if name.startswith("worker")]
    assert len(peaks) == 2
    assert max(peaks) <= planned.memory.total_bytes <= BUDGET_BYTES


def test_many_adapters_stay_within_the_projection(tmp_path: Path) -> None:
    """Forty adapters whose factors together are as large as the base are measured and merged within the projection."""
    modules = {f"model.layers.{layer}.mlp.up_proj": (1024, 2048) for layer in range(12)}
    base = save_sparse(tmp_path / "base", {f"{name}.weight": shape for name, shape in modules.items()})
    folders = []
    for number in range(40):
        factors = {}
        for name, (rows, columns) in modules.items():
            factors[f"base_model.model.{name}.lora_A.weight"] = (16, columns)
            factors[f"base_model.model.{name}.lora_B.weight"] = (rows, 16)
        folder = save_sparse(tmp_path / f"adapter{number}", factors)
        (folder / "model-00001-of-00001.safetensors").rename(folder / "adapter_model.safetensors")
        for name in ("config.json", "model.safetensors.index.json"):
            (folder / name).unlink()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16, "lora_alpha": 32}')
        folders.append(folder)
    path = tmp_path / "recipe.yaml"
    entries = [{"model": str(folder)} for folder in folders]
    path.write_text(json.dumps({"merge_method": "geometric_median", "base_model": str(base), "models": entries}))
    resources = Resources(workers=1, memory_bytes=800_000_000)
    planned = plan_merge(load_recipe(str(path))[0], open_store(str(tmp_path / "out")), resources, probe=False)
    assert planned.memory.total_bytes <= 800_000_000
    command = [sys.executable, "-m", "pipeline", "merge", str(path), str(tmp_path / "out"), "--memory", "800MB"]
    done = subprocess.run([*command, "--executor", "local", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["peak_memory_bytes"]["process"] <= planned.memory.total_bytes
    # The base once, the factors once and what the budget could not keep of them again, a whole matrix at a time.
    base_bytes = sum(2 * rows * columns for rows, columns in modules.values())
    factor_bytes = sum(40 * 2 * 16 * (rows + columns) for rows, columns in modules.values())
    assert base_bytes + factor_bytes <= report["bytes_read"] <= base_bytes + 2 * factor_bytes
    assert report["bytes_read"] == pytest.approx(planned.cost.read_bytes, abs=factor_bytes / len(modules))
