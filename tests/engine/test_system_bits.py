"""Solved merges on any cluster, in any memory, killed in the middle of a solve and resumed: the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints.header import read_header
from pipeline.engine import system_states
from pipeline.engine.executors import local
from pipeline.engine.system_states import SYSTEMS, SystemStates
from pipeline.errors import CheckpointError, WorkerError
from pipeline.merging import Resources, merge
from pipeline.numerics.linear_systems.conjugate_gradient import CgState
from pipeline.storage import open_store
from tests.support.cases import INDEX, before_writing, without_retention
from tests.support.families import Family, make_family
from tests.support.moments import EMBEDDING, MATRICES, SHAPES, Moments, save_statistics, with_statistics
from tests.support.reference import digests
from tests.support.s3 import prefix, upload

CASES: dict[str, dict[str, Any]] = {
    "fisher": {"method": "fisher", "parameters": {"normalize": True}},
    "regmean": {"method": "regmean"},
    "gram": {"method": "mats"},
    "kfac": {"method": "mats", "parameters": {"objective": "kfac", "iterations": 40, "tolerance": 1e-9}},
}
# Kills its own process, as `kill -9` would, after so many states were saved.
SCRIPT = """
import os, signal, sys
from pipeline.engine import system_states
from pipeline.merging import merge

system_states.SAVE_EVERY_S = 0.0
save, left = system_states.SystemStates.save, int(sys.argv[3])

def counted(self, tensor, state):
    global left
    save(self, tensor, state)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

system_states.SystemStates.save = counted
merge(sys.argv[1], sys.argv[2])
"""


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Moments]:
    family = make_family(tmp_path_factory.mktemp("family"), 3, shapes=SHAPES, dtype=torch.bfloat16, shards=2)
    grams = with_statistics(
        family,
        ["input_gram", "output_gram"],
        {name: SHAPES[name] for name in MATRICES},
        outside={EMBEDDING: "an embedding"},
    )
    return {"diagonal": with_statistics(family, ["diagonal"], SHAPES), "gram": grams}


@pytest.fixture(scope="module")
def recipes(moments: dict[str, Moments]) -> dict[str, Path]:
    found = {}
    for name, case in CASES.items():
        of = moments["diagonal" if name == "fisher" else "gram"]
        keys = {key: value for key, value in case.items() if key != "method"}
        pipeline = {"file_size": "300B"}
        found[name] = of.recipe(case["method"], name=f"{name}.yaml", pipeline=pipeline, out_dtype="float32", **keys)
    return found


@pytest.fixture(scope="module")
def undisturbed(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    found = {}
    for name, recipe in recipes.items():
        out = tmp_path_factory.mktemp("out") / name
        merge(str(recipe), str(out))
        assert len(list(out.glob("*.safetensors"))) >= 4
        found[name] = digests(out)
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_workers_in_the_least_memory(
    recipes: dict[str, Path], undisturbed: dict[str, dict[str, str]], tmp_path: Path, case: str
) -> None:
    small = without_retention(recipes[case], tmp_path / "out").memory_bytes
    merge(str(recipes[case]), str(tmp_path / "out"), resources=Resources(workers=2, memory_bytes=small))
    assert digests(tmp_path / "out") == undisturbed[case]


@pytest.mark.parametrize("case", CASES)
def test_the_way_of_other_devices(
    recipes: dict[str, Path],
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    # torch's other name of the CPU: points are tensors then, as they are on a GPU.
    monkeypatch.setattr(local, "pick_device", lambda *_: "cpu:0")
    merge(str(recipes[case]), str(tmp_path / "out"))
    assert digests(tmp_path / "out") == undisturbed[case]


@pytest.mark.parametrize(("case", "workers"), [("fisher", 2), ("kfac", 2)])
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
    assert digests(tmp_path / "out") == undisturbed[case]


@pytest.mark.parametrize("case", ["fisher", "kfac"])
def test_models_and_statistics_in_a_bucket(
    moments: dict[str, Moments],
    recipes: dict[str, Path],
    undisturbed: dict[str, dict[str, str]],
    s3_url: str,
    tmp_path: Path,
    case: str,
) -> None:
    of = moments["diagonal" if case == "fisher" else "gram"]
    place, text = prefix(s3_url), recipes[case].read_text()
    for folder in (of.family.base, *of.family.models, *of.folders):
        text = text.replace(f'"{folder}"', f'"{upload(folder, f"{place}/{folder.name}")}"')
    assert str(of.family.root) not in text
    (tmp_path / "recipe.yaml").write_text(text)
    merge(str(tmp_path / "recipe.yaml"), str(tmp_path / "out"))
    assert digests(tmp_path / "out") == undisturbed[case]


def kill_in_a_solve(recipe: Path, out: Path, saves: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(recipe), str(out), str(saves)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / INDEX).exists()


@pytest.mark.parametrize(("case", "saves"), [("gram", 2), ("kfac", 9)])
def test_a_killed_solve_goes_on_where_it_was(
    recipes: dict[str, Path],
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    saves: int,
) -> None:
    out = tmp_path / "out"
    kill_in_a_solve(recipes[case], out, saves)
    left = list((out / SYSTEMS).iterdir())
    assert left
    loaded = []
    load = SystemStates.load

    def watched(self: SystemStates, tensor: int, kind: type[Any]) -> Any:
        state = load(self, tensor, kind)
        loaded.append(None if state is None else state.iterations)
        return state

    monkeypatch.setattr(SystemStates, "load", watched)
    merge(str(recipes[case]), str(out), resources=Resources(workers=2))
    assert max(iterations for iterations in loaded if iterations is not None) >= 1
    assert digests(out) == undisturbed[case]
    # What is written needs no state.
    assert list((out / SYSTEMS).iterdir()) == []


def test_ray_goes_on_with_a_killed_solve(
    ray_cluster: str, recipes: dict[str, Path], undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kill_in_a_solve(recipes["kfac"], out, 5)
    merge(str(recipes["kfac"]), str(out), resources=Resources(executor="ray", workers=2))
    assert digests(out) == undisturbed["kfac"]
    assert list((out / SYSTEMS).iterdir()) == []


def test_a_solve_that_is_told_to_stop_ends_within_an_iteration(
    recipes: dict[str, Path], undisturbed: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps = tmp_path / "out", []
    iterated = SystemStates.iterated

    def stopped(self: SystemStates) -> None:
        steps.append(1)
        if len(steps) == 3:
            raise WorkerError
        iterated(self)

    monkeypatch.setattr(SystemStates, "iterated", stopped)
    with pytest.raises(WorkerError):
        merge(str(recipes["kfac"]), str(out))
    monkeypatch.undo()
    merge(str(recipes["kfac"]), str(out))
    assert digests(out) == undisturbed["kfac"]


def test_states_come_back_to_the_last_bit_and_only_to_their_plan(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    generator = torch.Generator().manual_seed(1)
    x_IO, r_IO, p_IO = (torch.randn((5, 3), generator=generator) for _ in range(3))
    state = CgState(
        x_IO=x_IO, r_IO=r_IO, p_IO=p_IO, iterations=7, rho=0.1 + 0.2, size=1e-300, largest=3.3, claimed=float("inf")
    )
    states = SystemStates(store, "plan", "cpu", lambda: None)
    assert states.load(4, CgState) is None
    states.save(4, state)
    found = states.load(4, CgState)
    assert found is not None
    for name in ("x_IO", "r_IO", "p_IO"):
        assert torch.equal(getattr(found, name), getattr(state, name))
    for name in ("iterations", "rho", "size", "largest", "claimed"):
        assert getattr(found, name) == getattr(state, name)
    assert states.load(5, CgState) is None
    assert SystemStates(store, "another plan", "cpu", lambda: None).load(4, CgState) is None
    path = tmp_path / system_states.state_path(4)
    assert read_header(store, system_states.state_path(4)).metadata["format"] == "geomerge-state"
    path.write_bytes(path.read_bytes()[:-1])
    assert states.load(4, CgState) is None
    states.forget([4, 5])
    assert not path.exists()


@pytest.mark.parametrize("case", ["fisher", "regmean"])
def test_statistics_replaced_after_the_plan_are_not_used(
    moments: dict[str, Moments], recipes: dict[str, Path], tmp_path: Path, case: str
) -> None:
    of = moments["diagonal" if case == "fisher" else "gram"]
    folders = [
        save_statistics(tmp_path / f"statistics{row}", arrays, outside={EMBEDDING: "an embedding"})
        for row, arrays in enumerate(of.arrays)
    ]
    copied = Moments(Family(root=tmp_path, base=of.family.base, models=of.family.models), folders=folders)
    recipe = copied.recipe(CASES[case]["method"])

    def replace() -> None:
        for file in folders[1].glob("*.statistics"):
            file.write_bytes(file.read_bytes())

    with pytest.raises(CheckpointError, match="changed since the merge was planned") as caught:
        merge(str(recipe), str(tmp_path / "out"), listener=before_writing(replace))
    assert "statistics1" in str(caught.value)
    assert not (tmp_path / "out" / INDEX).exists()
