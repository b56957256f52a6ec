"""Damaged, mismatched and wrong inputs: refused with a text that leads to the place, and nothing committed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import CheckpointError, PipelineError, RecipeError, StorageError
from pipeline.merging import Resources, load_recipe, merge, plan_merge
from pipeline.planning.plan import Plan
from pipeline.recipe import Recipe
from pipeline.storage import Store, open_store

from .support.cases import (
    EMBEDDING,
    HEAD,
    MLP,
    TINY,
    data_start,
    edit,
    edit_config,
    flip_bit,
    refused,
    run_cli,
    tiny_family,
)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def plan_or_error(recipe: Recipe, output: Store) -> Plan | str:
    try:
        return plan_merge(recipe, output, Resources(), probe=False).plan
    except CheckpointError as error:
        return str(error)


# --- damaged files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "word"), [(-100, "truncated"), (60, "truncated"), (7, "8 at least"), (0, "8 at least")]
)
def test_truncated_file(tmp_path: Path, size: int, word: str) -> None:
    family = tiny_family(tmp_path)
    file = family.models[1] / "model.safetensors"
    cut(file, size)
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(file), word)


def test_trailing_bytes(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    file = family.models[1] / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(file), "trailing")


def test_every_flipped_header_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, 2)
    recipe, output = load_recipe(str(family.recipe()))[0], open_store(str(tmp_path / "out"))
    file = family.models[0] / "model.safetensors"
    good = plan_merge(recipe, output, Resources(), probe=False).plan
    metadata = file.read_bytes().index(b"__metadata__")
    silent = []
    for position in range(data_start(file)):
        flip_bit(file, position, position % 8)
        found = plan_or_error(recipe, output)
        flip_bit(file, position, position % 8)
        if isinstance(found, str):
            assert str(family.models[0]) in found
        else:
            assert found.tensors == good.tensors, f"byte {position} changed the plan"
            silent.append(position)
    # Only the free text of the metadata may be anything.
    assert all(metadata <= position < metadata + len('__metadata__":{"format":"pt"}') for position in silent), silent


def test_shard_of_the_index_is_absent(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, shards=3)
    shard = family.models[2] / "model-00002-of-00003.safetensors"
    shard.unlink()
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(shard), "does not exist")


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, shards=2)
    path = family.models[0] / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost.weight"] = index["weight_map"].pop(HEAD)
    path.write_text(json.dumps(index))
    text = refused(family.recipe(), tmp_path / "out", CheckpointError, "ghost.weight", HEAD, str(family.models[0]))
    assert "2 problems" in text


@pytest.mark.parametrize("shard", ["../expert1/model.safetensors", "/etc/passwd", "model.bin"])
def test_index_points_outside(tmp_path: Path, shard: str) -> None:
    family = tiny_family(tmp_path, shards=2)
    path = family.models[0] / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys(TINY, shard)}))
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(path), shard)


def test_all_damage_is_reported_at_once(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, 4)
    for number in (0, 2, 3):
        cut(family.models[number] / "model.safetensors", 50)
    text = refused(family.recipe(), tmp_path / "out", CheckpointError, *(str(family.models[n]) for n in (0, 2, 3)))
    assert "3 problems" in text
    assert str(family.models[1]) not in text


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\ud800".encode("utf-8", "surrogatepass").decode("latin1")])
def test_damaged_config(tmp_path: Path, text: str) -> None:
    family = tiny_family(tmp_path)
    path = family.models[1] / "config.json"
    path.write_text(text, encoding="latin1")
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(path))


# --- no family ---------------------------------------------------------------------------------------------------


def test_missing_tensor(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    edit(family.models[1], lambda tensors: tensors.pop(MLP))
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(family.models[1]), MLP, "lacks")


def test_extra_tensor(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    edit(family.models[1], lambda tensors: tensors.update(extra=torch.zeros(3)))
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(family.models[1]), "tensor extra", "has")


def test_shape_mismatch(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    edit(family.models[1], lambda tensors: tensors.update({MLP: torch.zeros(3, 4)}))
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(family.models[1]), MLP, "[3, 4]", "[4, 4]")


def test_other_vocabulary(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    edit(family.models[1], lambda tensors: tensors.update({n: torch.zeros(10, 4) for n in (EMBEDDING, HEAD)}))
    text = refused(family.recipe(), tmp_path / "out", CheckpointError, "10 and 8 tokens", "vocabulary", EMBEDDING, HEAD)
    assert "2 problems" in text


def test_head_missing_from_an_untied_model(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    edit(family.models[1], lambda tensors: tensors.pop(HEAD))
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(family.models[1]), HEAD, "not tied")


def test_head_only_in_one_model_of_a_headless_family(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in TINY.items() if name != HEAD}
    family = tiny_family(tmp_path, shapes=shapes)
    edit(family.models[2], lambda tensors: tensors.update({HEAD: torch.ones(8, 4)}))
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(family.models[2]), HEAD)


def test_tied_copies_that_differ(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, config={"tie_word_embeddings": True})
    for folder in (family.base, *family.models):
        edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    edit(family.models[1], lambda tensors: tensors[HEAD].view(-1)[7:8].add_(1))
    for method in ("geometric_median", "linear"):
        words = (str(family.models[1]), EMBEDDING, "tied", "tie_word_embeddings")
        refused(family.recipe(method), tmp_path / method, CheckpointError, *words)


def test_tied_copy_of_another_type(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, config={"tie_word_embeddings": True})
    for folder in (family.base, *family.models):
        edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    edit(family.models[1], lambda tensors: tensors.update({HEAD: tensors[HEAD].to(torch.float16)}))
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(family.models[1]), HEAD)


def test_integers_that_disagree(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    for folder in (family.base, *family.models):
        edit(folder, lambda tensors: tensors.update(positions=torch.arange(5)))
    edit(family.models[2], lambda tensors: tensors["positions"].add_(1))
    for method in ("geometric_median", "linear"):
        words = (str(family.models[2]), "tensor positions", "I64", "never averaged")
        refused(family.recipe(method), tmp_path / method, CheckpointError, *words)


def test_integers_against_floats(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    edit(family.models[0], lambda tensors: tensors.update({MLP: torch.zeros(4, 4, dtype=torch.int32)}))
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(family.models[0]), MLP, "I32", "F32")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 1e6),
        ("rope_scaling", {"rope_type": "yarn", "factor": 8.0}),
        ("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}),
        ("rms_norm_eps", 1e-5),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
        ("num_attention_heads", 8),
        ("num_hidden_layers", 4),
        ("architectures", ["MistralForCausalLM"]),
        ("model_type", "mistral"),
    ],
)
def test_config_values_that_change_the_computation(tmp_path: Path, key: str, value: object) -> None:
    family = tiny_family(tmp_path)
    edit_config(family.models[1], **{key: value})
    named = {"rope_scaling": "rope_type", "rope_parameters": "rope_theta"}.get(key, key)
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(family.models[1]), "config.json", named)


def test_quantized_model(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    edit_config(family.models[1], quantization_config={"quant_method": "gptq"})
    refused(family.recipe(), tmp_path / "out", CheckpointError, str(family.models[1]), "quantized", "gptq")


def test_adapter(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    for folder in family.models:
        (folder / "model.safetensors").unlink()
        factor = "base_model.model.model.layers.0.mlp.lora_A.weight"
        save_file({factor: torch.zeros(2, 4)}, folder / "adapter_model.safetensors")
    words = (str(family.models[0]), "adapter", "lora_A", "merge_and_unload")
    refused(family.recipe(base=False), tmp_path / "out", CheckpointError, *words)


# --- no model ----------------------------------------------------------------------------------------------------


def test_model_is_absent_empty_or_a_pickle(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, 4)
    shutil.rmtree(family.models[0])
    (family.models[1] / "model.safetensors").unlink()
    (family.models[2] / "model.safetensors").rename(family.models[2] / "pytorch_model.bin")
    text = refused(family.recipe(), tmp_path / "out", CheckpointError, *map(str, family.models[:3]))
    assert "pickle" in text
    assert "does not exist" in text


def test_unknown_scheme(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    family.models[1] = Path("nosuch:/bucket/model")
    recipe = family.recipe()
    recipe.write_text(recipe.read_text().replace("nosuch:/", "nosuch://"))
    refused(recipe, tmp_path / "out", StorageError, "nosuch://bucket/model", "scheme")


def test_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    for file in family.models[1].glob("tokenizer*"):
        file.unlink()
    recipe = family.recipe(tokenizer_source=f"{family.models[1]}/")
    refused(recipe, tmp_path / "out", CheckpointError, str(family.models[1]), "tokenizer_source")


# --- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "keys", "words"),
    [
        ("geometric_median", {"merge_methd": "linear"}, ("merge_methd", "merge_method")),
        ("geometric_median", {"pipeline": {"scpoe": "block"}}, ("scpoe", "scope")),
        ("geometric_median", {"weights": [1, 0, 1]}, ("weight", "greater than 0")),
        ("geometric_median", {"weights": [1, -2, 1]}, ("weight", "greater than 0")),
        ("geometric_median", {"weights": [1, 1e300, 1]}, ("1e+300", "1e+75", "expert1")),
        ("geometric_median", {"parameters": {"wieght": 2}}, ("wieght", "weight")),
        ("geometric_median", {"dtype": "bf16"}, ("bf16", "bfloat16")),
        ("geometric_median", {"out_dtpye": "float16"}, ("out_dtpye", "out_dtype")),
        ("median_geometric", {}, ("median_geometric", "geometric_median")),
        ("linear", {"weights": [1, -2, 1]}, ("sum to 0", "normalize: false")),
        ("linear", {"pipeline": {"scope": "block"}}, ("scope", "linear")),
        ("linear", {"parameters": {"weight": [{"value": 2, "filter": "nowhere"}, {"value": 1}]}}, ("nowhere",)),
        ("geometric_median", {"pipeline": {"scope": [{"name": "a", "tensors": ["*.nope"]}]}}, ("*.nope", "'a'")),
        ("geometric_median", {"tokenizer_source": "union"}, ("union",)),
    ],
)
def test_recipe(tmp_path: Path, method: str, keys: dict[str, object], words: tuple[str, ...]) -> None:
    family = tiny_family(tmp_path)
    refused(family.recipe(method, **keys), tmp_path / "out", RecipeError, *words)


def test_same_model_twice(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    family.models.append(family.models[0])
    refused(family.recipe(), tmp_path / "out", RecipeError, str(family.models[0]), "twice")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"[]", b"", b"a: [", b"models: []\nmerge_method: linear"])
def test_no_recipe(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        merge(str(path), str(tmp_path / "out"))


# --- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["nan", "recipe"])
def test_command_line(tmp_path: Path, case: str) -> None:
    family = tiny_family(tmp_path)
    if case == "nan":
        edit(family.models[1], lambda tensors: tensors[MLP][0, :3].fill_(float("nan")))
    recipe = family.recipe(**({"unknown": 1} if case == "recipe" else {}))
    result = run_cli("merge", recipe, tmp_path / "out")
    assert result.returncode == (RecipeError if case == "recipe" else CheckpointError).exit_code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    last = next(line for line in result.stderr.splitlines() if "error: " in line)
    words = {
        "nan": (str(family.models[1]), MLP, "3 of 16"),
        "recipe": ("unknown",),
    }
    assert all(word in last for word in words[case])


def test_transformers_finds_no_model_after_a_refusal(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    family = tiny_family(tmp_path)
    edit(family.models[1], lambda tensors: tensors[HEAD].fill_(float("nan")))
    recipe = family.recipe(pipeline={"scope": "tensor", "file_size": "200"})
    refused(recipe, tmp_path / "out", PipelineError, HEAD)
    config = transformers.AutoConfig.from_pretrained(family.base)
    with pytest.raises(OSError, match="no file named"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", config=config)
