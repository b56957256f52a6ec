"""Small model folders on disk, written by the official library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

TENSORS = {
    "model.embed_tokens.weight": torch.arange(24, dtype=torch.bfloat16).reshape(6, 4),
    "model.layers.0.mlp.weight": torch.linspace(-1, 1, 12).reshape(3, 4),
    "model.norm.weight": torch.ones(4, dtype=torch.float16),
}


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] = TENSORS,
    config: Mapping[str, object] | None = None,
    name: str = "model.safetensors",
) -> Path:
    """Write one weights file and, if given, a config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / name, metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """Write shards and the index that lists them."""
    for name, tensors in shards.items():
        write_model(folder, tensors, name=name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def by_shards(tensors: Mapping[str, torch.Tensor] = TENSORS, count: int = 2) -> dict[str, dict[str, torch.Tensor]]:
    """Deal tensors to shards in turn, named as transformers names them."""
    names = list(tensors)
    return {
        f"model-{number + 1:05}-of-{count:05}.safetensors": {name: tensors[name] for name in names[number::count]}
        for number in range(count)
    }
