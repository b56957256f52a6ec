from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from peft.tuners.lora.config import VeloraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.checkpoints.adapter import ADAPTER_FILE, is_adapter, open_adapter, place
from pipeline.checkpoints.checkpoint import open_checkpoint

from .adapter_models import (
    Convolutions,
    assert_same,
    bert,
    configure,
    gpt2,
    llama,
    merged_by_peft,
    merged_by_placement,
    rewrite,
    save_adapter,
    save_base,
    t5,
)

Build = Callable[[], nn.Module]

BUILDS: dict[str, Build] = {
    "llama": llama,
    "tied llama": partial(llama, tied=True),
    "gpt2": gpt2,
    "untied gpt2": partial(gpt2, tied=False),
    "t5": t5,
    "bert": bert,
    "convolutions": Convolutions,
}
LLAMA = ["q_proj", "k_proj", "o_proj", "down_proj"]
KERNELS = ["one", "two", "three", "point", "linear"]

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("llama", {"target_modules": LLAMA, "r": 3, "lora_alpha": 7}),
    "all linear": ("tied llama", {"target_modules": "all-linear", "r": 2}),
    "rank-stabilised": ("llama", {"target_modules": LLAMA, "r": 3, "lora_alpha": 7, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": LLAMA,
            "r": 3,
            "lora_alpha": 5,
            # By whole parts, by expression, anchored; the first that matches counts; a part of a part never does.
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 4, "proj": 9, "^down_proj": 9},
            "alpha_pattern": {"k_proj|o_proj": 11, r".*layers.0.*": 2.5, "down_proj": 7},
            "use_rslora": True,
        },
    ),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "random start": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": False}),
    "velora": ("llama", {"target_modules": ["q_proj"], "velora_config": {"num_groups": 2}}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "r": 3, "lora_alpha": 2}),
    "embedding and head": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 3}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3, "fan_in_fan_out": True}),
    "Conv1D unsaid": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 3}),
    "Conv1D, then a linear head": ("untied gpt2", {"target_modules": ["c_attn", "c_proj", "lm_head"], "r": 3}),
    "Conv1D with biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "encoder and decoder": ("t5", {"target_modules": ["q", "v", "wo"], "r": 3, "task_type": "SEQ_2_SEQ_LM"}),
    "relative positions": ("t5", {"target_modules": ["q", "relative_attention_bias"], "r": 2}),
    "classifier": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "r": 3}),
    "saved parts": ("bert", {"target_modules": ["query"], "modules_to_save": ["pooler", "LayerNorm"]}),
    "all biases": ("bert", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "bias": "all"}),
    "own biases": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "low-rank biases": ("bert", {"target_modules": ["query", "dense"], "lora_bias": True, "use_rslora": True}),
    "both biases": ("bert", {"target_modules": ["query", "dense"], "lora_bias": True, "bias": "lora_only"}),
    "embedding of an encoder": ("bert", {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}),
    "kernels": ("convolutions", {"target_modules": [*KERNELS, "table"], "r": 3, "lora_alpha": 5}),
    "kernels with biases": ("convolutions", {"target_modules": KERNELS, "r": 2, "lora_bias": True}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each model, never changed."""
    root = tmp_path_factory.mktemp("bases")
    return {name: save_base(build, root / name) for name, build in BUILDS.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_what_peft_merges(tmp_path: Path, bases: dict[str, Path], case: str) -> None:
    name, settings = CASES[case]
    if "velora_config" in settings:
        settings = {**settings, "velora_config": VeloraConfig(num_groups=2)}
    base, folder = bases[name], tmp_path / "adapter"
    save_adapter(BUILDS[name], base, folder, **settings)
    assert is_adapter(str(folder))
    adapter = open_adapter(str(folder))
    placement = place(adapter, open_checkpoint(str(base)))
    expected, _ = merged_by_peft(BUILDS[name], base, folder, tmp_path / "out")
    assert_same(merged_by_placement(placement, base, folder), expected)
    before = load_file(base / "model.safetensors")
    changed = {name for name, tensor in expected.items() if not torch.equal(tensor, before[name])}
    assert changed == {*placement.updates, *placement.replaced}
    assert adapter.base_name == str(base) or name == "convolutions"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_of_every_float_type(tmp_path: Path, bases: dict[str, Path], dtype: torch.dtype) -> None:
    folder = save_adapter(llama, bases["llama"], tmp_path / "adapter", target_modules=LLAMA, r=3)
    path = folder / ADAPTER_FILE
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    placement = place(open_adapter(str(folder)), open_checkpoint(str(bases["llama"])))
    expected, _ = merged_by_peft(llama, bases["llama"], folder, tmp_path / "out")
    assert_same(merged_by_placement(placement, bases["llama"], folder), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_order_in_the_file_does_not_matter(tmp_path: Path, bases: dict[str, Path], reverse: bool) -> None:
    folder = save_adapter(llama, bases["llama"], tmp_path / "adapter", target_modules=LLAMA, r=3)
    base = open_checkpoint(str(bases["llama"]))
    before = merged_by_placement(place(open_adapter(str(folder)), base), bases["llama"], folder)
    _reorder(folder / ADAPTER_FILE, reverse=reverse)
    assert list(open_adapter(str(folder)).tensors) == sorted(load_file(folder / ADAPTER_FILE), reverse=reverse)
    assert_same(merged_by_placement(place(open_adapter(str(folder)), base), bases["llama"], folder), before)


def test_names_with_the_adapters_own_and_without_a_prefix(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = save_adapter(
        bert, bases["bert"], tmp_path / "a", target_modules=["query", "word_embeddings"], task_type="SEQ_CLS", r=3
    )
    base = open_checkpoint(str(bases["bert"]))
    before = merged_by_placement(place(open_adapter(str(folder)), base), bases["bert"], folder)
    rewrite(folder, lambda name: name.removeprefix("base_model.model."))
    assert_same(merged_by_placement(place(open_adapter(str(folder)), base), bases["bert"], folder), before)
    rewrite(folder, lambda name: name.replace(".weight", ".default.weight") if "lora_" in name else name)
    rewrite(folder, lambda name: name + ".default" if "embedding_" in name else name)
    assert sum(".default" in name for name in load_file(folder / ADAPTER_FILE)) == 6
    assert_same(merged_by_placement(place(open_adapter(str(folder)), base), bases["bert"], folder), before)


@pytest.mark.parametrize(
    ("in_base", "in_adapter", "note"),
    [
        # The base on the hub was saved from the model without its head.
        ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn", "transformer.*, which their base leaves out"),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn", "without transformer.*, which their base has"),
    ],
)
def test_one_leading_component_is_corrected(
    tmp_path: Path, bases: dict[str, Path], in_base: str, in_adapter: str, note: str
) -> None:
    folder = save_adapter(gpt2, bases["gpt2"], tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    expected = merged_by_placement(
        place(open_adapter(str(folder)), open_checkpoint(str(bases["gpt2"]))), bases["gpt2"], folder
    )
    word = "transformer."
    path = tmp_path / "base"
    path.mkdir()
    short = not in_base.startswith(word)
    tensors = load_file(bases["gpt2"] / "model.safetensors")
    save_file({n.removeprefix(word) if short else n: t for n, t in tensors.items()}, path / "model.safetensors")
    if not in_adapter.startswith(word):
        rewrite(folder, lambda name: name.replace(word, ""))
    placement = place(open_adapter(str(folder)), open_checkpoint(str(path)))
    assert [text for text in placement.notes if note in text] == list(placement.notes) != []
    factors = placement.updates[in_base + ".weight"]
    assert factors.module == in_adapter
    name = placement.correction.to_adapter(in_base + ".weight")
    assert name == in_adapter + ".weight"
    assert placement.correction.to_base(name) == in_base + ".weight"
    found = merged_by_placement(placement, path, folder)
    assert_same(found, {n.removeprefix(word) if short else n: t for n, t in expected.items()})


def test_a_replaced_tied_embedding_takes_its_head_along(tmp_path: Path, bases: dict[str, Path]) -> None:
    base = bases["tied llama"]
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    folder = save_adapter(BUILDS["tied llama"], base, tmp_path / "a", noise=False, **settings)
    placement = place(open_adapter(str(folder)), open_checkpoint(str(base)))
    assert placement.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(placement.replaced) == {"lm_head.weight", "model.embed_tokens.weight"}
    # A base that stores its head a second time is tied all the same.
    twice = tmp_path / "twice"
    twice.mkdir()
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors")
    (twice / "config.json").write_bytes((base / "config.json").read_bytes())
    assert place(open_adapter(str(folder)), open_checkpoint(str(twice))) == placement


def test_modules_without_factors_are_not_there(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = save_adapter(
        llama, bases["llama"], tmp_path / "a", target_modules=["q_proj"], layers_to_transform=[0], r=2
    )
    placement = place(open_adapter(str(folder)), open_checkpoint(str(bases["llama"])))
    (only,) = placement.updates
    assert only == "model.layers.0.self_attn.q_proj.weight"
    factors = placement.updates[only]
    assert (factors.kind, factors.rank, factors.transposed) == ("linear", 2, False)
    assert (factors.left.shape, factors.scale, placement.notes) == ((8, 2), 4.0, ())


def test_what_is_an_adapter(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = save_adapter(llama, bases["llama"], tmp_path / "a", target_modules=["q_proj"])
    assert is_adapter(str(folder))
    assert is_adapter(folder.as_uri())
    assert not is_adapter(str(bases["llama"]))
    assert not is_adapter(str(bases["llama"] / "model.safetensors"))
    assert not is_adapter(str(tmp_path / "nowhere"))
    # A forgotten config beside a full model changes nothing.
    (folder / ADAPTER_FILE).rename(folder / "model.safetensors")
    assert not is_adapter(str(folder))


def test_an_adapter_with_default_settings_needs_few_words(tmp_path: Path, bases: dict[str, Path]) -> None:
    folder = save_adapter(llama, bases["llama"], tmp_path / "a", target_modules=["q_proj"])
    base = open_checkpoint(str(bases["llama"]))
    before = place(open_adapter(str(folder)), base)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "rank_pattern": null, "loftq_config": {}}')
    assert place(open_adapter(str(folder)), base).updates == before.updates
    configure(folder, use_dora=False, arrow_config=None, new_list=[], new_word="", new_switch=False, new_part=None)
    assert place(open_adapter(str(folder)), base).updates == before.updates
    for start in ("gaussian", "eva", "orthogonal", "mica", True, False, None):
        configure(folder, init_lora_weights=start)
        assert place(open_adapter(str(folder)), base).updates == before.updates


def _reorder(path: Path, *, reverse: bool) -> None:
    """Write a safetensors file with its tensors' data in the order of their names."""
    tensors = dict(sorted(load_file(path).items(), reverse=reverse))
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F64", "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_square_weight_follows_its_block_not_a_wrong_word(tmp_path: Path) -> None:
    """The other updates of the block fit one way round only; a foreign config says the opposite."""
    base = save_base(llama, tmp_path / "base")
    folder = save_adapter(llama, base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], r=2)
    adapter = open_adapter(str(configure(folder, fan_in_fan_out=True)))
    placed = place(adapter, open_checkpoint(str(base)))
    assert not any(factors.transposed for factors in placed.updates.values())
    assert any("fan_in_fan_out: true" in note for note in placed.notes)


def test_a_square_head_is_not_judged_by_the_blocks(tmp_path: Path) -> None:
    """GPT-2's blocks are stored as (in, out), its classifier is not; the config speaks of the layer adapted last."""

    def classifier() -> nn.Module:
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, vocab_size=32, num_labels=8)
        return transformers.GPT2ForSequenceClassification(config)

    base = save_base(classifier, tmp_path / "base")
    folder = save_adapter(classifier, base, tmp_path / "adapter", target_modules=["c_attn", "score"], r=2)
    placed = place(open_adapter(str(folder)), open_checkpoint(str(base)))
    turned = {name: factors.transposed for name, factors in placed.updates.items()}
    assert turned.pop("score.weight") is False
    assert turned
    assert all(turned.values())


def test_the_name_of_a_base_that_is_no_text_is_left_out(tmp_path: Path) -> None:
    base = save_base(llama, tmp_path / "base")
    folder = save_adapter(llama, base, tmp_path / "adapter", target_modules=["q_proj"], r=2)
    assert open_adapter(str(configure(folder, base_model_name_or_path="\ud800x"))).base_name is None
