"""Families to merge: Llama-shaped bfloat16 checkpoints, a base and fine-tunes near it.

    python -m tests.benchmarks.family FOLDER SIZE MODELS

Owns shapes and random values. The values matter only in that no two are alike.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

# Random numbers drawn once and cut at random places: drawing them anew would take longer than the merges.
_POOL_ELEMENTS = 1 << 26
_SPREAD = 0.02
# What a fine-tune changes: the low half of a bfloat16's mantissa, a few hundredths of a value. No bits of it make an
# infinity, and it takes no arithmetic: families must not take longer to make than to merge.
_CHANGED_BITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama by its four numbers."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int


# By name, roughly the number of parameters.
SHAPES = {
    "200K": Shape(hidden=64, intermediate=128, layers=2, vocabulary=1000),
    "25M": Shape(hidden=512, intermediate=1408, layers=4, vocabulary=12000),
    "100M": Shape(hidden=768, intermediate=2048, layers=7, vocabulary=32000),
    "400M": Shape(hidden=1024, intermediate=2816, layers=26, vocabulary=32000),
    "500M": Shape(hidden=1280, intermediate=3456, layers=21, vocabulary=32000),
}


def make_family(root: Path, shape: Shape, models: int) -> None:
    """Write a base and its fine-tunes into the folders model0 (the base), model1, …"""
    generator = torch.Generator().manual_seed(0)
    tensors = _tensors(shape)
    values = (torch.randn(_POOL_ELEMENTS, generator=generator) * _SPREAD).bfloat16()
    changes = torch.randint(1 << _CHANGED_BITS, (_POOL_ELEMENTS,), generator=generator, dtype=torch.int16)

    def cut(pool: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        elements = torch.Size(size).numel()
        start = int(torch.randint(_POOL_ELEMENTS - elements, (1,), generator=generator))
        return pool[start : start + elements].view(size)

    base = {name: cut(values, size).clone() for name, size in tensors.items()}
    _save(root / "model0", base, shape)
    for number in range(1, models + 1):
        tuned = {
            name: (value.view(torch.int16) ^ cut(changes, tensors[name])).view(torch.bfloat16)
            for name, value in base.items()
        }
        _save(root / f"model{number}", tuned, shape)


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape.hidden, shape.intermediate
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        found |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (shape.vocabulary, hidden)}


def _save(folder: Path, tensors: dict[str, torch.Tensor], shape: Shape) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    make_family(Path(sys.argv[1]), SHAPES[sys.argv[2]], int(sys.argv[3]))
