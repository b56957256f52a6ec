"""Adapters to merge, and their bases: the paper's twenty for T5-XL, and a thousand for a model of half a billion.

    python -m tests.benchmarks.lora_inputs FOLDER paper|qv|seven ADAPTERS

Owns names, shapes and random values. What a folder holds complete is not made again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.adapters import ADAPTER_CONFIG, ADAPTER_FILE, Layout, linears, write_tensors
from tests.support.families import save_model
from tests.support.sparse import save_sparse

Shapes = dict[str, tuple[int, ...]]

# Random numbers drawn once and cut at random places: drawing them anew would take minutes.
_POOL_ELEMENTS = 1 << 24
# A is drawn as peft draws it, B so; the adapters' updates have norms of about 2 to 8, for those of equal ones have the
# mean for their median.
_SPREADS_B = (0.01, 0.015, 0.02, 0.03, 0.04)
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False,
    "d_model": 2048, "d_ff": 5120, "d_kv": 64, "num_heads": 32, "num_layers": 24, "num_decoder_layers": 24,
    "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True,
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "rope_theta": 1000000.0,
}  # fmt: skip


def t5_shapes() -> Shapes:
    """Names and shapes of T5-XL with gated feed-forward blocks."""
    width, inner = 2048, 5120
    shapes: Shapes = {"shared.weight": (32128, width), "lm_head.weight": (32128, width)}
    for side, attentions in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        for block in range(24):
            prefix = f"{side}.block.{block}.layer."
            for layer, attention in enumerate(attentions):
                shapes |= {f"{prefix}{layer}.{attention}.{kind}.weight": (width, width) for kind in "qkvo"}
            if block == 0:
                shapes[f"{prefix}0.SelfAttention.relative_attention_bias.weight"] = (32, 32)
            last = f"{prefix}{len(attentions)}.DenseReluDense."
            shapes |= {f"{last}wi_0.weight": (inner, width), f"{last}wi_1.weight": (inner, width)}
            shapes[f"{last}wo.weight"] = (width, inner)
            shapes |= {f"{prefix}{layer}.layer_norm.weight": (width,) for layer in range(len(attentions) + 1)}
        shapes[f"{side}.final_layer_norm.weight"] = (width,)
    return shapes


def qwen_shapes() -> Shapes:
    """Names and shapes of Qwen2.5-0.5B."""
    width, inner, kv = 896, 4864, 128
    shapes: Shapes = {"model.embed_tokens.weight": (151936, width)}
    for layer in range(24):
        prefix = f"model.layers.{layer}."
        for name, outputs in (("q", width), ("k", kv), ("v", kv)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (outputs, width)
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (outputs,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (width, width)
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A base and what is adapted in it; a sparse base is a header with a hole for its data."""

    shapes: Callable[[], Shapes]
    config: dict[str, object]
    sparse: bool
    ends: tuple[str, ...]
    rank: int
    alpha: int


JOBS = {
    "paper": Job(shapes=t5_shapes, config=T5, sparse=True, ends=("Attention.q", "Attention.v"), rank=16, alpha=32),
    "qv": Job(shapes=qwen_shapes, config=QWEN, sparse=False, ends=("q_proj", "v_proj"), rank=8, alpha=16),
    "seven": Job(shapes=qwen_shapes, config=QWEN, sparse=False, ends=("_proj",), rank=8, alpha=16),
}


def make_inputs(root: Path, job: Job, adapters: int) -> None:
    """Write the base into `root`/base and adapters into `root`/adapter0, …"""
    done = root / "complete.json"
    if done.exists() and json.loads(done.read_text())["adapters"] >= adapters:
        return
    shapes = job.shapes()
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(_POOL_ELEMENTS, generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        elements = torch.Size(shape).numel()
        if elements > _POOL_ELEMENTS // 2:
            return pool.repeat(-(-elements // _POOL_ELEMENTS))[:elements].view(shape)
        start = int(torch.randint(_POOL_ELEMENTS - elements, (1,), generator=generator))
        return pool[start : start + elements].view(shape)

    if not (root / "base").exists():
        if job.sparse:
            save_sparse(root / "base", shapes, files=2, config=job.config)
        else:
            values = {name: noise(*shape).mul(0.02).bfloat16() for name, shape in shapes.items()}
            save_model(root / "base", values, dtype=torch.bfloat16, config=job.config)
    modules = linears([name for name in shapes if name.endswith(".weight")], *job.ends)
    config = json.dumps(Layout(modules=modules, rank=job.rank, alpha=job.alpha).config(root / "base"))
    for number in range(adapters):
        tensors, spread = {}, _SPREADS_B[number % len(_SPREADS_B)]
        for module in modules:
            outputs, inputs = shapes[f"{module}.weight"]
            stem = f"base_model.model.{module}.lora_"
            tensors[f"{stem}A.weight"] = (noise(job.rank, inputs) * (3 * inputs) ** -0.5).bfloat16()
            tensors[f"{stem}B.weight"] = (noise(outputs, job.rank) * spread).bfloat16()
        folder = root / f"adapter{number}"
        folder.mkdir(exist_ok=True)
        write_tensors(folder / ADAPTER_FILE, tensors)
        (folder / ADAPTER_CONFIG).write_text(config)
    done.write_text(json.dumps({"adapters": adapters, "modules": len(modules)}))


if __name__ == "__main__":
    make_inputs(Path(sys.argv[1]), JOBS[sys.argv[2]], int(sys.argv[3]))
