"""Inputs at the edge of what makes sense: they merge, the result is what it must be, and the report says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engine.verify import verify
from pipeline.errors import VerificationError
from pipeline.events import Event, Note
from pipeline.merging import merge
from pipeline.storage import open_store

from .support.cases import EMBEDDING, HEAD, MLP, TINY, edit, edit_config, refused, tiny_family
from .support.families import Family, load_folder, save_model

SCOPES: list[Any] = [
    "model",
    "block",
    "tensor",
    [{"name": "mlps", "tensors": ["*.mlp.*"]}],
    [{"name": "nothing", "tensors": ["empty*"]}, {"name": "single", "tensors": ["scalar"]}],
]


def run(
    family: Family, method: str = "geometric_median", **keys: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Merge a family, verify the output and return its report and tensors."""
    output = family.root / "out"
    report = merge(str(family.recipe(method, **keys)), str(output))
    verify(open_store(str(output)))
    json.dumps(report, allow_nan=False)
    return report, load_folder(output)


def copy_of(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


def said(report: dict[str, Any], *words: str) -> bool:
    return any(all(word in note for word in words) for note in report["notes"])


# --- few, equal and copied models --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["geometric_median", "linear"])
@pytest.mark.parametrize("base", [True, False])
def test_one_model(tmp_path: Path, method: str, base: bool) -> None:
    family = tiny_family(tmp_path, 1)
    report, merged = run(family, method, base=base)
    assert all(merged[name].equal(value) for name, value in family.values[0].items())
    assert report["groups"][0]["coefficients"] == [1.0]
    assert said(report, "one model only")


@pytest.mark.parametrize("distances", ["gram", "stream"])
@pytest.mark.parametrize("weights", [(1, 1), (3, 3), (1, 2)])
def test_two_models(tmp_path: Path, distances: str, weights: tuple[int, int]) -> None:
    family = tiny_family(tmp_path, 2, dtype=torch.float64)
    report, merged = run(family, weights=list(weights), pipeline={"distances": distances})
    group = report["groups"][0]
    equal = weights[0] == weights[1]
    wanted = {n: (family.values[0][n] + family.values[1][n]) / 2 if equal else family.values[1][n] for n in TINY}
    assert all(torch.allclose(merged[name], value, rtol=0, atol=1e-15) for name, value in wanted.items())
    assert group["unique"] == (not equal)
    assert said(report, "not unique in model") == equal


def test_what_the_report_says_is_said_aloud(tmp_path: Path) -> None:
    events: list[Event] = []
    merge(str(tiny_family(tmp_path, 2).recipe()), str(tmp_path / "out"), listener=events.append)
    assert any(isinstance(event, Note) and "not unique" in event.text for event in events)


@pytest.mark.parametrize("distances", ["gram", "stream"])
def test_duplicates_count_like_a_weight(tmp_path: Path, distances: str) -> None:
    twice = tiny_family(tmp_path / "twice", 5)
    copy_of(twice.models[1], twice.models[3])
    report, copied = run(twice, pipeline={"distances": distances})
    assert said(report, str(twice.models[3]), "same values as", str(twice.models[1]))
    weighted = tiny_family(tmp_path / "weighted", 5)
    del weighted.models[3]
    _, merged = run(weighted, weights=[1, 2, 1, 1])
    assert all(torch.allclose(copied[name], merged[name], rtol=0, atol=1e-8) for name in TINY)
    shares = report["groups"][0]["coefficients"]
    assert shares[1] == pytest.approx(shares[3])


@pytest.mark.parametrize("scale", [1.0, "norm", 0.5])
def test_all_models_are_copies_of_the_base(tmp_path: Path, scale: float | str) -> None:
    family = tiny_family(tmp_path)
    for folder in family.models:
        copy_of(family.base, folder)
    report, merged = run(family, pipeline={"scale": scale})
    assert all(merged[name].equal(value) for name, value in family.base_values.items())
    assert report["groups"][0]["objective"] == 0.0
    assert report["groups"][0]["norms"] == [0.0, 0.0, 0.0]
    assert all(said(report, str(folder), "same values as the base model") for folder in family.models)


@pytest.mark.parametrize("scale", [1.0, "norm"])
def test_one_expert_equals_the_base(tmp_path: Path, scale: float | str) -> None:
    family = tiny_family(tmp_path, 4)
    copy_of(family.base, family.models[2])
    report, _ = run(family, pipeline={"scale": scale})
    assert said(report, str(family.models[2]), "same values as the base model")
    assert report["groups"][0]["norms"][2] == 0.0
    assert report["groups"][0]["cosines"][2] == [None] * 4
    assert report["models"][2]["unchanged_share"] == 1.0


def test_majority_of_copies_wins(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, 5)
    for folder in family.models[1:3]:
        copy_of(family.models[0], folder)
    report, merged = run(family)
    assert all(merged[name].equal(value) for name, value in family.values[0].items())
    assert report["groups"][0]["optimum"] == "vertex"


def test_base_is_one_of_the_models(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    family.models.append(family.base)
    report, _ = run(family)
    assert report["groups"][0]["norms"][3] == 0.0
    assert said(report, "same values as the base model")


def test_distinct_models_are_no_copies(tmp_path: Path) -> None:
    report, _ = run(tiny_family(tmp_path))
    assert report["notes"] == []


# --- tensors of unusual shape ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_size", ["1GB", "100"])
@pytest.mark.parametrize("distances", ["gram", "stream"])
@pytest.mark.parametrize("scope", SCOPES)
def test_scalars_and_empty_tensors(tmp_path: Path, scope: Any, distances: str, file_size: str) -> None:
    shapes = {**TINY, "scalar": (), "empty": (0, 4), "empty.vector": (0,), "one": (1, 1, 1)}
    family = tiny_family(tmp_path, shapes=shapes)
    report, merged = run(family, pipeline={"scope": scope, "distances": distances, "file_size": file_size})
    assert {name: tuple(value.shape) for name, value in merged.items()} == shapes
    assert all(abs(sum(group["coefficients"]) - 1) < 1e-12 for group in report["groups"])
    if scope == "tensor":
        assert [group["name"] for group in report["groups"]] == sorted(shapes, key=[*merged_order(family)].index)
        # The median of three numbers is the middle one.
        middle = torch.stack([values["scalar"] for values in family.values]).median()
        assert merged["scalar"].equal(middle)


def merged_order(family: Family) -> list[str]:
    """Return the tensor names in the order of the reference's bytes."""
    report = json.loads((family.root / "out" / "geomerge_report.json").read_text())
    return [group["name"] for group in report["groups"]]


@pytest.mark.parametrize("method", ["geometric_median", "linear"])
def test_nothing_but_empty_tensors(tmp_path: Path, method: str) -> None:
    report, merged = run(tiny_family(tmp_path, shapes={"a": (0,), "b": (3, 0)}), method)
    assert {name: tuple(value.shape) for name, value in merged.items()} == {"a": (0,), "b": (3, 0)}
    assert report["notes"] == []


def test_empty_tensors_resume(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, shapes={**TINY, "empty": (0, 4)})
    keys = {"pipeline": {"scope": "tensor", "file_size": "100"}}
    first, before = run(family, **keys)
    lost = sorted((tmp_path / "out").glob("*.safetensors"))[-1]
    lost.unlink()
    second, after = run(family, **keys)
    assert [group["coefficients"] for group in second["groups"]] == [group["coefficients"] for group in first["groups"]]
    assert all(after[name].equal(before[name]) for name in before)


# --- types -------------------------------------------------------------------------------------------------------


def test_mixed_types_and_layouts(tmp_path: Path) -> None:
    """Half, bfloat16 and float32 in one, two and three files, named and unnamed: as if all were float64 before."""
    family = tiny_family(tmp_path / "mixed", 4, dtype=torch.float32)
    types = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    for number, (folder, dtype) in enumerate(zip(family.models, types, strict=True)):
        shutil.rmtree(folder)
        save_model(folder, family.values[number], dtype=dtype, shards=1 + number % 3)
    (family.models[0] / "model.safetensors").rename(family.models[0] / "weights.safetensors")
    plain = tiny_family(tmp_path / "plain", 4, dtype=torch.float64)
    for number, (folder, dtype) in enumerate(zip(plain.models, types, strict=True)):
        values = {name: value.to(dtype).to(torch.float64) for name, value in family.values[number].items()}
        save_model(folder, values, dtype=torch.float64)
    report, merged = run(family, base=False)
    wanted_report, wanted = run(plain, base=False)
    assert report["groups"][0]["coefficients"] == wanted_report["groups"][0]["coefficients"]
    assert all(merged[name].equal(wanted[name]) for name in TINY)
    assert json.loads((tmp_path / "mixed" / "out" / "config.json").read_text())["torch_dtype"] == "float64"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    family = tiny_family(tmp_path, dtype=dtype)
    report, merged = run(family, weights=[1, 1, 5])
    assert report["groups"][0]["coefficients"] == [0.0, 0.0, 1.0]
    assert all(value.dtype == torch.bfloat16 for value in merged.values())
    assert all(merged[name].equal(value.to(torch.bfloat16)) for name, value in family.values[2].items())


def test_equal_integers_are_copied(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    extra = {
        "positions": torch.arange(7),
        "mask": torch.tensor([True, False]),
        "none": torch.zeros(0, dtype=torch.int8),
    }
    for folder in (family.base, *family.models):
        edit(folder, lambda tensors: tensors.update(extra))
    for method in ("geometric_median", "linear"):
        _, merged = run(family, method, name=f"{method}.yaml")
        assert all(merged[name].equal(value) for name, value in extra.items())
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("method", ["geometric_median", "linear"])
def test_overflow_of_the_output_type(tmp_path: Path, method: str) -> None:
    family = tiny_family(tmp_path, 1)
    edit(family.models[0], lambda tensors: tensors[MLP].fill_(7e4))
    words = (MLP, "overflows float16", "out_dtype")
    refused(family.recipe(method, out_dtype="float16"), tmp_path / "out", VerificationError, *words)


def test_scale_that_overflows(tmp_path: Path) -> None:
    recipe = tiny_family(tmp_path).recipe(pipeline={"scale": 1e300})
    refused(recipe, tmp_path / "out", VerificationError, "overflows float32", "smaller scale")


# --- tied embeddings ---------------------------------------------------------------------------------------------


def test_tied_head_stored_by_some(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in TINY.items() if name != HEAD}
    family = tiny_family(tmp_path, shapes=shapes, config={"tie_word_embeddings": True})
    for folder in (family.models[0], family.models[2]):
        edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    report, merged = run(family)
    assert merged.keys() == set(shapes)
    assert said(report, HEAD, "tied to", EMBEDDING, "written once")
    other = tiny_family(tmp_path / "once", shapes=shapes, config={"tie_word_embeddings": True})
    _, wanted = run(other)
    assert all(merged[name].equal(wanted[name]) for name in shapes)


def test_untied_heads_are_merged_on_their_own(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    _, merged = run(family, "linear", base=False)
    wanted = torch.stack([values[HEAD].to(torch.float64) for values in family.values]).mean(dim=0)
    assert torch.allclose(merged[HEAD].to(torch.float64), wanted, rtol=0, atol=1e-8)


# --- values that are not finite, replaced ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["geometric_median", "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2])
def test_non_finite_values_are_taken_from_the_base(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    broken, mended = tiny_family(tmp_path / "broken", dtype=dtype), tiny_family(tmp_path / "mended", dtype=dtype)
    base = load_file(mended.base / "model.safetensors")[MLP]

    def change(tensors: dict[str, torch.Tensor], values: torch.Tensor) -> None:
        wide = tensors[MLP].to(torch.float32)
        wide[1] = values
        tensors[MLP] = wide.to(dtype)

    edit(broken.models[1], lambda tensors: change(tensors, torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])))
    edit(mended.models[1], lambda tensors: change(tensors, base.to(torch.float32)[1]))
    _, merged = run(broken, method, pipeline={"non_finite": "base"})
    _, wanted = run(mended, method)
    assert all(merged[name].equal(wanted[name]) for name in TINY)


# --- folders -----------------------------------------------------------------------------------------------------


def test_models_named_by_their_file(tmp_path: Path) -> None:
    """Two checkpoints in one folder, each named by its file."""
    family = tiny_family(tmp_path)
    _, wanted = run(family)
    shutil.rmtree(tmp_path / "out")
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(family.base / "config.json", folder)
    for number, source in enumerate(family.models):
        shutil.copy(source / "model.safetensors", folder / f"step{number}.safetensors")
        family.models[number] = folder / f"step{number}.safetensors"
    _, merged = run(family)
    assert all(merged[name].equal(wanted[name]) for name in TINY)


def test_bare_weights_without_any_other_file(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    for folder in (family.base, *family.models):
        for file in folder.glob("*.json"):
            file.unlink()
    report, _ = run(family)
    assert said(report, "no config.json")
    assert said(report, "no tokenizer")
    assert not (tmp_path / "out" / "config.json").exists()


def test_histories_may_differ(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    edit_config(family.models[0], _name_or_path="a", transformers_version="9", use_cache=False, rope_scaling=None)
    edit_config(
        family.models[1],
        rope_theta=...,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        dtype="float32",
    )
    edit_config(family.models[2], bos_token_id=7)
    report, _ = run(family)
    assert said(report, str(family.models[2]), "bos_token_id", "reference")
    assert len(report["notes"]) == 1


def test_awkward_names(tmp_path: Path) -> None:
    """Names are data: nothing in them is a path, a pattern or an escape."""
    names = ["../up", "a/b/c", "täöü 模型", "quote\"'\\", "[x]*?", "x" * 300, "model.layers.0", "{a}", " ", "%s"]
    family = tiny_family(tmp_path / "with space ü", shapes=dict.fromkeys(names, (2, 3)))
    for scope in ("block", "tensor"):
        report, merged = run(family, pipeline={"scope": scope}, name=f"{scope}.yaml")
        assert merged.keys() == set(names)
        assert scope == "block" or {group["name"] for group in report["groups"]} == set(names)
        shutil.rmtree(family.root / "out")


def test_input_behind_links(tmp_path: Path) -> None:
    """The layout of Hugging Face's cache: a snapshot folder of links into a folder of blobs."""
    family = tiny_family(tmp_path)
    _, wanted = run(family)
    shutil.rmtree(tmp_path / "out")
    for number, folder in enumerate(family.models):
        snapshot, blobs = tmp_path / f"cache{number}" / "snapshot", tmp_path / f"cache{number}" / "blobs"
        shutil.copytree(folder, blobs)
        snapshot.mkdir()
        for file in blobs.iterdir():
            (snapshot / file.name).symlink_to(file)
        family.models[number] = snapshot
    _, merged = run(family)
    assert all(merged[name].equal(wanted[name]) for name in TINY)


def test_unrelated_files_beside_the_weights(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    (family.base / "training_args.bin").write_bytes(b"x")
    (family.base / "pytorch_model.bin").write_bytes(b"x")
    save_file({"state": torch.zeros(2)}, family.base / "optimizer.safetensors")
    _, merged = run(family)
    assert merged.keys() == set(TINY)
    assert not list((tmp_path / "out").glob("*.bin"))
