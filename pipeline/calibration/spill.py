"""What layers give, kept outside of memory until the next layer wants it, in a folder that outlives the process.

Owns the files and which layer was finished. Must not know models: a layer's output is tensors in tuples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pipeline.checkpoints.header import read_header
from pipeline.checkpoints.writer import SafetensorsWriter
from pipeline.errors import CalibrationError, CheckpointError, Problem, StorageError
from pipeline.storage import MissingObject, Store

_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}
_OWNER, _DONE, _STRUCTURE = "owner.json", "done.json", "structure"


class Spill:
    """Outputs of layers, by stage and batch.

    Args:
        store: The folder; nothing else may be in it.
        owner: What the outputs are of; those of anything else are removed.
    """

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        try:
            known = store.read(_OWNER).decode("utf-8", "replace")
        except MissingObject:
            known = ""
        if known != owner:
            self.clear()
            store.write(_OWNER, owner.encode())

    def save(self, stage: int, batch: int, value: Any) -> None:
        """Keep what a stage gives for a batch.

        Raises:
            CalibrationError: It is something else than tensors, in tuples or alone.
        """
        tensors: list[torch.Tensor] = []
        structure = json.dumps(_taken_apart(value, tensors))
        stored = [tensor.detach().cpu().contiguous() for tensor in tensors]
        specs = [(str(n), _DTYPES[tensor.dtype], tuple(tensor.shape)) for n, tensor in enumerate(stored)]
        with self._store.open_writer(_path(stage, batch)) as target:
            file = SafetensorsWriter(target, specs, {_STRUCTURE: structure})
            for tensor in stored:
                if tensor.numel():
                    file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            file.finish()

    def load(self, stage: int, batch: int, device: str) -> Any:
        """Return what was kept.

        Raises:
            CalibrationError: It is gone or damaged.
        """
        path = _path(stage, batch)
        try:
            header = read_header(self._store, path)
            data = torch.empty(header.size_bytes - header.header_bytes, dtype=torch.uint8)
            if data.numel():
                self._store.read_into(path, header.header_bytes, data.numpy().data)
        except (CheckpointError, StorageError) as error:
            remedy = "delete the folder and run again: finished statistics are kept"
            raise CalibrationError(
                Problem(what="is gone or damaged", where=self._store.location(path), remedy=remedy)
            ) from error
        tensors = [
            data[entry.start - header.header_bytes : entry.stop - header.header_bytes]
            .clone()  # Elements may begin anywhere in the file, and nowhere in memory.
            .view(_TORCH[entry.dtype])
            .reshape(entry.shape)
            .to(device)
            for entry in sorted(header.tensors, key=lambda entry: int(entry.name))
        ]
        return _put_together(json.loads(header.metadata[_STRUCTURE]), tensors)

    def finish(self, stage: int, facts: dict[str, str | None]) -> None:
        """Say that a stage's outputs are all there."""
        self._store.write(f"{stage}/{_DONE}", json.dumps(facts).encode())

    def finished(self) -> tuple[int, dict[str, str | None]] | None:
        """Return the last stage whose outputs are all there, with its facts; None when there is none."""
        stages = [int(path.split("/")[0]) for path in self._store.list() if path.endswith(f"/{_DONE}")]
        if not stages:
            return None
        return max(stages), json.loads(self._store.read(f"{max(stages)}/{_DONE}"))

    def drop(self, stage: int) -> None:
        """Remove what a stage gave."""
        # The mark goes first: a stage that is half removed must not look finished.
        for path in sorted(self._store.list(str(stage)), key=lambda path: not path.endswith(_DONE)):
            self._store.delete(path)

    def clear_stages(self) -> None:
        """Remove what all stages gave."""
        for path in sorted(self._store.list(), key=lambda path: not path.endswith(_DONE)):
            if path != _OWNER:
                self._store.delete(path)

    def clear(self) -> None:
        """Remove everything."""
        self.clear_stages()
        self._store.delete(_OWNER)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in tuples, lists and mappings, however deep, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, Mapping):
        for name in sorted(value):
            yield from tensors_in(value[name])


def _path(stage: int, batch: int) -> str:
    return f"{stage}/{batch:06}.activations"


def _taken_apart(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Return the structure of a value as JSON, its tensors apart: a number for each, null, or a list."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor) and value.dtype in _DTYPES:
        tensors.append(value)
        return len(tensors) - 1
    if isinstance(value, tuple | list):
        return [_taken_apart(part, tensors) for part in value]
    what = f"a layer gives {type(value).__name__}, which cannot be kept outside of memory"
    raise CalibrationError(Problem(what=what, remedy="give more --memory, so that the whole model is held"))


def _put_together(structure: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if structure is None:
        return None
    if isinstance(structure, int):
        return tensors[structure]
    return tuple(_put_together(part, tensors) for part in structure)
