"""Families with the tensor names, shapes and files of published Llama 3 models, as sparse files that take no disk.

Owns what such a model looks like. Every value is zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from tests.support.sparse import save_sparse

Size = Literal["70B", "8B"]
VOCABULARY = 128256
# The largest file that transformers saves by default.
MAX_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """A Llama 3 by its numbers.

    Attributes:
        kv: The width of the keys, and of the values.
        files: How many files the published checkpoint has.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv: int
    parameters: int
    files: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in the order in which they are saved."""
        hidden, inner = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                prefix + "self_attn.q_proj.weight": (hidden, hidden),
                prefix + "self_attn.k_proj.weight": (self.kv, hidden),
                prefix + "self_attn.v_proj.weight": (self.kv, hidden),
                prefix + "self_attn.o_proj.weight": (hidden, hidden),
                prefix + "mlp.gate_proj.weight": (inner, hidden),
                prefix + "mlp.up_proj.weight": (inner, hidden),
                prefix + "mlp.down_proj.weight": (hidden, inner),
                prefix + "input_layernorm.weight": (hidden,),
                prefix + "post_attention_layernorm.weight": (hidden,),
            }
        return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}

    def config(self) -> dict[str, object]:
        """The numbers of its config.json."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": 8,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        }


LLAMAS: Mapping[Size, Llama] = {
    "70B": Llama(layers=80, hidden=8192, intermediate=28672, heads=64, kv=1024, parameters=70_553_706_496, files=30),
    "8B": Llama(layers=32, hidden=4096, intermediate=14336, heads=32, kv=1024, parameters=8_030_261_248, files=4),
}


def llama_family(folder: Path, size: Size = "70B", experts: int = 8, **keys: object) -> Path:
    """Make a base and its experts in bfloat16, and return the path of a recipe for their geometric median.

    Args:
        folder: Exists already; gets the folders base, expert0, … and recipe.yaml.
        size: Which model.
        experts: How many besides the base.
        **keys: Further keys of the recipe.
    """
    llama = LLAMAS[size]
    shapes = llama.shapes()
    if sum(map(prod, shapes.values())) != llama.parameters:
        raise ValueError(f"the shapes of Llama 3 {size} do not have its number of parameters")
    names = ["base", *(f"expert{number}" for number in range(experts))]
    for name in names:
        model = save_sparse(folder / name, shapes, max_file_bytes=MAX_FILE_BYTES, config=llama.config())
        (model / "tokenizer.json").write_text("{}")
    document = {
        "merge_method": "geometric_median",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in names[1:]],
        "dtype": "bfloat16",
        **keys,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document, indent=1))  # JSON is YAML
    return path
