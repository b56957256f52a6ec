"""The output in the hands of the libraries it is made for: transformers and the official safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pipeline.merging import merge
from tests.support.families import Family, make_family
from tests.support.reference import reference_median

transformers = pytest.importorskip("transformers", reason="the test extra brings transformers")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 5, dtype=torch.float32, shards=2, loud=2)


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(1, 41).reshape(2, 20)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_transformers_loads_it_and_its_logits_are_the_references(family: Family, tmp_path: Path, scope: str) -> None:
    out = tmp_path / "out"
    merge(str(family.recipe(pipeline={"scope": scope, "file_size": "60KB"}, name=f"{scope}.yaml")), str(out))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    group_of = {"model": lambda name: "model", "tensor": lambda name: name}[scope]
    wanted, _ = reference_median(family.values, [1.0] * 5, group_of, torch.float32)
    reference = transformers.AutoModelForCausalLM.from_config(model.config)
    reference.load_state_dict(wanted)
    torch.testing.assert_close(logits(model), logits(reference.eval()), rtol=1e-5, atol=1e-6)
    assert model.generation_config.eos_token_id == 2


def test_the_official_library_reads_every_file(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = merge(str(family.recipe(pipeline={"file_size": "30KB"}, out_dtype="bfloat16", name="bf.yaml")), str(out))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    seen = {}
    for entry in report["files"]:
        with safe_open(out / entry["name"], "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                assert tensor.dtype == torch.bfloat16
                assert tensor.shape == family.base_values[name].shape
                seen[name] = entry["name"]
    assert seen == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(value.numel() * 2 for value in family.base_values.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16


def test_a_model_saved_by_transformers_merges_and_loads_again(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    folders = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        folders.append(tmp_path / f"model{seed}")
        model.save_pretrained(folders[-1], max_shard_size="20KB" if seed % 2 else "1GB")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"merge_method": "geometric_median", "models": [{"model": str(folder)} for folder in folders]})
    )
    report = merge(str(recipe), str(tmp_path / "out"))
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    coefficients = report["groups"][0]["coefficients"]
    states = [transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]
    for name, value in merged.state_dict().items():
        wanted = sum(c * state[name].double() for c, state in zip(coefficients, states, strict=True))
        torch.testing.assert_close(value, wanted.float(), rtol=1e-6, atol=1e-8)
