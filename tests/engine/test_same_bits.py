"""The answer does not depend on the cluster: the same SHA-256 of every output file, whoever does the work."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.engine import driver as driver_module
from pipeline.engine.run_folder import group_sums, read_rows
from pipeline.merging import Resources, load_recipe, merge, plan_merge
from pipeline.numerics.exact_sum import ExactSum
from pipeline.planning.plan import Plan
from pipeline.storage import open_store
from tests.support.cases import without_retention
from tests.support.families import Family, make_family
from tests.support.reference import digests


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 6, dtype=torch.bfloat16, shards=2, loud=3)


@pytest.fixture(scope="module")
def recipes(family: Family) -> dict[str, Path]:
    settings = {
        "model-gram": {"file_size": "15KB"},
        "model-stream": {"file_size": "15KB", "distances": "stream"},
        "block-gram": {"scope": "block", "file_size": "15KB"},
        "tensor-gram": {"scope": "tensor", "file_size": "15KB"},
    }
    return {name: family.recipe(pipeline=value, name=f"{name}.yaml") for name, value in settings.items()}


@pytest.fixture(scope="module")
def undisturbed(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    found = {}
    for name, recipe in recipes.items():
        out = tmp_path_factory.mktemp("out") / name
        merge(str(recipe), str(out))
        found[name] = digests(out)
    return found


CASES = ["model-gram", "model-stream", "block-gram", "tensor-gram"]


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_local_workers(
    recipes: dict[str, Path], undisturbed: dict[str, dict[str, str]], tmp_path: Path, case: str, workers: int
) -> None:
    small = without_retention(recipes[case], tmp_path / "out").memory_bytes
    resources = Resources(workers=workers, memory_bytes=small if workers == 3 else 4_000_000_000)
    merge(str(recipes[case]), str(tmp_path / "out"), resources=resources)
    assert digests(tmp_path / "out") == undisturbed[case]
    assert len([name for name in undisturbed[case] if name.endswith(".safetensors")]) >= 4


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("case", ["model-gram", "model-stream"])
def test_ray_gives_the_local_bits(
    ray_cluster: str,
    recipes: dict[str, Path],
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    case: str,
    workers: int,
) -> None:
    report = merge(str(recipes[case]), str(tmp_path / "out"), resources=Resources(executor="ray", workers=workers))
    assert report["executor"] == "ray"
    assert len(report["peak_memory_bytes"]) == workers + 1
    assert digests(tmp_path / "out") == undisturbed[case]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_any_assignment_in_any_order(
    recipes: dict[str, Path],
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    seed: int,
) -> None:
    def shuffled(plan: Plan, workers: int) -> tuple[tuple[int, ...], ...]:
        files = list(range(len(plan.files)))
        random.Random(seed).shuffle(files)
        return tuple(tuple(files[rank::workers]) for rank in range(workers))

    monkeypatch.setattr(driver_module, "assign", shuffled)
    merge(str(recipes[case]), str(tmp_path / "out"), resources=Resources(workers=2))
    assert digests(tmp_path / "out") == undisturbed[case]


def test_sums_do_not_depend_on_the_order_of_chunks(family: Family, recipes: dict[str, Path], tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    recipe, _ = load_recipe(str(recipes["model-gram"]))
    plan = plan_merge(recipe, out, Resources(), probe=False).plan
    merge(str(recipes["model-gram"]), str(tmp_path / "out"))
    rows = [row for file in plan.files for row in read_rows(out, file.name)]

    def total(order: Sequence[int], parts: int) -> np.ndarray:
        sums = ExactSum(len(rows[0].distances))
        for part in range(parts):
            sums.merge(group_sums(plan, [rows[index] for index in order[part::parts]])[0])
        return sums.total()

    wanted = total(range(len(rows)), 1)
    for seed in range(5):
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        assert total(order, seed + 2).tobytes() == wanted.tobytes()


def test_threads_and_memory_leave_no_trace(
    recipes: dict[str, Path], undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        report = merge(
            str(recipes["model-gram"]),
            str(tmp_path / "out"),
            resources=without_retention(recipes["model-gram"], tmp_path / "out"),
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert report["passes"] > 1.5
    assert digests(tmp_path / "out") == undisturbed["model-gram"]
