"""States of long iterations in the run folder, so that a killed solve goes on where it was, to the same bits.

Owns their files: `_geomerge/systems/TENSOR.state`, safetensors in layout. Knows of a state only that it is a
dataclass of tensors and numbers. A state of another plan, or a damaged one, counts for nothing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch

from pipeline.checkpoints.header import read_header
from pipeline.checkpoints.writer import SafetensorsWriter
from pipeline.engine.run_folder import FOLDER
from pipeline.errors import CheckpointError
from pipeline.storage import MissingObject, Store

S = TypeVar("S")

SYSTEMS = f"{FOLDER}/systems"
# Seconds between two saves of one solve: what a kill costs at most, far more than a save takes.
SAVE_EVERY_S = 30.0
_FORMAT = "geomerge-state"
_NAMES = {torch.float32: "F32", torch.float64: "F64"}
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F64": np.dtype(np.float64)}


def state_path(tensor: int) -> str:
    """Return where the state of a tensor's solve lies."""
    return f"{SYSTEMS}/{tensor:06d}.state"


class SystemStates:
    """Saves and loads states of solves.

    Args:
        store: The output.
        fingerprint: The plan's.
        device: torch's name of where states live.
        check: Called at every iteration; raises when the work is to end.
    """

    def __init__(self, store: Store, fingerprint: str, device: str, check: Callable[[], None]) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._device = device
        self._check = check

    def load(self, tensor: int, kind: type[S]) -> S | None:
        """Return the saved state of a tensor's solve, or None.

        Args:
            tensor: Its index in the plan.
            kind: The dataclass that was saved.
        """
        path = state_path(tensor)
        try:
            header = read_header(self._store, path)
        except (MissingObject, CheckpointError):
            return None
        metadata = header.metadata
        if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != self._fingerprint:
            return None
        fields: dict[str, Any] = json.loads(metadata["numbers"])
        for entry in header.tensors:
            values = np.empty(entry.shape, dtype=_DTYPES[entry.dtype])
            self._store.read_into(path, entry.start, values.reshape(-1).view(np.uint8).data)
            fields[entry.name] = torch.from_numpy(values).to(self._device)
        return kind(**fields)

    def keep(self, tensor: int) -> Keeper:
        """Return what is told of every iteration of a tensor's solve."""
        return Keeper(self, tensor)

    def iterated(self) -> None:
        """Raise when the work is to end."""
        self._check()

    def save(self, tensor: int, state: Any) -> None:
        """Write a state; it is there whole or not at all."""
        values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        numbers = {name: value for name, value in values.items() if name not in tensors}
        metadata = {"format": _FORMAT, "fingerprint": self._fingerprint, "numbers": json.dumps(numbers)}
        specs = [(name, _NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()]
        writer = SafetensorsWriter(self._store.open_writer(state_path(tensor)), specs, metadata)
        try:
            for value in tensors.values():
                writer.write(value.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8).data)
            writer.finish()
        except BaseException:
            writer.abort()
            raise

    def forget(self, tensors: Iterable[int]) -> None:
        """Remove the states of tensors that are written and marked."""
        for tensor in tensors:
            if self._store.exists(state_path(tensor)):
                self._store.delete(state_path(tensor))


class Keeper:
    """Saves the states of one solve now and then.

    Args:
        states: Where to.
        tensor: Whose.
    """

    def __init__(self, states: SystemStates, tensor: int) -> None:
        self._states = states
        self._tensor = tensor
        self._saved_s = time.monotonic()
        self._latest: Any = None
        self._long = False

    def __call__(self, state: Any) -> None:
        """Take the state after an iteration; it is written if the last one that was is old."""
        self._states.iterated()
        self._latest = state
        if time.monotonic() - self._saved_s >= SAVE_EVERY_S:
            self._write()

    def end(self) -> None:
        """Write the last state of a solve that took long: its file may not be marked before others are solved."""
        if self._long or time.monotonic() - self._saved_s >= SAVE_EVERY_S:
            self._write()

    def _write(self) -> None:
        if self._latest is not None:
            self._states.save(self._tensor, self._latest)
            self._long = True
            self._latest = None
            self._saved_s = time.monotonic()
