"""Small families of models in Hugging Face layout: Llama-shaped, with known values, saved by safetensors itself."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS = 64, 32, 48, 3

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_shapes(layers: int = LAYERS, hidden: int = HIDDEN, *, head: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small Llama."""
    inner, kv = hidden * 3 // 2, hidden // 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if head:
        shapes["lm_head.weight"] = (VOCABULARY, hidden)
    return shapes


def random_weights(
    seed: int, *, shapes: Mapping[str, tuple[int, ...]] | None = None, scale: float = 0.05
) -> dict[str, torch.Tensor]:
    """Float64 weights by name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = llama_shapes() if shapes is None else shapes
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * scale for name, shape in shapes.items()
    }


def fine_tune(base: Mapping[str, torch.Tensor], seed: int, *, size: float = 0.005) -> dict[str, torch.Tensor]:
    """A copy of the base moved by a random task vector."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: value + torch.randn(value.shape, generator=generator, dtype=torch.float64) * size
        for name, value in base.items()
    }


def config_of(names: Container[str], config: Mapping[str, object] | None = None) -> dict[str, object]:
    """The configuration of a small Llama; one that has neither a head nor a tied embedding is a bare encoder."""
    merged = {**CONFIG, **(config or {})}
    bare = "lm_head.weight" not in names and not merged["tie_word_embeddings"]
    return {**merged, "architectures": ["LlamaModel"], **(config or {})} if bare else merged


def save_model(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    config: Mapping[str, object] | None = None,
    tokenizer: bool = True,
) -> Path:
    """Save weights as a Hugging Face folder; floats are cast to `dtype`, anything else is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.to(dtype).contiguous() if value.is_floating_point() else value for name, value in weights.items()
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = list(tensors)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = names[shard::shards]
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        size = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    word = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**config_of(weights, config), "torch_dtype": word}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    if tokenizer:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        (folder / "tokenizer.json").write_text(
            json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {}}})
        )
    return folder


@dataclass
class Family:
    """A base and its fine-tunes on disk, with the values they were made of."""

    root: Path
    base: Path
    models: list[Path] = field(default_factory=list)
    values: list[dict[str, torch.Tensor]] = field(default_factory=list)
    base_values: dict[str, torch.Tensor] = field(default_factory=dict)

    def recipe(
        self, method: str = "geometric_median", *, base: bool = True, name: str = "recipe.yaml", **keys: object
    ) -> Path:
        """Write a recipe of all models; `weights` gives their weights, further keys go to the document."""
        weights = keys.pop("weights", None)
        models: list[dict[str, object]] = [{"model": str(path)} for path in self.models]
        if isinstance(weights, Sequence):
            for entry, weight in zip(models, weights, strict=True):
                entry["parameters"] = {"weight": weight}
        document = {
            "merge_method": method,
            **({"base_model": str(self.base)} if base else {}),
            "models": models,
            **keys,
        }
        path = self.root / name
        path.write_text(json.dumps(document, indent=1))  # JSON is YAML
        return path


def make_family(
    root: Path,
    models: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    loud: int | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    config: Mapping[str, object] | None = None,
) -> Family:
    """Make a base and fine-tunes; model number `loud` gets a task vector fifty times too long."""
    base = random_weights(0, shapes=shapes)
    family = Family(root=root, base=save_model(root / "base", base, dtype=dtype, shards=shards, config=config))
    family.base_values = {name: value.to(dtype) for name, value in base.items()}
    for number in range(models):
        values = fine_tune(base, number, size=0.25 if number == loud else 0.005)
        folder = save_model(root / f"expert{number}", values, dtype=dtype, shards=shards, config=config)
        family.models.append(folder)
        family.values.append({name: value.to(dtype) for name, value in values.items()})
    return family


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the official library."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
