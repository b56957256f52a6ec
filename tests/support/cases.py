"""Bad cases made from good families, and what must hold after a refusal."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import BudgetError, PipelineError
from pipeline.events import Event, Listener, PassStarted, ignore
from pipeline.merging import Resources, load_recipe, merge, plan_merge
from pipeline.planning.memory import project_memory
from pipeline.storage import open_store

from .families import Family, make_family

INDEX = "model.safetensors.index.json"
# The smallest family that has blocks, an embedding and a head; every file below a kilobyte of data.
TINY = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.mlp.weight": (4, 4),
    "model.layers.1.mlp.weight": (4, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (8, 4),
}
EMBEDDING, HEAD, MLP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.weight"


def tiny_family(root: Path, models: int = 3, **keys: Any) -> Family:
    """Return a family of the smallest models."""
    return make_family(root, models, **{"shapes": TINY, **keys})


def refused(
    recipe: Path,
    output: Path,
    kind: type[PipelineError],
    *words: str,
    listener: Listener = ignore,
    resources: Resources | None = None,
    overwrite: bool = False,
) -> str:
    """Merge, expect an error of one kind whose text has all words, and nothing committed; return the text."""
    with pytest.raises(PipelineError) as caught:
        merge(str(recipe), str(output), listener=listener, resources=resources, overwrite=overwrite)
    text = str(caught.value)
    assert isinstance(caught.value, kind), f"{type(caught.value).__name__}: {text}"
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"
    assert all(problem.remedy or "more of this kind" in problem.what for problem in caught.value.problems), text
    assert_nothing_committed(output)
    return text


def assert_nothing_committed(output: Path) -> None:
    """Check that no loader finds a model in a folder."""
    assert not (output / INDEX).exists()
    assert not (output / "model.safetensors").exists()
    assert not (output / "config.json").exists()


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], *, file: str = "model.safetensors") -> None:
    """Change the tensors of a model, or of an adapter, that lies in one file."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_config(folder: Path, *, file: str = "config.json", **keys: object) -> None:
    """Change keys of a config.json, or of another such file; a key set to `...` is removed."""
    path = folder / file
    config = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def data_start(file: Path) -> int:
    """Return the offset of a safetensors file's first data byte."""
    return 8 + int(struct.unpack("<Q", file.read_bytes()[:8])[0])


def flip_bit(file: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file in place."""
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ (1 << bit)]))


def without_retention(recipe: Path, output: Path) -> Resources:
    """Return resources with the least memory that a merge can have, so that nothing of the first read is kept."""
    plan = plan_merge(load_recipe(str(recipe))[0], open_store(str(output)), Resources(), probe=False).plan
    low, high = 0, Resources().memory_bytes
    while high - low > 1:
        middle = (low + high) // 2
        try:
            project_memory(plan, budget_bytes=middle, threads=1)
            high = middle
        except BudgetError:
            low = middle
    assert project_memory(plan, budget_bytes=high, threads=1).retained_bytes == 0
    return Resources(memory_bytes=high)


def before_writing(action: Callable[[], object]) -> Listener:
    """Return a listener that acts once, between the first and the second read."""
    done: list[object] = []

    def listen(event: Event) -> None:
        if isinstance(event, PassStarted) and event.name == "write" and not done:
            done.append(action())

    return listen


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parents[2]
    )
