"""A model of transformers whose weights come from a checkpoint, all of them or a layer's at a time.

Owns when values are in memory, and which modules are its linear layers, its encoder and its head. Must not know how
it was opened, nor what is measured. Importing this module imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.calibration.batches import Special
from pipeline.calibration.examples import Vocabulary
from pipeline.calibration.settings import Task
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.header import TensorEntry
from pipeline.errors import CheckpointError, Problem
from pipeline.numerics.torch_dtypes import torch_dtype
from pipeline.storage import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of the model and its place in the checkpoint.

    Attributes:
        entry: Where its values are; its name is the checkpoint's.
        owners: The modules that have it, with the attribute's name; several when it is tied.
    """

    entry: TensorEntry
    owners: tuple[tuple[nn.Module, str], ...]

    @property
    def value(self) -> torch.Tensor:
        """Its values, on the device "meta" when they are not in memory."""
        owner, attribute = self.owners[0]
        value: torch.Tensor = getattr(owner, attribute)
        return value

    @property
    def is_loaded(self) -> bool:
        """Whether its values are in memory."""
        return self.value.device.type != "meta"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that can be run.

    Attributes:
        module: The model of transformers, in evaluation, without gradients.
        task: What it does.
        checkpoint: Its weights.
        parameters: By their names in the checkpoint, in the order of the model.
        tokenizer: Its tokenizer; None when it has none.
        vocabulary: What it knows.
        special: Tokens with a meaning.
        device: Where values are loaded to.
    """

    module: Any
    task: Task
    checkpoint: Checkpoint
    parameters: Mapping[str, Parameter]
    tokenizer: Callable[..., Any] | None
    vocabulary: Vocabulary
    special: Special
    device: str

    def load(self, parameters: Iterable[Parameter]) -> None:
        """Bring values into memory, in fp32; those that are there stay."""
        for parameter in parameters:
            if not parameter.is_loaded:
                _put(parameter, read_values(self.checkpoint.store, parameter.entry, self.device))

    def unload(self, parameters: Iterable[Parameter]) -> None:
        """Drop values from memory."""
        for parameter in parameters:
            _put(parameter, torch.empty(parameter.entry.shape, device="meta"))

    def of(self, module: nn.Module) -> list[Parameter]:
        """Return the parameters that a module or one inside it has."""
        inside = set(map(id, module.modules()))
        return [found for found in self.parameters.values() if any(id(owner) in inside for owner, _ in found.owners)]

    @property
    def encoder(self) -> nn.Module | None:
        """The encoder of a model with two sides; None of others."""
        encoder: nn.Module | None = self.module.get_encoder() if self.task == "seq2seq" else None
        return encoder

    @property
    def head(self) -> nn.Module | None:
        """What makes scores of tokens from the last hidden states; None for "classification"."""
        head: nn.Module | None = None if self.task == "classification" else self.module.get_output_embeddings()
        return head

    def linears(self) -> dict[str, nn.Linear]:
        """Return the linear layers by their weights' names, in the model's order, without those tied to embeddings."""
        found = {}
        for name, parameter in self.parameters.items():
            owners = [owner for owner, attribute in parameter.owners if attribute == "weight"]
            if owners and all(isinstance(owner, nn.Linear) for owner in owners):
                found[name] = next(owner for owner in owners if isinstance(owner, nn.Linear))
        return found


def read_values(store: Store, entry: TensorEntry, device: str = "cpu") -> torch.Tensor:
    """Return a tensor of a checkpoint in fp32.

    Raises:
        CheckpointError: It is of a type without arithmetic: quantised, packed.
    """
    try:
        dtype = torch_dtype(entry.dtype)
    except KeyError as error:
        what, remedy = f"is stored as {entry.dtype}", "calibrate the model that it was quantised from"
        raise CheckpointError(Problem(what=what, where=f"tensor {entry.name}", remedy=remedy)) from error
    raw = torch.empty(entry.size_bytes, dtype=torch.uint8)
    if entry.size_bytes:
        store.read_into(entry.file, entry.start, raw.numpy().data)
    return raw.view(dtype).reshape(entry.shape).to(device, torch.float32)


def _put(parameter: Parameter, values: torch.Tensor) -> None:
    shared = nn.Parameter(values, requires_grad=False)
    for owner, attribute in parameter.owners:
        setattr(owner, attribute, shared)
