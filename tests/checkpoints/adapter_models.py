"""Small models and adapters in the layouts of transformers and peft, and what peft itself makes of them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_FILE, Factors, Placement

Tensors = dict[str, torch.Tensor]
_TINY = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Convolutions(nn.Module):
    """Kernels of every dimension, with plain layers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3)
        self.two = nn.Conv2d(4, 6, (2, 3))
        self.three = nn.Conv3d(4, 6, 2)
        self.point = nn.Conv2d(4, 6, 1)
        self.grouped = nn.Conv2d(4, 6, 1, groups=2)
        self.linear = nn.Linear(4, 5)
        self.table = nn.Embedding(7, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.dummy = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def llama(*, tied: bool = False) -> nn.Module:
    """Square q_proj and o_proj, other widths elsewhere, no biases."""
    config = transformers.LlamaConfig(
        **_TINY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(*, tied: bool = True) -> nn.Module:
    """Linear weights stored as (in, out), one of them square."""
    config = transformers.GPT2Config(**_TINY, n_embd=8, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=tied)
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    """Encoder and decoder, an embedding of relative positions in each."""
    config = transformers.T5Config(
        **_TINY, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    """Biases everywhere, a head of its own."""
    config = transformers.BertConfig(
        **_TINY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return transformers.BertForSequenceClassification(config)


def save_base(build: Callable[[], nn.Module], folder: Path) -> Path:
    """Write a model in float64, as its library does."""
    torch.manual_seed(0)
    model = build().double()
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder)
    else:
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def load_base(build: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """Return the model that `save_base` wrote."""
    model = build().double()
    if isinstance(model, transformers.PreTrainedModel):
        return type(model).from_pretrained(folder, dtype=torch.float64)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def save_adapter(
    build: Callable[[], nn.Module], base: Path, folder: Path, *, seed: int = 1, noise: bool = True, **settings: object
) -> Path:
    """Write an adapter with peft, then change everything in its file: no value is an initialisation's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(load_base(build, base), LoraConfig(**settings))
        model.save_pretrained(folder)
    path = folder / ADAPTER_FILE
    changed = {name: value + noise * torch.randn_like(value) for name, value in load_file(path).items()}
    save_file(changed, path)
    return folder


def rewrite(folder: Path, change: Callable[[str], str]) -> Path:
    """Rename every tensor of an adapter."""
    tensors = load_file(folder / ADAPTER_FILE)
    save_file({change(name): value for name, value in tensors.items()}, folder / ADAPTER_FILE)
    return folder


def configure(folder: Path, **fields: object) -> Path:
    """Change fields of an adapter's config."""
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def merged_by_peft(build: Callable[[], nn.Module], base: Path, adapter: Path, out: Path) -> tuple[Tensors, list[str]]:
    """Return all tensors of the base with the adapter merged in by peft, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = PeftModel.from_pretrained(load_base(build, base), adapter).merge_and_unload()
        if isinstance(merged, transformers.PreTrainedModel):
            merged.save_pretrained(out)
            tensors = load_file(out / "model.safetensors")
        else:
            tensors = dict(merged.state_dict())
    return tensors, [str(warning.message) for warning in caught]


def product(factors: Factors, stored: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Return an update as a tensor, by the definition: scale · left @ right."""
    left = stored[factors.left.name].double()
    if factors.right is None:
        return factors.scale * left
    right = stored[factors.right.name].double()
    rank = factors.rank
    if factors.transposed:
        left, right = left.T, right.T
    left, right = left.reshape(-1, rank), right.reshape(rank, -1)
    assert left.shape[0] * right.shape[1] == math.prod(shape)
    return (factors.scale * left @ right).reshape(shape)


def merged_by_placement(placement: Placement, base: Path, adapter: Path) -> Tensors:
    """Return all tensors of the base with the placed adapter added."""
    stored = load_file(adapter / ADAPTER_FILE)
    tensors = load_file(base / "model.safetensors")
    tensors |= {name: stored[entry.name] for name, entry in placement.replaced.items() if name in tensors}
    for name, factors in placement.updates.items():
        tensors[name] = tensors[name] + product(factors, stored, tuple(tensors[name].shape))
    return tensors


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Every tensor, to the rounding of float64 sums of a few products."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=1e-12, atol=1e-13, msg=name)
