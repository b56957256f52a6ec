"""Two ways in which an uploaded expert is broken though it works, or almost works, on its own.

Owns the damage. *Foreign*: hidden units and attention heads in another order; the same function, but entry by entry
unrelated to the family, like a model whose layers another tool rearranged. *Loud*: the change from the base multiplied,
like an adapter merged with the wrong scale.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def make_foreign(model: PreTrainedModel, seed: int) -> None:
    """Reorder the heads and the hidden units of every layer, in place and consistently."""
    generator = torch.Generator().manual_seed(seed)
    heads, width = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
    for layer in model.encoder.layer:
        columns = torch.arange(heads * width).view(heads, width)[torch.randperm(heads, generator=generator)].flatten()
        attention = layer.attention.self
        _reorder([attention.query, attention.key, attention.value], layer.attention.output.dense, columns)
        units = torch.randperm(model.config.intermediate_size, generator=generator)
        _reorder([layer.intermediate.dense], layer.output.dense, units)


@torch.no_grad()
def make_loud(model: PreTrainedModel, base: PreTrainedModel, factor: float) -> None:
    """Multiply the difference from the base, in place."""
    for parameter, origin in zip(model.parameters(), base.parameters(), strict=True):
        parameter.copy_(origin + factor * (parameter - origin))


def _reorder(makers: list[torch.nn.Linear], reader: torch.nn.Linear, order: torch.Tensor) -> None:
    """Reorder what the makers put out, and the reader's columns with it, so that the reader sees the same."""
    for maker in makers:
        maker.weight.copy_(maker.weight[order])
        maker.bias.copy_(maker.bias[order])
    reader.weight.copy_(reader.weight[:, order])
