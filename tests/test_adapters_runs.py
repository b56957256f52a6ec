"""Merges of adapters on any cluster, in any file order, killed and resumed: the same bits."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.merging import Resources, merge
from tests.engine.test_resume import SCRIPT
from tests.support.adapters import ADAPTER_CONFIG, ADAPTER_FILE, Layout, linears, make_adapters
from tests.support.cases import INDEX, without_retention
from tests.support.families import Family, llama_shapes, random_weights, save_model
from tests.support.reference import digests

NAMES = llama_shapes()
LAYOUTS = [
    Layout(modules=linears(NAMES, "q_proj", "v_proj"), rank=4, alpha=8, dtype=torch.bfloat16),
    Layout(modules=linears(NAMES, "_proj"), rank=2, alpha=3, rank_pattern={"q_proj": 5}),
    Layout(modules=linears(NAMES, "q_proj", "o_proj"), rank=6, rslora=True, dtype=torch.float16),
    Layout(modules=linears(NAMES, "v_proj", "down_proj"), rank=3, size=0.02),
]
CASES = {
    "model": {"scope": "model", "file_size": "15KB"},
    "blocks": {"scope": "block", "file_size": "15KB"},
    "tensors": {"scope": "tensor", "file_size": "15KB"},
    "adapter": {"scope": "model", "output": "adapter"},
    "adapter of tensors": {"scope": "tensor", "output": "adapter"},
    "truncated": {"scope": "model", "output": "adapter", "rank": 3},
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("adapters")
    base = save_model(root / "base", random_weights(0), dtype=torch.bfloat16, shards=2)
    return make_adapters(root, base, LAYOUTS)


@pytest.fixture(scope="module")
def recipes(family: Family) -> dict[str, Path]:
    return {name: family.recipe(pipeline=keys, name=f"{name}.yaml") for name, keys in CASES.items()}


@pytest.fixture(scope="module")
def undisturbed(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    found = {}
    for name, recipe in recipes.items():
        out = tmp_path_factory.mktemp("out") / "out"
        merge(str(recipe), str(out))
        found[name] = digests(out)
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_workers_with_little_memory(
    recipes: dict[str, Path], undisturbed: dict[str, dict[str, str]], tmp_path: Path, case: str
) -> None:
    out = tmp_path / "out"
    resources = dataclasses.replace(without_retention(recipes[case], out), workers=2)
    merge(str(recipes[case]), str(out), resources=resources)
    assert digests(out) == undisturbed[case]
    weights = [name for name in undisturbed[case] if name.endswith(".safetensors")]
    assert weights == ["adapter_model.safetensors"] if "output" in CASES[case] else len(weights) >= 4


@pytest.mark.parametrize("case", ["model", "adapter of tensors"])
def test_ray_gives_the_local_bits(
    ray_cluster: str, recipes: dict[str, Path], undisturbed: dict[str, dict[str, str]], tmp_path: Path, case: str
) -> None:
    report = merge(str(recipes[case]), str(tmp_path / "out"), resources=Resources(executor="ray", workers=2))
    assert report["executor"] == "ray"
    assert digests(tmp_path / "out") == undisturbed[case]


@pytest.mark.parametrize("case", ["model", "truncated"])
@pytest.mark.parametrize("order", ["sorted", "reversed", "shuffled"])
def test_the_order_in_the_files_leaves_no_trace(
    family: Family, undisturbed: dict[str, dict[str, str]], tmp_path: Path, case: str, order: str
) -> None:
    layouts = [dataclasses.replace(layout, order=order) for layout in LAYOUTS]
    other = make_adapters(tmp_path, family.base, layouts)
    files, others = ([path / ADAPTER_FILE for path in each.models] for each in (family, other))
    assert any(one.read_bytes() != two.read_bytes() for one, two in zip(files, others, strict=True))
    merge(str(other.recipe(pipeline=CASES[case])), str(tmp_path / "out"))
    assert digests(tmp_path / "out") == undisturbed[case]


@pytest.mark.parametrize(
    ("case", "event", "number"),
    [
        ("model", "FileMeasured", 1),
        ("model", "FileWritten", 2),
        ("tensors", "FileWritten", 2),
        ("adapter", "GroupSolved", 1),
        ("adapter", "FileWritten", 1),
    ],
)
def test_killed_and_resumed(
    recipes: dict[str, Path],
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    case: str,
    event: str,
    number: int,
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, str(recipes[case]), str(out), event, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not [name for name in (INDEX, ADAPTER_CONFIG, "geomerge_report.json") if (out / name).exists()]
    report = merge(str(recipes[case]), str(out))
    assert digests(out) == undisturbed[case]
    assert event == "GroupSolved" or report["resumed_files"] > 0
    assert merge(str(recipes[case]), str(out)) == report, "a finished merge is not done again"
