"""A model as stacks of layers, so that it can be run one layer at a time.

Owns which modules are the layers, and what a model must be like for that. Must not run anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

from pipeline.calibration.model import Model, Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A step of running a model layer by layer: one layer, or what follows the last one of a stack.

    Attributes:
        name: The layer's; of the end, the module's that ends there.
        stack: 0, or 1 for the decoder of a model with two sides.
        layer: Its place in the stack; None for the end.
        parameters: Of the layer; of the end none, what it needs is loaded when it is called.
    """

    name: str
    stack: int
    layer: int | None
    parameters: tuple[Parameter, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacks:
    """A model's stages in the order of the forward pass.

    Attributes:
        stages: All.
        layers: The modules of each stack.
        outer: The modules outside of layers that have parameters; none of them has parts.
    """

    stages: tuple[Stage, ...]
    layers: tuple[tuple[nn.Module, ...], ...]
    outer: tuple[nn.Module, ...]


def find_stacks(model: Model) -> Stacks | None:
    """Return a model's stages; None when it is not of stacks that are passed through once, one layer after another."""
    tops = [model.module] if model.encoder is None else [model.encoder, model.module.get_decoder()]
    lists = [list(_outermost_lists(top)) for top in tops]
    if any(len(found) != 1 for found in lists):
        return None
    layers = tuple(tuple(found[0]) for found in lists)
    inside = {id(module) for stack in layers for layer in stack for module in layer.modules()}
    outer = [
        module
        for module in model.module.modules()
        if id(module) not in inside and next(module.parameters(recurse=False), None) is not None
    ]
    if any(next(module.children(), None) is not None for module in outer) or not _is_passed_once(model, layers):
        return None
    return Stacks(stages=tuple(_stages(model, layers)), layers=layers, outer=tuple(outer))


def is_token_table(module: nn.Module, model: Model) -> TypeGuard[nn.Embedding]:
    """Return whether a module turns tokens into hidden states: by far the largest that is outside of layers."""
    return isinstance(module, nn.Embedding) and module.num_embeddings == model.vocabulary.size


def _outermost_lists(top: nn.Module) -> Iterator[nn.ModuleList]:
    """Yield the lists of equal modules that are in no other one."""
    for child in top.children():
        if isinstance(child, nn.ModuleList) and len(child) and len({type(part) for part in child}) == 1:
            yield child
        else:
            yield from _outermost_lists(child)


def _is_passed_once(model: Model, layers: tuple[tuple[nn.Module, ...], ...]) -> bool:
    """Return whether there are as many layers as the config says: others are used again and again."""
    config = model.module.config.get_text_config()
    told = [
        getattr(config, name, None)
        for names in (("num_hidden_layers", "num_layers", "encoder_layers"), ("num_decoder_layers", "decoder_layers"))
        for name in names
    ]
    return all(len(stack) in told for stack in layers)


def _stages(model: Model, layers: tuple[tuple[nn.Module, ...], ...]) -> Iterator[Stage]:
    names = {id(module): name for name, module in model.module.named_modules()}
    for number, stack in enumerate(layers):
        for place, layer in enumerate(stack):
            yield Stage(name=names[id(layer)], stack=number, layer=place, parameters=tuple(model.of(layer)))
        last = number == len(layers) - 1
        end = type(model.module).__name__ if last else names[id(model.encoder)]
        yield Stage(name=f"the end of {end}", stack=number, layer=None)
