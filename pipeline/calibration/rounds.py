"""How much is gathered at a time, so that it fits into memory.

Owns the memory terms of a calibration and the choice between the whole model and its layers. Must not load anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.calibration.examples import Example
from pipeline.calibration.grams import Key
from pipeline.calibration.model import Model
from pipeline.calibration.settings import Settings
from pipeline.calibration.stacks import Stacks, is_token_table
from pipeline.checkpoints.statistics_writer import WAITING_BYTES
from pipeline.errors import BudgetError, Problem
from pipeline.units import format_bytes

# fp32, in which all is computed.
_WIDTH_BYTES = 4
# Copies of a layer's inputs and outputs at once when nothing is kept for gradients: input, residual, two intermediate
# results and the rows that count, measured on Llama and T5 and rounded up.
_COPIES = 8
# With gradients, what autograd keeps of each layer: inputs, outputs, and normalised or activated versions of both.
_KEPT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What is in memory, and how the model is run.

    Attributes:
        mode: "whole": all weights are there. "layers": those of one layer are.
        terms: Name -> bytes, at most.
        room_bytes: What may be gathered at a time.
    """

    mode: Literal["whole", "layers"]
    terms: dict[str, int]
    room_bytes: int


def rounds(sizes: Sequence[tuple[Key, int]], room_bytes: int) -> list[tuple[Key, ...]]:
    """Return statistics in their order, as many together as there is room for; one that is too large stands alone."""
    found: list[tuple[Key, ...]] = []
    taken: list[Key] = []
    taken_bytes = 0
    for key, size_bytes in sizes:
        if taken and taken_bytes + size_bytes > room_bytes:
            found.append(tuple(taken))
            taken, taken_bytes = [], 0
        taken.append(key)
        taken_bytes += size_bytes
    return [*found, tuple(taken)] if taken else found


def key_sizes(model: Model, settings: Settings) -> list[tuple[Key, int]]:
    """Return what is to be gathered, in the model's order, with the memory that each takes, its gradient included."""
    found: list[tuple[Key, int]] = []
    if settings.statistics in ("gram", "kfac"):
        for name, linear in model.linears().items():
            found.append((("input_gram", name), _WIDTH_BYTES * linear.in_features**2))
            if settings.statistics == "kfac" and linear is not model.head:
                found.append((("output_gram", name), _WIDTH_BYTES * linear.out_features**2))
        return found
    for name, parameter in model.parameters.items():
        elements = parameter.entry.elements
        if settings.statistics == "fisher":
            found.append((("diagonal", name), 2 * _WIDTH_BYTES * elements))
        elif len(parameter.entry.shape) == 1:
            found.append((("block", name), _WIDTH_BYTES * (elements**2 + elements)))
    return found


def plan_memory(
    model: Model,
    settings: Settings,
    examples: Sequence[Example],
    sizes: Sequence[tuple[Key, int]],
    stacks: Stacks | None,
    *,
    budget_bytes: int,
    process_bytes: int,
) -> Budget:
    """Return how a model is run within a budget.

    Args:
        model: Without values in memory.
        settings: What is collected.
        examples: All.
        sizes: What is to be gathered.
        stacks: The model's layers; None when it cannot be run by them.
        budget_bytes: What may be held.
        process_bytes: What the process holds already.

    Raises:
        BudgetError: It does not fit; the text has the number to change.
    """
    common = {
        "process": process_bytes,
        "activations": _activation_bytes(model, settings, examples),
        "files": WAITING_BYTES + max(parameter.entry.size_bytes for parameter in model.parameters.values()),
    }
    needed_bytes = sum(size for _, size in sizes)
    largest_bytes = max(size for _, size in sizes)
    whole = {**common, "weights": _WIDTH_BYTES * sum(p.entry.elements for p in model.parameters.values())}
    room_bytes = budget_bytes - sum(whole.values())
    if room_bytes >= needed_bytes:
        return _budget("whole", whole, needed_bytes)
    if stacks is not None and not settings.wants_gradients:
        layers = {**common, "weights": _layer_bytes(model, stacks)}
        layer_room_bytes = budget_bytes - sum(layers.values())
        if layer_room_bytes >= largest_bytes:
            return _budget("layers", layers, min(layer_room_bytes, needed_bytes))
        raise _too_little(layers, largest_bytes, budget_bytes)
    if room_bytes >= largest_bytes:
        return _budget("whole", whole, room_bytes)
    raise _too_little(whole, largest_bytes, budget_bytes)


def _budget(mode: Literal["whole", "layers"], terms: dict[str, int], room_bytes: int) -> Budget:
    return Budget(mode=mode, terms={**terms, "statistics": room_bytes}, room_bytes=room_bytes)


def _too_little(terms: dict[str, int], largest_bytes: int, budget_bytes: int) -> BudgetError:
    total_bytes = sum(terms.values()) + largest_bytes
    parts = " + ".join(f"{name} {format_bytes(size)}" for name, size in terms.items())
    what = (
        f"needs {format_bytes(total_bytes)} = {parts} + the largest statistic {format_bytes(largest_bytes)},"
        f" {format_bytes(budget_bytes)} are given"
    )
    # Rounded up: the number must do when it is typed in.
    enough = -(-total_bytes // 10**6)
    return BudgetError(Problem(what=what, remedy=f"--memory {enough}MB, or a smaller --batch or --max-length"))


def _layer_bytes(model: Model, stacks: Stacks) -> int:
    """Return the most that one stage holds of the weights: a layer with what is outside of layers and small.

    The first stage of a stack has the tables of tokens, too.
    """
    tables: dict[str, int] = {}
    small: dict[str, int] = {}
    for module in stacks.outer:
        if module is not model.head:
            sizes = tables if is_token_table(module, model) else small
            sizes.update({found.entry.name: found.entry.elements for found in model.of(module)})
    layers = [sum(found.entry.elements for found in stage.parameters) for stage in stacks.stages]
    first = max(size for stage, size in zip(stacks.stages, layers, strict=True) if stage.layer == 0)
    return _WIDTH_BYTES * (max(*layers, first + sum(tables.values())) + sum(small.values()))


def _activation_bytes(model: Model, settings: Settings, examples: Sequence[Example]) -> int:
    """Return what one batch of the longest examples takes beside the weights, at most."""
    config = model.module.config.get_text_config()
    size = min(settings.examples_at_once, len(examples))
    longest = max(max(len(example.tokens), len(example.targets)) for example in examples)
    tokens = size * longest
    linears = [linear for linear in model.linears().values() if linear is not model.head]
    widths = [linear.in_features + linear.out_features for linear in linears]
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or 1
    attention = 3 * size * heads * longest**2
    if not settings.wants_gradients:
        return _WIDTH_BYTES * (_COPIES * tokens * max(widths, default=0) + attention)
    blocks = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None) or 1
    scored = 0 if model.head is None else tokens * model.vocabulary.size
    return _WIDTH_BYTES * _KEPT * (tokens * sum(widths) + attention * blocks + scored)
