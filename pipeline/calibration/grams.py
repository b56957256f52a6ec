"""Second moments of what linear layers get, and of the gradients of what they give, gathered while a model runs.

Owns the hooks, which tokens count, and that layers with one input share one Gram. Must not know how the model is run.

R rows that count, I inputs of a layer, O outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.calibration.batches import Batch
from pipeline.calibration.model import Model
from pipeline.checkpoints.statistics_facts import Kind
from pipeline.errors import CalibrationError, Problem

# A statistic: its kind, and the name of the parameter.
Key = tuple[Kind, str]


class StopForward(Exception):  # noqa: N818 - ends a forward pass whose rest nobody needs
    """Carries out of a forward pass what it was run for."""

    def __init__(self, value: Any = None) -> None:
        super().__init__(value)
        self.value = value


class GramCollector:
    """Gathers the Grams of some linear layers.

    Args:
        model: Whose layers.
        gradients: Whether the gradients of outputs are gathered too.

    Attributes:
        linears: The layers by their weights' names.
        wanted: What is gathered; of layers with one input only the first one's is.
        listens: Whether inputs are looked at; off while a forward pass goes through what is no input of the model.
        leaders: Layer -> the one whose input Gram it shares, itself when it is the first.
        anchor_leader: The first layer that got the encoder's output.
    """

    def __init__(self, model: Model, *, gradients: bool) -> None:
        self.linears: Mapping[str, nn.Linear] = model.linears()
        self.wanted: frozenset[Key] = frozenset()
        self.listens = True
        self.leaders: dict[str, str] = {}
        self.anchor_leader: str | None = None
        self._model, self._gradients = model, gradients
        self._encoder = model.encoder
        self._of_encoder = set(map(id, self._encoder.modules())) if self._encoder is not None else set()
        self._sums: dict[Key, torch.Tensor] = {}
        self._rows: dict[str, int] = {}
        self._batch: Batch | None = None
        self._anchor: torch.Tensor | None = None
        self._seen: list[tuple[weakref.ref[torch.Tensor], int, str]] = []
        # Of each call of a layer in a forward pass, whether the rows of its input are tokens.
        self._of_tokens: dict[tuple[str, int], bool] = {}
        self._calls: dict[str, int] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While it is entered, the model's forward and backward passes are listened to."""
        with ExitStack() as hooks:
            for name, linear in self.linears.items():
                handle = linear.register_forward_pre_hook(partial(self._enter, name))
                hooks.callback(handle.remove)
                if self._gradients and linear is not self._model.head:
                    hooks.callback(linear.register_forward_hook(partial(self._leave, name)).remove)
            head = self._model.head
            if head is not None and not self._gradients:
                # Scores of all tokens cost more than many layers, and no Gram depends on them.
                hooks.callback(head.register_forward_pre_hook(self._stop).remove)
            if self._gradients:
                for module in self._model.module.modules():
                    if isinstance(module, nn.Embedding):
                        hooks.callback(module.register_forward_hook(_begin_graph).remove)
            if self._encoder is not None:
                hooks.callback(self._encoder.register_forward_hook(self._encoded).remove)
            yield

    def begin(self, batch: Batch, encoder_output: torch.Tensor | None = None) -> None:
        """Say which batch the next forward pass is of, and what its encoder gave if that is not run again."""
        self._batch, self._anchor = batch, encoder_output
        self._seen.clear()
        self._calls.clear()

    def gather(self, wanted: frozenset[Key]) -> None:
        """Begin anew, with these."""
        self.wanted = wanted
        self._sums.clear()
        self._rows.clear()

    def take(self) -> Iterator[tuple[Key, torch.Tensor]]:
        """Yield what was gathered, in the model's order, divided by the number of rows; each is forgotten then."""
        order = {name: number for number, name in enumerate(self.linears)}
        for key in sorted(self._sums, key=lambda key: (order[key[1]], key[0])):
            yield key, self._sums.pop(key).div_(self._rows[key[1]])

    def _enter(self, name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        """Look at the input of a layer."""
        inputs: torch.Tensor = given[0]
        if not self.listens:
            return
        counts = self._rows_that_count(name, inputs)
        self._calls[name] = call = self._calls.get(name, 0) + 1
        if self._of_tokens.setdefault((name, call), counts is not None) != (counts is not None):
            what = "gets rows that are tokens in one batch and something else in another"
            raise CalibrationError(Problem(what=what, where=f"layer {name}", remedy="try another --batch"))
        if counts is None:
            return
        leader = self._leader(name, inputs)
        if self.leaders.setdefault(name, leader) != leader:
            what = f"its input is that of {self.leaders[name]} in one batch and that of {leader} in another"
            raise CalibrationError(Problem(what=what, where=f"layer {name}"))
        gathers_input = leader == name and ("input_gram", name) in self.wanted
        if gathers_input or ("output_gram", name) in self.wanted:
            rows_RI = self._counted(name, inputs.detach(), counts)
            self._rows[name] = self._rows.get(name, 0) + rows_RI.shape[0]
            if gathers_input:
                self._add(("input_gram", name), rows_RI)

    def _leave(self, name: str, module: nn.Module, given: tuple[Any, ...], output: torch.Tensor) -> None:
        """Wait for the gradient of a layer's output."""
        counts = self._rows_that_count(name, given[0]) if self.listens else None
        if counts is not None and ("output_gram", name) in self.wanted:

            def arrived(gradient: torch.Tensor) -> None:
                self._add(("output_gram", name), self._counted(name, gradient, counts))

            output.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _leader(self, name: str, inputs: torch.Tensor) -> str:
        """Return the first layer of this forward pass with the very same input."""
        if inputs is self._anchor:
            self.anchor_leader = self.anchor_leader or name
            return self.anchor_leader
        for reference, version, leader in self._seen:
            if reference() is inputs and version == inputs._version:
                return leader
        self._seen.append((weakref.ref(inputs), inputs._version, name))
        return name

    def _rows_that_count(self, name: str, inputs: torch.Tensor) -> torch.Tensor | None:
        """Return the mask of a layer's input; None when its rows are no tokens, as those of relative positions.

        Layers of the encoder, and what looks at its output, see the encoder's tokens; all others the decoder's.
        """
        batch = self._batch
        if batch is None:
            raise ValueError("no batch was begun")
        of_encoder = id(self.linears[name]) in self._of_encoder or inputs is self._anchor
        mask = batch.encoder_mask_BS if of_encoder and batch.encoder_mask_BS is not None else batch.mask_BT
        leading = tuple(inputs.shape[:-1])
        if leading == tuple(mask.shape):
            return mask
        if leading == (mask.numel(),):
            return mask.flatten()
        if leading in ((mask.shape[0],), (mask.shape[0], 1)):
            # One row an example, as behind a pooler.
            return torch.ones(leading, dtype=torch.bool, device=mask.device)
        return None

    def _counted(self, name: str, values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        rows = values[counts]
        if not bool(rows.isfinite().all()):
            raise CalibrationError(Problem(what="gets or gives values that are not finite", where=f"layer {name}"))
        return rows

    def _add(self, key: Key, rows_RI: torch.Tensor) -> None:
        width = rows_RI.shape[1]
        found = self._sums.get(key)
        if found is None:
            found = self._sums[key] = torch.zeros(width, width, device=rows_RI.device)
        found.addmm_(rows_RI.T, rows_RI)

    def _stop(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        raise StopForward

    def _encoded(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        self._anchor = output[0]


def _begin_graph(module: nn.Module, given: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Make what follows an embedding differentiable, though no parameter is: gradients of outputs need no more."""
    return output + torch.zeros(1, device=output.device, requires_grad=True)
