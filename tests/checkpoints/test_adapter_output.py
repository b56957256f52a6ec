from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_FILE, Factors, Placement, open_adapter, place
from pipeline.checkpoints.adapter_output import factor_names, merged_config, replaced_name, stored_shapes
from pipeline.checkpoints.checkpoint import open_checkpoint

from .adapter_models import (
    Convolutions,
    Tensors,
    assert_same,
    bert,
    gpt2,
    llama,
    merged_by_peft,
    merged_by_placement,
    product,
    save_adapter,
    save_base,
    t5,
)

Build = Callable[[], nn.Module]

CASES: dict[str, tuple[Build, dict[str, object]]] = {
    "linear": (llama, {"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"], "use_rslora": True}),
    "embedding and head": (llama, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "modules to save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "encoder and decoder": (
        t5,
        {"target_modules": ["q", "wo", "relative_attention_bias"], "task_type": "SEQ_2_SEQ_LM"},
    ),
    "classifier": (bert, {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}),
    "all biases": (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "bias": "all"}),
    "own biases": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "low-rank biases": (bert, {"target_modules": ["query", "dense"], "lora_bias": True}),
    "kernels": (Convolutions, {"target_modules": ["one", "two", "three", "point", "linear", "table"]}),
    "kernels with biases": (Convolutions, {"target_modules": ["one", "two", "three", "point"], "lora_bias": True}),
}


def write_merged(
    folder: Path, placement: Placement, base: Mapping[str, torch.Tensor], donor: Mapping[str, object], **words: object
) -> tuple[Tensors, dict[str, object]]:
    """Write an adapter of random factors of different ranks, and return the tensors it must lead to."""
    weights = {name: factors for name, factors in placement.updates.items() if factors.right is not None}
    ranks = {factors.module: 2 + number % 3 for number, factors in enumerate(weights.values())}
    stored: Tensors = {}
    expected = dict(base)
    for name in placement.replaced:
        expected[name] = torch.randn_like(base[name])
        stored[replaced_name(name, ranks, placement.correction)] = expected[name]
    for name, factors in placement.updates.items():
        shape = tuple(base[name].shape)
        rank = ranks[factors.module]
        names, shapes = factor_names(factors), stored_shapes(factors, shape, rank)
        stored |= {key: torch.randn(size, dtype=torch.float64) for key, size in zip(names, shapes, strict=True)}
        merged = _at_rank(factors, names, shapes, rank)
        expected[name] = expected[name] + product(merged, stored, shape)
    config = merged_config(donor, ranks=ranks, **words)
    folder.mkdir()
    save_file(stored, folder / ADAPTER_FILE)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    return expected, config


def _at_rank(factors: Factors, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], rank: int) -> Factors:
    """Return an update of scale one with its tensors renamed."""
    left = dataclasses.replace(factors.left, name=names[0], shape=shapes[0])
    if factors.right is None:
        return dataclasses.replace(factors, left=left, scale=1.0)
    right = dataclasses.replace(factors.right, name=names[1], shape=shapes[1])
    return dataclasses.replace(factors, left=left, right=right, rank=rank, scale=1.0)


@pytest.mark.parametrize("case", CASES)
def test_peft_adds_exactly_what_is_written(tmp_path: Path, case: str) -> None:
    build, settings = CASES[case]
    base = save_base(build, tmp_path / "base")
    donor = open_adapter(str(save_adapter(build, base, tmp_path / "donor", r=3, **settings)))
    placement = place(donor, open_checkpoint(str(base)))
    words = {"bias": settings.get("bias", "none"), "lora_bias": bool(settings.get("lora_bias"))}
    if "modules_to_save" in settings:
        words["modules_to_save"] = settings["modules_to_save"]
    out = tmp_path / "merged"
    expected, config = write_merged(out, placement, load_file(base / "model.safetensors"), donor.config, **words)
    found, warned = merged_by_peft(build, base, out, tmp_path / "merged by peft")
    assert_same(found, expected)
    assert not [text for text in warned if "missing" in text or "unexpected" in text or "rank" in text]
    # And it is read here as it was meant.
    again = place(open_adapter(str(out)), open_checkpoint(str(base)))
    assert {factors.scale for factors in again.updates.values()} == {1.0}
    assert again.updates.keys() == placement.updates.keys()
    assert_same(merged_by_placement(again, base, out), expected)
    assert list(config) == sorted(config)
    assert config["base_model_name_or_path"] == donor.config["base_model_name_or_path"]


def test_the_names_of_a_donor_are_kept_by_the_merge(tmp_path: Path) -> None:
    settings = CASES["own biases"][1]
    base = save_base(bert, tmp_path / "base")
    donor = save_adapter(bert, base, tmp_path / "donor", r=3, **settings)
    adapter = open_adapter(str(donor))
    tensors = load_file(base / "model.safetensors")
    hub = tmp_path / "hub"
    hub.mkdir()
    # The base without the leading component that the adapter has.
    save_file({name.removeprefix("bert."): tensor for name, tensor in tensors.items()}, hub / "model.safetensors")
    placement = place(adapter, open_checkpoint(str(hub)))
    assert placement.correction.removed == "bert."
    modules = [factors.module for factors in placement.updates.values()]
    names = {name for factors in placement.updates.values() for name in factor_names(factors)}
    names |= {replaced_name(name, modules, placement.correction) for name in placement.replaced}
    assert names == set(load_file(donor / ADAPTER_FILE))


def test_the_config_says_as_little_as_it_can() -> None:
    donor = {
        "r": 99,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": ["x"],
        "rank_pattern": {"x": 3},
        "layers_to_transform": [1],
        "modules_to_save": ["head"],
        "eva_config": {"rho": 2},
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "fan_in_fan_out": True,
        "revision": None,
    }
    ranks = {"a.q": 4, "a.1": 8, "a.11": 8, "b": 2, "c": 4}
    config = merged_config(donor, ranks=ranks)
    assert config == {
        "alpha_pattern": {r"^a\.1": 8, r"^a\.11": 8, "^b": 2},
        "base_model_name_or_path": "some/base",
        "bias": "none",
        "fan_in_fan_out": True,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 4,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {r"^a\.1": 8, r"^a\.11": 8, "^b": 2},
        "revision": None,
        "target_modules": ["a.q", "a.1", "a.11", "b", "c"],
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    assert merged_config(donor, ranks=dict(reversed(ranks.items())))["r"] == 4
    # By peft's own matching each module gets its rank, and none that only ends like it.
    patterns = {**config["rank_pattern"]}
    for module, rank in {**ranks, "x.b": 4, "z.a.1": 4, "a.1.b": 4}.items():
        assert patterns.get(get_pattern_key(patterns, module), config["r"]) == rank


def test_only_whole_tensors_are_an_adapter_too(tmp_path: Path) -> None:
    base = save_base(llama, tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    norm = torch.full((8,), 3.0, dtype=torch.float64)
    save_file({replaced_name("model.norm.weight"): norm}, out / ADAPTER_FILE)
    (out / ADAPTER_CONFIG).write_text(json.dumps(merged_config({}, ranks={})))
    found, _ = merged_by_peft(llama, base, out, tmp_path / "merged")
    assert torch.equal(found["model.norm.weight"], norm)
    placement = place(open_adapter(str(out)), open_checkpoint(str(base)))
    assert (list(placement.updates), list(placement.replaced)) == ([], ["model.norm.weight"])


def test_the_order_of_factors_follows_the_orientation(tmp_path: Path) -> None:
    base = save_base(gpt2, tmp_path / "base")
    folder = save_adapter(gpt2, base, tmp_path / "a", target_modules=["c_attn"], r=3, fan_in_fan_out=True)
    factors = place(open_adapter(str(folder)), open_checkpoint(str(base))).updates["transformer.h.0.attn.c_attn.weight"]
    path = "base_model.model.transformer.h.0.attn.c_attn"
    assert factor_names(factors) == (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
    assert (factors.left.name, factors.right and factors.right.name) == factor_names(factors)
    assert stored_shapes(factors, (8, 24), 5) == ((5, 8), (24, 5))
