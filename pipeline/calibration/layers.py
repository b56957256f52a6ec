"""Input Grams of a model larger than memory: one layer is there at a time, and sees all examples.

Owns the order of layers, what stands in for those that are not there, and going on where an earlier run stopped. Must
not know how Grams are gathered.

The model's own forward pass is run for every layer: layers before it are stood in for by what the last of them gave
(kept by `spill`), the tables of tokens by zeros, which nothing depends on then. That nothing does is checked: whatever
layers get beside hidden states must be the same with zeros as it was with the tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.calibration.batches import make_batch
from pipeline.calibration.examples import Example
from pipeline.calibration.grams import GramCollector, Key, StopForward
from pipeline.calibration.model import Model, Parameter
from pipeline.calibration.progress import StageProgress
from pipeline.calibration.residence import give_back
from pipeline.calibration.rounds import rounds
from pipeline.calibration.saving import save_grams
from pipeline.calibration.spill import Spill, tensors_in
from pipeline.calibration.stacks import Stacks, Stage, is_token_table
from pipeline.checkpoints.statistics_writer import StatisticsWriter
from pipeline.errors import CalibrationError, Problem
from pipeline.events import Listener, Note


class LayerRunner:
    """Runs a model layer by layer and saves the Grams of each.

    Args:
        model: Without values in memory.
        stacks: Its layers.
        collector: Gathers.
        groups: The examples of each batch.
        writer: Takes the Grams.
        spill: Keeps what layers give.
        room_bytes: What Grams may take at a time.
        listener: Told what happens.
    """

    def __init__(
        self,
        model: Model,
        stacks: Stacks,
        collector: GramCollector,
        groups: Sequence[Sequence[Example]],
        writer: StatisticsWriter,
        spill: Spill,
        *,
        room_bytes: int,
        listener: Listener,
    ) -> None:
        self._model, self._stacks, self._collector, self._groups = model, stacks, collector, groups
        self._writer, self._spill, self._room_bytes, self._listener = writer, spill, room_bytes, listener
        self._reached = False
        # What the encoder gave, for the decoder's layers.
        self._encoded: int | None = None
        # Stack -> what its first layer got beside hidden states, in the first batch.
        self._beside: dict[str, str | None] = {}

    def run(self) -> None:
        """Save the Grams of all layers; those that an earlier run has saved are not gathered again.

        Raises:
            CalibrationError: A layer gives what cannot be kept, or values that are not finite.
            StorageError: Something could not be read or written.
        """
        stages = self._stacks.stages
        first = self._resumed()
        with self._collector.attached(), torch.no_grad():
            for number in range(first, len(stages)):
                self._stage(number, stages[number])
        self._spill.clear()

    def _resumed(self) -> int:
        """Return the stage to begin with."""
        for number, stage in enumerate(self._stacks.stages):
            if stage.stack == 0 and stage.layer is None and len(self._stacks.layers) == 2:
                self._encoded = number
        found = self._spill.finished()
        if found is None:
            return 0
        number, facts = found
        if not self._has_all(number):
            # The statistics were deleted since, and with them what the earlier run had done.
            self._spill.clear_stages()
            return 0
        self._collector.anchor_leader = facts.pop("anchor")
        self._beside = facts
        self._listener(Note(text=f"goes on behind {self._stacks.stages[number].name}, as an earlier run left it"))
        return number + 1

    def _has_all(self, last: int) -> bool:
        """Return whether the Grams of all layers up to a stage are saved."""
        layers = [stage for stage in self._stacks.stages[: last + 1] if stage.layer is not None]
        mine = {parameter.entry.name for stage in layers for parameter in stage.parameters}
        return all(self._writer.has("input_gram", name) for name in self._collector.linears if name in mine)

    def _stage(self, number: int, stage: Stage) -> None:
        """Run one stage on all batches, as often as the room for Grams asks for; the first time keeps its output."""
        wanted = [key for key in self._keys(stage) if not self._writer.has(*key)]
        widths = {name: linear.in_features for name, linear in self._collector.linears.items()}
        parts = rounds([(key, 4 * widths[key[1]] ** 2) for key in wanted], self._room_bytes) or [()]
        progress = StageProgress(
            self._listener,
            stage.name,
            number=number + 1,
            stages=len(self._stacks.stages),
            examples=sum(map(len, self._groups)),
        )
        # Some layers look at weights outside of them without calling their modules.
        self._model.load([*stage.parameters, *self._outer(tables=False)])
        for turn, part in enumerate(parts):
            # The first layer of several with one input has saved it for all.
            if turn and all(self._writer.has(*key) for key in part):
                continue
            self._collector.gather(frozenset(part))
            done = 0
            for place, examples in enumerate(self._groups):
                output = self._output(number, stage, place, examples)
                if turn == 0 and number < len(self._stacks.stages) - 1:
                    self._spill.save(number, place, output)
                progress.seen(done := done + len(examples))
            save_grams(self._collector, self._writer)
        self._unload(stage)
        give_back()
        if number < len(self._stacks.stages) - 1:
            self._spill.finish(number, {"anchor": self._collector.anchor_leader, **self._beside})
        if number - 1 not in (-1, self._encoded):
            self._spill.drop(number - 1)
        progress.ended()

    def _keys(self, stage: Stage) -> Iterator[Key]:
        """Yield what a stage may gather: of its layer; what is outside of layers at the first and at the last."""
        layers = {id(module) for stack in self._stacks.layers for layer in stack for module in layer.modules()}
        mine: set[int] = set()
        if stage.layer is not None:
            mine = set(map(id, self._stacks.layers[stage.stack][stage.layer].modules()))
        for name, linear in self._collector.linears.items():
            is_outer = id(linear) not in layers and (stage.layer is None or stage.layer == 0)
            if id(linear) in mine or is_outer:
                yield "input_gram", name

    def _output(self, number: int, stage: Stage, place: int, examples: Sequence[Example]) -> Any:
        """Run the model's forward pass as far as a stage, and return what the stage gives."""
        model = self._model
        batch = make_batch(examples, model.task, model.special, model.device)
        incoming = encoded = None
        inputs = dict(batch.inputs)
        # The decoder's first layer follows its embeddings.
        if number and not (stage.layer == 0 and stage.stack == 1):
            incoming = self._spill.load(number - 1, place, model.device)
        if stage.stack == 1 and self._encoded is not None:
            encoded = self._spill.load(self._encoded, place, model.device)
            inputs = _without_encoder(inputs, encoded)
        self._collector.begin(batch, encoded)
        with self._stand_ins(stage, incoming, checks=place == 0):
            try:
                model.module(**inputs)
            except StopForward as stop:
                return stop.value
        return None

    @contextmanager
    def _stand_ins(self, stage: Stage, incoming: Any, *, checks: bool) -> Iterator[None]:
        """While it is entered, layers before a stage give what comes in, and the pass ends where the stage does."""
        is_first = stage.layer == 0
        self._reached = is_first
        self._collector.listens = is_first
        with ExitStack() as undo:
            for module in self._stacks.outer:
                if is_token_table(module, self._model):
                    undo.enter_context(_forward(module, self._table_forward(module)))
            layers = self._stacks.layers[stage.stack]
            if checks:
                hook = layers[0].register_forward_pre_hook(partial(self._check, stage), with_kwargs=True)
                undo.callback(hook.remove)
            for place, layer in enumerate(layers):
                if stage.layer is None or place < stage.layer:
                    is_last = place == (stage.layer or len(layers)) - 1
                    undo.enter_context(_forward(layer, self._passed(incoming, opens=is_last)))
                elif place == stage.layer:
                    undo.callback(layer.register_forward_hook(_stop_with_output).remove)
            if stage.layer is None and stage.stack == 0 and self._model.encoder is not None:
                undo.callback(self._model.encoder.register_forward_hook(_stop_with_hidden).remove)
            yield

    def _passed(self, incoming: Any, *, opens: bool) -> Callable[..., Any]:
        """Return the stand-in of a layer; behind the last one the pass is the model's own again."""

        def forward(*_: Any, **__: Any) -> Any:
            if opens:
                self._reached = self._collector.listens = True
            return incoming

        return forward

    def _check(self, stage: Stage, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Refuse a model whose layers get from the tokens more than hidden states: zeros would not do for them."""
        beside = (given[1:], {name: value for name, value in named.items() if name != "hidden_states"})
        found = hashlib.sha256()
        for tensor in tensors_in(beside):
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if self._beside.setdefault(f"beside {stage.stack}", found.hexdigest()) != found.hexdigest():
            what = "its layers get more than hidden states, which cannot be had one layer at a time"
            remedy = "give more --memory, so that the whole model is held"
            raise CalibrationError(Problem(what=what, where=f"layer {stage.name}", remedy=remedy))

    def _table_forward(self, table: nn.Embedding) -> Callable[..., Any]:
        """Return what a table of tokens does: its work, loaded first, where that matters, else zeros of its shape."""
        original = table.forward

        def forward(tokens: torch.Tensor) -> Any:
            if self._reached:
                self._model.load(self._model.of(table))
                return original(tokens)
            return torch.zeros(*tokens.shape, table.embedding_dim, device=tokens.device)

        return forward

    def _outer(self, *, tables: bool) -> list[Parameter]:
        """Return the parameters outside of layers, all or those that every stage has: no table, no scores of tokens."""
        head = [] if self._model.head is None else self._model.of(self._model.head)
        names = {found.entry.name for found in head}
        return [
            found
            for module in self._stacks.outer
            if tables or not is_token_table(module, self._model)
            for found in self._model.of(module)
            if tables or found.entry.name not in names
        ]

    def _unload(self, stage: Stage) -> None:
        self._model.unload([found for found in (*stage.parameters, *self._outer(tables=True)) if found.is_loaded])


@contextmanager
def _forward(module: nn.Module, stand_in: Callable[..., Any]) -> Iterator[None]:
    """While it is entered, a module does something else when it is called; its hooks are called all the same."""
    vars(module)["forward"] = stand_in
    try:
        yield
    finally:
        del vars(module)["forward"]


def _without_encoder(inputs: dict[str, torch.Tensor], encoded: torch.Tensor) -> dict[str, Any]:
    """Return a model's arguments with what the encoder gave instead of what it reads."""
    from transformers.modeling_outputs import BaseModelOutput

    kept: dict[str, Any] = {name: value for name, value in inputs.items() if name != "input_ids"}
    return {**kept, "encoder_outputs": BaseModelOutput(last_hidden_state=encoded)}


def _stop_with_output(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
    raise StopForward(output)


def _stop_with_hidden(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
    raise StopForward(output[0])
