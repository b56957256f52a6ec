"""Checkpoints of any apparent size that take no disk: a header, and a hole where the data would be."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

from tests.support.families import config_of

_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def save_sparse(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str = "BF16",
    files: int = 1,
    max_file_bytes: int | None = None,
    config: Mapping[str, object] | None = None,
) -> Path:
    """Save a folder of zeros with the given names and shapes.

    Args:
        folder: Is made.
        shapes: By tensor name.
        dtype: Of all tensors.
        files: How many, of equally many tensors each.
        max_file_bytes: Instead of `files`: a file is full when the next tensor would lift it above that.
        config: What differs from the configuration of a small Llama.
    """
    folder.mkdir(parents=True)
    sizes = {name: _BYTES[dtype] * prod(shape) for name, shape in shapes.items()}
    parts = _by_number(list(sizes), files) if max_file_bytes is None else _by_size(sizes, max_file_bytes)
    weight_map = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in part:
            end = position + sizes[name]
            header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [position, end]}
            position = end
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + position)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_of(shapes, config)))
    return folder


def _by_number(names: list[str], files: int) -> list[list[str]]:
    per_file = -(-len(names) // files)
    return [names[start : start + per_file] for start in range(0, len(names), per_file)]


def _by_size(sizes: Mapping[str, int], most_bytes: int) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    room = most_bytes
    for name, size in sizes.items():
        if parts[-1] and size > room:
            parts.append([])
            room = most_bytes
        parts[-1].append(name)
        room -= size
    return parts
