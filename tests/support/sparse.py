"""Checkpoints of any apparent size that take no disk: a header, and a hole where the data would be."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from tests.support.families import config_of

_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def save_sparse(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: str = "BF16",
    files: int = 1,
    config: Mapping[str, object] | None = None,
) -> Path:
    """Save a folder of zeros with the given names and shapes, spread over some files."""
    folder.mkdir(parents=True)
    names = list(shapes)
    per_file = -(-len(names) // files)
    weight_map = {}
    for number in range(files):
        part = names[number * per_file : (number + 1) * per_file]
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        header, position = {}, 0
        for name in part:
            size = _BYTES[dtype]
            for length in shapes[name]:
                size *= length
            header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [position, position + size]}
            position += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + position)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_of(shapes, config)))
    return folder
