"""Families of adapters end to end: the same merge as of the full checkpoints that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from pipeline.engine.run_folder import DISTANCES
from pipeline.events import Event, PassStarted
from pipeline.merging import merge
from pipeline.planning.blocks import block_of
from pipeline.storage.local import LocalStore
from pipeline.storage.mapped import Look, MappedFile
from tests.support.adapters import ADAPTER_FILE, Layout, linears, make_adapters, materialised, updates_of
from tests.support.cases import data_start
from tests.support.families import Family, fine_tune, llama_shapes, load_folder, random_weights, save_model
from tests.support.reference import assert_within_rounding, reference_median

NAMES = llama_shapes()
ATTENTION = linears(NAMES, "q_proj", "k_proj", "v_proj", "o_proj")
QV = linears(NAMES, "q_proj", "v_proj")
ALL = linears(NAMES, "_proj")
# Ranks, scales, patterns, dtypes, modules and file orders all differ; every adapter lacks something.
MIXED = [
    Layout(modules=QV, rank=4, alpha=8),
    Layout(modules=ATTENTION, rank=8, alpha=16, rslora=True, order="sorted"),
    Layout(
        modules=ALL,
        rank=2,
        alpha=3,
        rank_pattern={"q_proj": 5, "model.layers.1.mlp.down_proj": 1},
        alpha_pattern={"k_proj": 7.5, "layers.2.mlp.up_proj": 1},
        order="reversed",
    ),
    Layout(modules=tuple(m for m in QV if ".1." not in m), rank=40, alpha=10, dtype=torch.bfloat16),
    Layout(modules=QV[:4], rank=1, alpha=1, saved=("lm_head",), dtype=torch.float16, order="shuffled", size=0.01),
]
SCOPES = {"model": lambda name: "model", "block": block_of, "tensor": lambda name: name}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("adapters")
    return make_adapters(root, save_model(root / "base", random_weights(0)), MIXED)


@pytest.fixture(scope="module")
def dense(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return materialised(family, tmp_path_factory.mktemp("dense"))


def touched(family: Family) -> list[str]:
    """The tensors that any model changes."""
    base = family.base_values
    return [name for name in base if any(not torch.equal(v[name], base[name].double()) for v in family.values)]


def assert_rest_is_the_base(found: dict[str, torch.Tensor], family: Family) -> None:
    rest = set(family.base_values) - set(touched(family))
    assert rest
    for name in rest:
        assert torch.equal(found[name].view(torch.int32), family.base_values[name].view(torch.int32)), name


def distances_by_tensor(out: Path) -> dict[str, np.ndarray]:
    table = parquet.read_table(out / DISTANCES).to_pydict()
    return {name: np.array(row) for name, row in zip(table["tensor"], table["squared_distances"], strict=True)}


def group_of(report: dict, name: str = "model") -> dict:
    return next(group for group in report["groups"] if group["name"] == name)


def coefficients_by_group(report: dict) -> dict[str, list[float]]:
    """By solved group: what no adapter touches has none to solve."""
    return {group["name"]: group["coefficients"] for group in report["groups"] if group["name"] != "unchanged"}


# --- the same as dense -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_the_dense_path_gives_the_same(family: Family, dense: Family, tmp_path: Path, scope: str) -> None:
    keys = {"pipeline": {"scope": scope}, "weights": [1, 2, 1, 0.5, 1], "out_dtype": "float32", "name": f"{scope}.yaml"}
    report = merge(str(family.recipe(**keys)), str(tmp_path / "low"))
    other = merge(str(dense.recipe(**keys)), str(tmp_path / "dense"))
    found, wanted = distances_by_tensor(tmp_path / "low"), distances_by_tensor(tmp_path / "dense")
    assert set(found) >= set(touched(family))
    for name, row in wanted.items():
        # The dense points are float64 sums of base and update: their own rounding is 1e-16 of 0.2 in steps of 5e-3.
        np.testing.assert_allclose(found.get(name, np.zeros_like(row)), row, rtol=1e-11, atol=0, err_msg=name)
    groups, dense_groups = coefficients_by_group(report), coefficients_by_group(other)
    assert set(groups) == {SCOPES[scope](name) for name in touched(family)}
    for name in groups:
        np.testing.assert_allclose(groups[name], dense_groups[name], rtol=0, atol=1e-11)
    assert_within_rounding(load_folder(tmp_path / "low"), load_folder(tmp_path / "dense"))
    assert_rest_is_the_base(load_folder(tmp_path / "low"), family)


def test_the_oracle_agrees_and_the_report_measures_what_was_written(family: Family, tmp_path: Path) -> None:
    report = merge(str(family.recipe(name="facts.yaml")), str(tmp_path / "out"))
    group = group_of(report)
    merged, oracle = reference_median(family.values, [1.0] * 5, SCOPES["model"], torch.float32)
    np.testing.assert_allclose(group["coefficients"], oracle["model"], rtol=0, atol=1e-11)
    assert_within_rounding(load_folder(tmp_path / "out"), merged)
    assert 0 <= group["relative_gap"] <= 1e-10
    found, names = load_folder(tmp_path / "out"), touched(family)

    def length(values: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
        return sum(float(((values[n].double() - others[n].double()) ** 2).sum()) for n in names) ** 0.5

    distances = [length(values, found) for values in family.values]
    np.testing.assert_allclose(group["written"]["distances"], distances, rtol=1e-9)
    np.testing.assert_allclose(group["norms"], [length(v, family.base_values) for v in family.values], rtol=1e-9)
    assert group["objective"] == pytest.approx(sum(distances), rel=1e-7)


def test_linear_averages_the_updates_not_the_factors(family: Family, tmp_path: Path) -> None:
    merge(str(family.recipe("linear", weights=[1, 2, 3, 4, 0], name="linear.yaml")), str(tmp_path / "out"))
    wanted = {
        name: (sum(w * values[name] for w, values in zip([0.1, 0.2, 0.3, 0.4], family.values, strict=False))).float()
        for name in family.base_values
    }
    found = load_folder(tmp_path / "out")
    assert_within_rounding({name: found[name] for name in touched(family)}, {n: wanted[n] for n in touched(family)})
    assert_rest_is_the_base(found, family)


@pytest.mark.parametrize("scale", [0.7, "median_norm"])
def test_scale_is_applied_to_the_merged_update(family: Family, dense: Family, tmp_path: Path, scale: object) -> None:
    keys = {"pipeline": {"scale": scale}, "out_dtype": "float64", "name": "scale.yaml"}
    report = merge(str(family.recipe(**keys)), str(tmp_path / "low"))
    other = merge(str(dense.recipe(**keys)), str(tmp_path / "dense"))
    factor, coefficients = group_of(report)["scale"], group_of(report)["coefficients"]
    assert factor == pytest.approx(group_of(other)["scale"], rel=1e-11)
    assert factor == 0.7 if scale == 0.7 else factor > 1
    found = load_folder(tmp_path / "low")
    for name, base in family.base_values.items():
        median = sum(c * values[name] for c, values in zip(coefficients, family.values, strict=True))
        wanted = base.double() + factor * (median - base.double())
        torch.testing.assert_close(found[name], wanted, rtol=1e-13, atol=1e-15)


def test_outputs_model_and_adapter_are_one_merge(family: Family, tmp_path: Path) -> None:
    models = make_adapters(tmp_path, family.base, MIXED[:4])
    low = merge(str(models.recipe(out_dtype="float64", name="m.yaml")), str(tmp_path / "model"))
    keys = {"pipeline": {"output": "adapter"}, "out_dtype": "float32", "name": "a.yaml"}
    high = merge(str(models.recipe(**keys)), str(tmp_path / "adapter"))
    assert coefficients_by_group(low) == coefficients_by_group(high)
    found, updates = load_folder(tmp_path / "model"), updates_of(tmp_path / "adapter")
    assert {f"{module}.weight" for module in updates} == set(touched(models))
    for module, update in updates.items():
        name = f"{module}.weight"
        wanted = (found[name] - models.base_values[name].double()).numpy()
        np.testing.assert_allclose(update, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


# --- who may stand where -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Three adapters and two full fine-tunes of one base; the second fine-tune lies near the base."""
    root = tmp_path_factory.mktemp("mixed")
    both = Family(root=root, base=family.base, base_values=family.base_values)
    both.models, both.values = family.models[:3], family.values[:3]
    for number, size in ((0, 0.003), (1, 1e-4)):
        values = {name: value.float() for name, value in fine_tune(random_weights(0), number, size=size).items()}
        both.models.append(save_model(root / f"full{number}", values))
        both.values.append({name: value.double() for name, value in values.items()})
    return both


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_full_models_and_adapters_in_one_family(mixed: Family, tmp_path: Path, scope: str) -> None:
    report = merge(str(mixed.recipe(pipeline={"scope": scope}, name=f"{scope}.yaml")), str(tmp_path / "out"))
    # Where no adapter has an update, three points coincide with the base: the oracle wants the points apart.
    together = [name for name in mixed.base_values if sum(not torch.equal(v[name], mixed.base_values[name].double())
                                                          for v in mixed.values[:3]) < 3]  # fmt: skip
    names = [name for name in mixed.base_values if scope == "model" or name not in together]
    assert len(names) > 3
    points = [{name: values[name] for name in names} for values in mixed.values]
    merged, oracle = reference_median(points, [1.0] * 5, SCOPES[scope], torch.float32)
    groups, found = coefficients_by_group(report), load_folder(tmp_path / "out")
    for name, coefficients in oracle.items():
        np.testing.assert_allclose(groups[name], coefficients, rtol=0, atol=1e-10)
    assert_within_rounding({name: found[name] for name in names}, merged)
    assert set(found) == set(mixed.base_values)


def test_an_adapter_named_with_its_base_is_the_same_model(family: Family, tmp_path: Path) -> None:
    plain = merge(str(family.recipe(name="plain.yaml")), str(tmp_path / "plain"))
    named = Family(root=tmp_path, base=family.base, models=[f"{family.base}+{path}" for path in family.models])
    report = merge(str(named.recipe()), str(tmp_path / "named"))
    assert coefficients_by_group(report) == coefficients_by_group(plain)
    assert_within_rounding(load_folder(tmp_path / "named"), load_folder(tmp_path / "plain"), ulps=0)


def test_adapters_of_two_bases(family: Family, tmp_path: Path) -> None:
    """A model whose base is not the family's is what its own base and its adapter make together."""
    values = {name: value.float() for name, value in fine_tune(random_weights(0), 7).items()}
    other = make_adapters(tmp_path, save_model(tmp_path / "other", values), MIXED[:2], first_seed=20)
    models = [str(family.models[0]), *(f"{other.base}+{path}" for path in other.models), str(family.models[2])]
    both = Family(root=tmp_path, base=family.base, models=models)
    report = merge(str(both.recipe()), str(tmp_path / "out"))
    dense = [family.values[0], *other.values, family.values[2]]
    merged, oracle = reference_median(dense, [1.0] * 4, SCOPES["model"], torch.float32)
    np.testing.assert_allclose(coefficients_by_group(report)["model"], oracle["model"], rtol=0, atol=1e-10)
    assert_within_rounding(load_folder(tmp_path / "out"), merged)


def test_a_base_with_an_adapter(family: Family, tmp_path: Path) -> None:
    """`base_model: X+adapter` measures task vectors from the merged base."""
    base = f"{family.base}+{family.models[1]}"
    models = [f"{family.base}+{family.models[index]}" for index in (0, 2, 3)]
    report = merge(
        str(Family(root=tmp_path, base=base, models=models).recipe(pipeline={"scale": 0.5}, out_dtype="float64")),
        str(tmp_path / "out"),
    )
    coefficients, found = group_of(report)["coefficients"], load_folder(tmp_path / "out")
    for name, start in family.values[1].items():
        median = sum(c * family.values[i][name] for c, i in zip(coefficients, (0, 2, 3), strict=True))
        torch.testing.assert_close(found[name], start + 0.5 * (median - start), rtol=1e-12, atol=1e-14)


# --- what is read ------------------------------------------------------------------------------------------------


def data_bytes(file: Path) -> int:
    return file.stat().st_size - data_start(file)


@pytest.mark.parametrize("output", ["model", "adapter"])
def test_measuring_reads_no_data_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    base = save_model(tmp_path / "base", random_weights(0))
    family = make_adapters(tmp_path, base, MIXED[:4])
    phase, reads = ["plan"], []
    header = data_start(base / "model.safetensors")
    read_into, read, mapped, look = LocalStore.read_into, LocalStore.read, MappedFile.__init__, MappedFile.look
    paths: dict[MappedFile, Path] = {}

    def note(store: LocalStore, path: str, stop: int) -> None:
        if Path(store.url) == base and path.endswith(".safetensors") and stop > header:
            reads.append((phase[-1], stop))

    def spied_mapped(self: MappedFile, path: str, *, step_bytes: int) -> None:
        mapped(self, path, step_bytes=step_bytes)
        paths[self] = Path(path)

    def spied_look(self: MappedFile, start: int, stop: int) -> Look | None:
        if paths[self].parent == base:
            reads.append((phase[-1], stop))
        return look(self, start, stop)

    def spied_into(self: LocalStore, path: str, start: int, buffer: memoryview) -> None:
        note(self, path, start + len(buffer))
        read_into(self, path, start, buffer)

    def spied(self: LocalStore, path: str, start: int = 0, stop: int | None = None) -> bytes:
        data = read(self, path, start, stop)
        note(self, path, start + len(data))
        return data

    def listener(event: Event) -> None:
        if isinstance(event, PassStarted):
            phase.append(event.name)

    monkeypatch.setattr(LocalStore, "read_into", spied_into)
    monkeypatch.setattr(LocalStore, "read", spied)
    monkeypatch.setattr(MappedFile, "__init__", spied_mapped)
    monkeypatch.setattr(MappedFile, "look", spied_look)
    # One file is measured and written in one go; several are all measured first.
    recipe = family.recipe(pipeline={"output": "adapter"} if output == "adapter" else {"file_size": "15KB"})
    report = merge(str(recipe), str(tmp_path / "out"), listener=listener)
    assert ("measure" in phase) == (output == "model")
    assert [read for read in reads if read[0] == "measure"] == []
    factors = sum(data_bytes(path / ADAPTER_FILE) for path in family.models)
    whole = data_bytes(base / "model.safetensors") if output == "model" else 0
    assert ("write" in {name for name, _ in reads}) == (output == "model")
    assert factors + whole <= report["bytes_read"] <= 2 * factors + whole


def test_five_adapters_need_no_settings(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", random_weights(0))
    family = make_adapters(tmp_path, base, [Layout(modules=QV)] * 5)
    recipe = family.recipe()
    assert "pipeline" not in recipe.read_text()
    report = merge(str(recipe), str(tmp_path / "out"))
    merged, oracle = reference_median(family.values, [1.0] * 5, SCOPES["model"], torch.float32)
    np.testing.assert_allclose(group_of(report)["coefficients"], oracle["model"], rtol=0, atol=1e-11)
    assert_within_rounding(load_folder(tmp_path / "out"), merged)
    assert_rest_is_the_base(load_folder(tmp_path / "out"), family)
