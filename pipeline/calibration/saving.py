"""From what was gathered to the files of statistics.

Owns what is stored, what is shared, and why a parameter has no statistic. Must not know how anything was gathered.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pipeline.calibration.grams import GramCollector, Key
from pipeline.calibration.model import Model
from pipeline.calibration.settings import Settings
from pipeline.checkpoints.statistics_writer import StatisticsWriter


def save_means(means: Iterable[tuple[Key, torch.Tensor]], writer: StatisticsWriter) -> None:
    """Save statistics, durably."""
    for (kind, name), mean in means:
        writer.add(kind, name, mean.cpu().numpy())
    writer.flush()


def save_grams(collector: GramCollector, writer: StatisticsWriter) -> None:
    """Save what a collector has gathered, and which layers share it, durably."""
    for (kind, name), mean in collector.take():
        writer.add(kind, name, mean.cpu().numpy())
    for name, leader in collector.leaders.items():
        is_known = writer.has("input_gram", name) or not writer.has("input_gram", leader)
        if name != leader and not is_known:
            writer.share("input_gram", name, leader)
    writer.flush()


def tell_outside(model: Model, settings: Settings, writer: StatisticsWriter) -> int:
    """Say of every tensor of the checkpoint without a full statistic why that is so, and return how many there are."""
    linears = model.linears()
    count = 0
    for name in model.checkpoint.tensors:
        if settings.statistics == "fisher":
            has_all = writer.has("diagonal", name)
        elif settings.statistics == "block":
            has_all = writer.has("block", name)
        else:
            has_all = writer.has("input_gram", name)
            if settings.statistics == "kfac":
                has_all = has_all and writer.has("output_gram", name)
        if not has_all:
            count += 1
            writer.outside(name, _reason(model, settings, name, linears))
    return count


def _reason(model: Model, settings: Settings, name: str, linears: dict[str, nn.Linear]) -> str:
    """Return why a tensor has no statistic."""
    if name not in model.parameters:
        return f"no parameter of {type(model.module).__name__}"
    owners = [owner for owner, _ in model.parameters[name].owners]
    attribute = model.parameters[name].owners[0][1]
    if settings.statistics == "block":
        return "no vector"
    if name in linears:
        if linears[name] is model.head and settings.statistics == "kfac":
            return "makes scores of tokens: the Gram of its gradients would be the vocabulary's square"
        return "never got rows that are tokens"
    if any(isinstance(owner, nn.Embedding) for owner in owners):
        tied = any(isinstance(owner, nn.Linear) for owner in owners)
        return "embedding, tied to the scores of tokens" if tied else "embedding"
    if attribute == "bias":
        return "bias"
    if any("norm" in type(owner).__name__.lower() for owner in owners):
        return "norm"
    return f"no linear layer but {type(owners[0]).__name__}"
