"""What a plan's fingerprint depends on, and what it does not."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engine.source import ChunkSource
from pipeline.merging import Resources, load_recipe, plan_merge
from pipeline.planning.memory import Memory
from pipeline.storage import Store, open_store
from pipeline.storage.local import LocalStore
from tests.planning.plans import plan_of, small_family
from tests.support.adapters import Layout, linears, make_adapters
from tests.support.families import Family, save_model


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return small_family(tmp_path)


def test_the_same_plan_twice_has_the_same_fingerprint(family: Family) -> None:
    first, second = plan_of(family.recipe()), plan_of(family.recipe(name="again.yaml"))
    assert first == second
    assert first.fingerprint == second.fingerprint
    assert first.parts == second.parts
    assert len(first.fingerprint) == 64


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"weights": [1.0, 1.0, 1.0 + 2**-40]}, {"recipe"}),
        ({"dtype": "bfloat16"}, {"recipe", "layout"}),
        ({"out_dtype": "bfloat16"}, {"recipe", "layout"}),
        ({"pipeline": {"tolerance": 1e-9}}, {"recipe", "layout"}),
        ({"pipeline": {"scope": "block"}}, {"recipe", "layout"}),
        ({"pipeline": {"scale": 0.5}}, {"recipe", "layout"}),
        ({"pipeline": {"distances": "stream"}}, {"recipe", "layout"}),
        ({"pipeline": {"non_finite": "base"}}, {"recipe", "layout"}),
        ({"pipeline": {"file_size": "200B"}}, {"recipe", "layout"}),
        ({"method": "linear"}, {"recipe", "layout"}),
        ({"base": False}, {"recipe", "sources", "layout"}),
    ],
)
def test_what_changes_the_result_changes_the_fingerprint(
    family: Family, keys: dict[str, object], parts: set[str]
) -> None:
    plain, other = plan_of(family.recipe()), plan_of(family.recipe(**keys))  # type: ignore[arg-type]
    assert plain.fingerprint != other.fingerprint
    assert {name for name in plain.parts if plain.parts[name] != other.parts[name]} == parts


@pytest.mark.parametrize("bandwidth", ["1GB", "20MB"])
def test_a_bandwidth_only_projects_time(family: Family, bandwidth: str) -> None:
    plain, other = plan_of(family.recipe()), plan_of(family.recipe(pipeline={"bandwidth": bandwidth}))
    assert plain.fingerprint == other.fingerprint


def test_storage_options_are_saved_and_leave_no_trace_in_the_fingerprint(family: Family) -> None:
    options = {"s3": {"endpoint_url": "https://store.example"}, "gs://b/p": {"project": "x"}}
    plain, other = plan_of(family.recipe()), plan_of(family.recipe(pipeline={"storage": options}))
    assert plain.fingerprint == other.fingerprint
    saved = json.loads(json.dumps(other.to_json()))
    assert saved["recipe"]["pipeline"]["storage"] == options
    assert other.storage.to_json() == options
    assert other.storage.of("gs://b/p/m") == {"project": "x"}
    assert plain.storage.of("s3://b") == {}


def test_every_input_is_opened_with_its_own_options(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints, an adapter and the base it stands on; at planning and again by a worker."""
    opened: list[tuple[str, str]] = []

    def noting(url: str, options: Mapping[str, object] | None = None) -> Store:
        # Stands in for a bucket: only local folders are at hand here.
        opened.append((url, str((options or {}).get("profile"))))
        return open_store(url.removeprefix("s3:/"), None)

    for module in ("pipeline.checkpoints.checkpoint", "pipeline.checkpoints.adapter", "pipeline.engine.source"):
        monkeypatch.setattr(f"{module}.open_store", noting)
    monkeypatch.setattr(LocalStore, "url", property(lambda store: f"s3:/{store.location()}"))
    modules = linears(family.base_values, "q_proj")
    adapters = make_adapters(family.root, family.base, [Layout(modules=modules, rank=2)] * 2)
    profiles = {str(folder): folder.name for folder in (family.base, family.models[0], *adapters.models)}
    options = {f"s3:/{folder}": {"profile": name} for folder, name in profiles.items()}
    models = [f"s3:/{family.models[0]}", f"s3:/{adapters.models[0]}"]
    models.append(f"s3:/{family.base}+s3:/{adapters.models[1]}")
    document = {
        "merge_method": "linear",
        "base_model": f"s3:/{family.base}",
        "models": [{"model": model} for model in models],
        "pipeline": {"storage": options},
    }
    recipe = family.root / "options.yaml"
    recipe.write_text(json.dumps(document))
    plan = plan_of(recipe)
    ChunkSource(plan, Memory(terms={}, threads=1, window=1, retained_bytes=0)).close()
    wanted = {f"s3:/{folder}": name for folder, name in profiles.items()}
    assert {url for url, _ in opened} == set(wanted)
    assert [(url, name) for url, name in opened if wanted[url] != name] == []
    assert len(opened) >= 2 * len(wanted)


def test_workers_memory_and_device_leave_no_trace(family: Family, tmp_path: Path) -> None:
    recipe, output = load_recipe(str(family.recipe()))[0], open_store(str(tmp_path / "out"))
    plans = [
        plan_merge(recipe, output, resources, probe=False).plan
        for resources in (
            Resources(),
            Resources(workers=3, memory_bytes=700_000_000),
            Resources(workers=64, memory_bytes=10**12, device="cpu", executor="local"),
        )
    ]
    assert plans[0] == plans[1] == plans[2]
    assert len({plan.fingerprint for plan in plans}) == 1


def _touch(folder: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))


def _replace(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file({name: value + 1 for name, value in tensors.items()}, path)


def _grow(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "note": "longer"})


@pytest.mark.parametrize("change", [_touch, _replace, _grow])
@pytest.mark.parametrize("number", [-1, 1])
def test_a_touched_source_changes_the_fingerprint(family: Family, change: Callable[[Path], None], number: int) -> None:
    recipe = family.recipe()
    before = plan_of(recipe)
    change(family.base if number < 0 else family.models[number])
    after = plan_of(recipe)
    assert before.parts["sources"] != after.parts["sources"]
    assert before.parts["recipe"] == after.parts["recipe"]
    assert before.fingerprint != after.fingerprint


def test_side_files_are_no_part_of_it(family: Family) -> None:
    recipe = family.recipe()
    before = plan_of(recipe)
    (family.models[0] / "README.md").write_text("news")
    assert plan_of(recipe).fingerprint == before.fingerprint


def test_chunks_do_not_depend_on_files_or_scope(family: Family) -> None:
    plans = [plan_of(family.recipe(pipeline=keys)) for keys in ({}, {"file_size": "150B"}, {"scope": "tensor"})]
    grids = [
        sorted(
            (plan.tensors[chunk.tensor].name, chunk.start, chunk.stop)
            for file in range(len(plan.files))
            for chunk in plan.chunks(file)
        )
        for plan in plans
    ]
    assert grids[0] == grids[1] == grids[2]
    assert len(plans[1].files) > len(plans[0].files)
    assert plans[0].chunk_elements == plans[1].chunk_elements


def test_the_saved_form_holds_everything(family: Family) -> None:
    plan = plan_of(family.recipe(weights=[1.0, 2.0, 3.0]))
    saved = json.loads(json.dumps(plan.to_json()))
    assert saved["fingerprint"] == plan.fingerprint
    assert saved["parts"] == plan.parts
    assert saved["weights"] == [1.0, 2.0, 3.0]
    assert [item["name"] for item in saved["tensors"]] == [item.name for item in plan.tensors]
    assert [item["shape"] for item in saved["tensors"]] == [list(item.shape) for item in plan.tensors]
    assert [item["url"] for item in saved["inputs"]] == [str(path) for path in (family.base, *family.models)]
    assert saved["files"][0]["size_bytes"] == plan.files[0].size_bytes


def test_points_are_the_base_and_then_the_models(family: Family) -> None:
    with_base = plan_of(family.recipe())
    assert (with_base.points, with_base.offset, with_base.models) == ((0, 1, 2, 3), 1, (1, 2, 3))
    assert with_base.model_names() == tuple(str(path) for path in family.models)
    without = plan_of(family.recipe(base=False))
    assert (without.points, without.offset, without.base) == ((0, 1, 2), 0, None)


def test_a_base_among_the_models_is_one_input_and_two_points(family: Family) -> None:
    family.models.append(family.base)
    plan = plan_of(family.recipe())
    assert len(plan.inputs) == 4
    assert plan.models == (1, 2, 3, 0)
    assert plan.points == (0, 1, 2, 3, 0)
    assert plan.offset == 1


def test_an_empty_tensor_has_no_chunks(tmp_path: Path) -> None:
    weights = {"a": torch.ones(3), "none": torch.empty(0, 4)}
    family = Family(root=tmp_path, base=save_model(tmp_path / "base", weights))
    family.models = [save_model(tmp_path / f"m{number}", weights) for number in range(2)]
    plan = plan_of(family.recipe())
    assert [plan.tensors[chunk.tensor].name for chunk in plan.chunks(0)] == ["a"]
