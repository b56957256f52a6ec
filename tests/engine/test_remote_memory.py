"""A worker that reads ahead from object storage holds what the plan projected: measured on a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.merging import Resources, load_recipe, plan_merge
from pipeline.storage import open_store
from tests.support.families import save_model
from tests.support.s3 import prefix, upload

MODELS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, s3_url: str) -> Path:
    """Four models and their base of 42 MB each, in the bucket."""
    root = tmp_path_factory.mktemp("remote")
    generator = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (2048, 1024) for layer in range(10)}
    places = []
    for number in range(MODELS + 1):
        values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        folder = save_model(root / f"m{number}", values, dtype=torch.bfloat16)
        places.append(upload(folder, f"{prefix(s3_url)}/{folder.name}"))
    path = root / "recipe.yaml"
    models = [{"model": place} for place in places[1:]]
    document = {"merge_method": "geometric_median", "base_model": places[0], "models": models}
    path.write_text(json.dumps({**document, "pipeline": {"file_size": "20MB"}}))
    return path


# The least that is worth reading ahead with, and all that is of use here.
@pytest.mark.parametrize("budget_bytes", [880_000_000, 2_000_000_000])
def test_a_merge_from_a_bucket_stays_within_the_projection(recipe: Path, tmp_path: Path, budget_bytes: int) -> None:
    resources = Resources(workers=1, memory_bytes=budget_bytes)
    planned = plan_merge(load_recipe(str(recipe))[0], open_store(str(tmp_path / "out")), resources, probe=False)
    terms = planned.memory.terms
    assert terms["requests in flight"] > 0
    assert terms["read-ahead"] > 0
    assert planned.memory.total_bytes <= budget_bytes
    command = [sys.executable, "-m", "pipeline", "merge", str(recipe), str(tmp_path / "out"), "--executor", "local"]
    done = subprocess.run([*command, "--memory", str(budget_bytes), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    inputs = sum(file.size_bytes for item in planned.plan.inputs for file in item.files)
    assert 200_000_000 < inputs <= 1.01 * report["bytes_read"]
    assert report["peak_memory_bytes"]["process"] <= planned.memory.total_bytes
