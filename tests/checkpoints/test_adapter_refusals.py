from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import adapter_config
from pipeline.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_FILE, is_adapter, open_adapter, place
from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.errors import CheckpointError

from .adapter_models import Convolutions, configure, gpt2, llama, rewrite, save_adapter, save_base, t5

Q = "base_model.model.model.layers.0.self_attn.q_proj"
PEFT = "merge_and_unload"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(llama, tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(partial(llama, tied=True), tmp_path_factory.mktemp("base") / "tied")


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An adapter of rank 2 on q_proj and down_proj, and the last norm stored whole."""
    settings = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["model.norm"], "r": 2, "lora_alpha": 4}
    return save_adapter(llama, base, tmp_path_factory.mktemp("pattern") / "adapter", **settings)


@pytest.fixture
def folder(tmp_path: Path, pattern: Path) -> Path:
    """A copy of the pattern, to be spoilt."""
    return Path(shutil.copytree(pattern, tmp_path / "adapter"))


def refused(folder: Path, *words: str, base: Path | None = None) -> CheckpointError:
    """Return the error of opening, or of placing where a base is given; every word is in its text."""
    with pytest.raises(CheckpointError) as caught:
        _open_and_place(folder, base)
    text = str(caught.value)
    assert str(folder) in text
    for word in words:
        assert word in text
    return caught.value


def _open_and_place(folder: Path, base: Path | None) -> None:
    adapter = open_adapter(str(folder))
    if base is not None:
        place(adapter, open_checkpoint(str(base)))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Change the tensors of an adapter in place."""
    tensors = load_file(folder / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, folder / ADAPTER_FILE)
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, ("use_dora is True", "DoRA")),
        ({"use_qalora": True}, ("use_qalora", "QALoRA")),
        ({"use_bdlora": {"nblocks": 2}}, ("use_bdlora", "block-diagonal")),
        ({"alora_invocation_tokens": [1, 2]}, ("alora_invocation_tokens is [1, 2]",)),
        ({"layer_replication": [[0, 2], [1, 3]]}, ("layer_replication",)),
        ({"trainable_token_indices": [3]}, ("trainable_token_indices",)),
        ({"target_parameters": ["experts.down_proj"]}, ("target_parameters",)),
        ({"megatron_config": {"a": 1}}, ("megatron_config",)),
        ({"arrow_config": {"top_k": 3}}, ("arrow_config",)),
        # An empty object is a method with its defaults.
        ({"monteclora_config": {}}, ("monteclora_config is {}",)),
        ({"kasa_config": {}}, ("kasa_config", "truncates the base")),
        ({"enable_lora": [True, False, True]}, ("enable_lora",)),
        ({"peft_type": "ADALORA"}, ("peft_type is 'ADALORA'",)),
        ({"peft_type": "IA3"}, ("peft_type is 'IA3'",)),
        ({"peft_type": None}, ("peft_type is None",)),
        *(
            ({"init_lora_weights": start}, (f"init_lora_weights is '{start}'", "changed the base"))
            for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
        ),
        ({"init_lora_weights": "brand_new"}, ("'brand_new'", "unknown")),
        ({"frobnicate": {"depth": 2}}, ("'frobnicate'", "{'depth': 2}")),
        ({"new_number": 1}, ("'new_number'",)),
        ({"use_dora": True, "new_number": 1, "peft_type": "X"}, ("3 problems", "use_dora", "new_number", "'X'")),
    ],
)
def test_settings_that_are_no_plain_lora(folder: Path, fields: dict[str, object], words: tuple[str, ...]) -> None:
    error = refused(configure(folder, **fields), ADAPTER_CONFIG, *words)
    assert all(PEFT in problem.remedy for problem in error.problems)


def test_every_field_of_peft_is_known() -> None:
    known = adapter_config._HARMLESS | adapter_config._REFUSED.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, ("r is 0",)),
        ({"r": -2}, ("r is -2",)),
        ({"r": True}, ("r is True",)),
        ({"r": 2.0}, ("r is 2.0",)),
        ({"r": None}, ("r is None",)),
        ({"lora_alpha": "16"}, ("lora_alpha is '16'",)),
        ({"lora_alpha": float("nan")}, ("lora_alpha is nan",)),
        ({"lora_alpha": float("inf")}, ("lora_alpha is inf",)),
        ({"lora_alpha": 10**400}, ("lora_alpha is 1000",)),
        ({"rank_pattern": {"q_proj": 0}}, ("rank_pattern of 'q_proj' is 0",)),
        ({"rank_pattern": {"q_(proj": 2}}, ("'q_(proj'", "no regular expression")),
        ({"rank_pattern": ["q_proj"]}, ("rank_pattern is ['q_proj']",)),
        ({"alpha_pattern": {"q_proj": None}}, ("alpha_pattern of 'q_proj' is None",)),
        ({"alpha_pattern": {"(.*)*(.*)*X": 4}}, ("may take for ever to match",)),
        ({"alpha_pattern": {"([a-z.0-9_]+)+X": 4}}, ("may take for ever to match",)),
        ({"rank_pattern": {"((a|b+)c){3}": 4}}, ("may take for ever to match",)),
        ({"rank_pattern": {".*.*.*.*.*q_proj": 4}}, ("may take for ever to match",)),
        ({"use_rslora": "yes"}, ("use_rslora is 'yes'",)),
        ({"fan_in_fan_out": 1}, ("fan_in_fan_out is 1",)),
        ({"bias": "some"}, ("bias is 'some'", "lora_only")),
    ],
)
def test_settings_that_are_no_numbers_or_switches(
    folder: Path, fields: dict[str, object], words: tuple[str, ...]
) -> None:
    refused(configure(folder, **fields), ADAPTER_CONFIG, *words)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"lora"', '{"r": 2, "r": 3}', "\xff"],
    ids=["empty", "cut", "list", "text", "twice", "bytes"],
)
def test_a_broken_config(folder: Path, text: str) -> None:
    (folder / ADAPTER_CONFIG).write_bytes(text.encode("latin-1"))
    refused(folder, ADAPTER_CONFIG)


def test_factors_of_two_adapters_are_not_paired(folder: Path) -> None:
    names = {f"{Q}.lora_A.weight": f"{Q}.lora_A.foo.weight", f"{Q}.lora_B.weight": f"{Q}.lora_B.bar.weight"}
    refused(rewrite(folder, lambda name: names.get(name, name)), "factors of several adapters", "'bar'", "'foo'")


def test_weights_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    weights = folder / ADAPTER_FILE
    other = weights.rename(folder / "pytorch_lora_weights.safetensors")
    refused(folder, "has no adapter_model.safetensors, but pytorch_lora_weights.safetensors", "rename")
    other.rename(folder / "adapter_model.bin")
    (folder / "training_args.bin").write_bytes(b"x")
    assert is_adapter(str(folder))
    refused(folder, "pickle only (adapter_model.bin)", "never loaded")
    (folder / "adapter_model.bin").unlink()
    refused(folder, "has no adapter_model.safetensors", "again")
    (folder / ADAPTER_CONFIG).unlink()
    (folder / "notes.txt").write_text("")
    refused(folder, "it has no adapter_config.json", "save_pretrained")
    refused(tmp_path / "nowhere", "is empty or does not exist", "check the path")


def test_an_adapter_beside_a_full_model_is_not_guessed(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"an adapter \(adapter_model.safetensors\) and a full model"):
        is_adapter(str(folder))


def test_a_damaged_file(folder: Path) -> None:
    path = folder / ADAPTER_FILE
    raw = path.read_bytes()
    path.write_bytes(raw[:-8])
    refused(folder, ADAPTER_FILE, "truncated")
    path.write_bytes((1 << 40).to_bytes(8, "little") + raw[8:])
    refused(folder, ADAPTER_FILE, "claims a header")
    save_file({}, path)
    refused(folder, "has no tensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), ("q_proj", "has no lora_A")),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), ("q_proj", "has no lora_B")),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(8)}), ("lora_magnitude_vector", "DoRA", PEFT)),
        (lambda t: t.update({f"{Q}.lora_E": torch.ones(8, 1)}), ("lora_E", "no factor of a plain LoRA", PEFT)),
        (lambda t: t.update({f"{Q}.lora_A.bias": torch.ones(2)}), ("has lora_A.bias beside lora_A",)),
        (lambda t: t.update({f"{Q}.lora_embedding_A": torch.ones(2, 8)}), ("beside lora_embedding_A",)),
        (lambda t: t.update({f"{Q}.lora_A.other.weight": torch.ones(2, 8)}), ("the same of one module", "one adapter")),
        (lambda t: t.update({Q.removeprefix("base_model.model.") + ".lora_A.weight": torch.ones(2, 8)}), ("the same",)),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(7)}), ("lora_B.bias [7]", "one element for each row")),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 8)}), ("A [3, 8]", "B [8, 2]", "says rank 2")),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(0)}), ("A [0]", "ZeRO-3")),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 8, 1)}), ("A [2, 8, 1]", "B [8, 2]")),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 8).char()}), ("lora_A is of I8", "unquantized")),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 8).to(torch.float8_e4m3fn)}), ("is of F8_E4M3",)),
        (
            lambda t: t.update({f"{Q}.base_layer.out.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}),
            ("inside of a wrapped module", PEFT),
        ),
    ],
)
def test_tensors_that_are_no_plain_lora(folder: Path, change: Callable[..., object], words: tuple[str, ...]) -> None:
    refused(edit(folder, change), ADAPTER_FILE, *words)


def test_all_problems_are_told_and_many_are_counted(folder: Path) -> None:
    def lonely(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({f"m{number}.lora_A.weight": torch.ones(2, 8) for number in range(20)})

    error = refused(edit(folder, lonely), "module 'm0': has no lora_B", "and 12 more of this kind")
    assert len(error.problems) == 9


def test_another_rank_than_configured(folder: Path) -> None:
    error = refused(configure(folder, rank_pattern={"down_proj": 3}), "says rank 3", "rank_pattern")
    assert len(error.problems) == 2
    refused(configure(folder, rank_pattern={}, r=10**400), "says rank 1000")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda name: name.replace("q_proj", "qu_proj"),
            (
                "changes 2 tensors",
                "(nearest: model.layers.0.self_attn.q_proj.weight)",
                "the base that it was trained on",
            ),
        ),
        (lambda name: name.replace("layers.1", "layers.7"), ("model.layers.7.self_attn.q_proj.weight", "changes 2 ")),
        # Two leading components are no correction of one.
        (lambda name: name.replace("model.model.model.", "model.model.a.b."), ("changes 5 tensors", "and 1 more")),
        # A name of its own that all share, but under which one module is missing.
        (
            lambda name: name.replace("model.model.model.layers.1.mlp", "model.model.model.layers.9.mlp").replace(
                "base_model.model.", "base_model.model.wrapper."
            ),
            ("wrapper.model.layers.9.mlp.down_proj.weight", "changes 5 tensors"),
        ),
        (lambda name: name.replace("norm.weight", "scale.weight"), ("model.scale.weight", "nearest")),
    ],
)
def test_names_that_the_base_does_not_have(
    folder: Path, base: Path, change: Callable[[str], str], words: tuple[str, ...]
) -> None:
    refused(rewrite(folder, change), *words, base=base)


def test_a_correction_with_a_choice_is_none(tmp_path: Path, folder: Path) -> None:
    tensors = {f"{half}.q.weight": torch.ones(8, 8) for half in ("encoder", "decoder")}
    path = tmp_path / "two"
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    save_file(
        {f"q.lora_{x}.weight": torch.ones(2, 8) if x == "A" else torch.ones(8, 2) for x in "AB"}, folder / ADAPTER_FILE
    )
    refused(folder, "changes a tensor that", "q.weight", base=path)
    save_file({"encoder.q.weight": torch.ones(8, 8)}, path / "model.safetensors")
    assert list(place(open_adapter(str(folder)), open_checkpoint(str(path))).updates) == ["encoder.q.weight"]


def test_shapes_and_types_that_do_not_fit(folder: Path, base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(base / "model.safetensors")
    names = [
        f"model.layers.{layer}.{module}.weight" for layer in (0, 1) for module in ("mlp.down_proj", "self_attn.q_proj")
    ]
    # Turned round without anything that speaks for it, wider, and quantized in two ways.
    tensors[names[0]] = tensors[names[0]].T.contiguous()
    tensors[names[1]] = torch.ones(10, 8)
    tensors[names[2]] = tensors[names[2]].to(torch.float8_e4m3fn)
    tensors[names[3]] = tensors[names[3]].char()
    tensors["model.norm.weight"] = torch.ones(9)
    save_file(tensors, other / "model.safetensors")
    error = refused(
        folder,
        f"tensor {names[0]}: the update has shape [8, 12], the base's tensor [12, 8]",
        f"tensor {names[1]}: the update has shape [8, 8], the base's tensor [10, 8]",
        f"tensor {names[2]}: adds to a tensor of F8_E4M3",
        f"tensor {names[3]}: adds to a tensor of I8",
        "tensor model.norm.weight: is stored whole with shape [8], the base's has [9]",
        base=other,
    )
    assert len(error.problems) == 5
    save_file(
        {**load_file(base / "model.safetensors"), "model.norm.weight": torch.ones(8).char()},
        other / "model.safetensors",
    )
    refused(folder, "is stored whole with dtype F64, the base's has I8", base=other)


def test_another_vocabulary(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(llama, base, tmp_path / "a", target_modules=["embed_tokens"], r=2)
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.ones(24, 8)
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    error = refused(folder, "the update has shape [20, 8]", "vocabularies of 20 and 24 tokens", base=other)
    assert "stored whole with shape [20, 8]" in str(error)


def test_a_grouped_convolution_is_no_product(tmp_path: Path) -> None:
    base = save_base(Convolutions, tmp_path / "base")
    folder = save_adapter(Convolutions, base, tmp_path / "a", target_modules=["grouped"], r=2)
    # Its B has only the rank of one group.
    refused(folder, "A [2, 4, 1, 1], B [6, 1, 1, 1]", "says rank 2")
    edit(folder, lambda t: t.update({"base_model.model.grouped.lora_B.weight": torch.ones(6, 2, 1, 1)}))
    refused(folder, "the update has shape [6, 4, 1, 1], the base's tensor [6, 2, 1, 1]", "grouped", base=base)


def test_torchs_attention_is_refused_by_name(tmp_path: Path) -> None:
    base = save_base(Convolutions, tmp_path / "base")
    folder = save_adapter(Convolutions, base, tmp_path / "a", target_modules=["attention"], r=2)
    refused(folder, "attention.base_layer.out_proj", "MultiheadAttention", PEFT)


def test_a_bias_that_the_base_does_not_have(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(llama, base, tmp_path / "a", target_modules=["q_proj"], r=2, lora_bias=True)
    refused(folder, "model.layers.0.self_attn.q_proj.bias", base=base)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, ("adds to an embedding", "ties to lm_head.weight")),
        ({"target_modules": ["q_proj", "lm_head"]}, ("tensor lm_head.weight", "adds to an embedding")),
        ({"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, ("adds to an embedding",)),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            ("replaces an embedding but not model.embed_tokens.weight",),
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            ("replaces an embedding but not lm_head.weight",),
        ),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_a_tied_embedding_is_changed_alone(
    tmp_path: Path, tied: Path, settings: dict[str, object], words: tuple[str, ...], stored: bool
) -> None:
    base = tied
    folder = save_adapter(partial(llama, tied=True), base, tmp_path / "a", r=2, **settings)
    if stored:
        base = tmp_path / "stored"
        base.mkdir()
        tensors = load_file(tied / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors")
        (base / "config.json").write_bytes((tied / "config.json").read_bytes())
    refused(folder, *words, "tie_word_embeddings: false", base=base)


def test_two_different_types_for_one_tied_embedding(tmp_path: Path, tied: Path) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "r": 2}
    folder = save_adapter(partial(llama, tied=True), tied, tmp_path / "a", noise=False, **settings)
    edit(folder, lambda t: t.update({"base_model.model.lm_head.weight": t["base_model.model.lm_head.weight"].float()}))
    refused(folder, "different types or shapes", base=tied)


def test_a_silent_gpt2_is_tied(tmp_path: Path) -> None:
    base = save_base(gpt2, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    folder = save_adapter(gpt2, base, tmp_path / "a", target_modules=["c_attn", "wte"], fan_in_fan_out=True, r=2)
    for silent in ({"architectures": config["architectures"]}, {}):
        (base / "config.json").write_text(json.dumps(silent))
        refused(folder, "transformer.wte.weight", "adds to an embedding", base=base)
    # A model without a head ties nothing, whatever its config says.
    (base / "config.json").write_text(json.dumps({"architectures": ["GPT2Model"], "tie_word_embeddings": True}))
    assert "transformer.wte.weight" in place(open_adapter(str(folder)), open_checkpoint(str(base))).updates


@pytest.mark.parametrize("tie", [False, True])
def test_the_shared_embedding_of_encoder_and_decoder(tmp_path: Path, tie: bool) -> None:
    base = save_base(t5, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tie}))
    if not tie:
        tensors = load_file(base / "model.safetensors")
        save_file({**tensors, "lm_head.weight": torch.ones(20, 8)}, base / "model.safetensors")
    folder = save_adapter(t5, base, tmp_path / "a", target_modules=["q", "shared"], r=2)
    refused(folder, "tensor shared.weight", "adds to an embedding", base=base)
