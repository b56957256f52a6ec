"""Statistics of a model that is held whole: some at a time, each time in a pass over all examples.

Owns the passes. Must not know how much fits into memory, nor how moments are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from pipeline.calibration.batches import make_batch
from pipeline.calibration.examples import Example
from pipeline.calibration.fisher import GradientMoments
from pipeline.calibration.grams import GramCollector, Key, StopForward
from pipeline.calibration.likelihood import scores
from pipeline.calibration.model import Model
from pipeline.calibration.progress import StageProgress
from pipeline.calibration.residence import give_back
from pipeline.calibration.saving import save_grams, save_means
from pipeline.calibration.settings import Settings
from pipeline.checkpoints.statistics_writer import StatisticsWriter
from pipeline.events import Listener


def run_whole(
    model: Model,
    settings: Settings,
    groups: Sequence[Sequence[Example]],
    passes: Sequence[Sequence[Key]],
    writer: StatisticsWriter,
    listener: Listener,
) -> None:
    """Save statistics, pass by pass; those that an earlier run has saved are not gathered again.

    Args:
        model: Its values are loaded.
        settings: What is collected.
        groups: The examples of each batch.
        passes: What is gathered in each pass over the examples.
        writer: Takes the statistics.
        listener: Told what happens.

    Raises:
        CalibrationError: Inputs or gradients are not finite.
        StorageError: Something could not be read or written.
    """
    left = [[key for key in keys if not writer.has(*key)] for keys in passes]
    if not any(left):
        return
    model.load(model.parameters.values())
    run = _gram_pass if settings.statistics in ("gram", "kfac") else _gradient_pass
    for number, keys in enumerate(left, start=1):
        # The first layer of several with one input has saved it for all.
        if all(writer.has(*key) for key in keys):
            continue
        progress = StageProgress(
            listener,
            f"pass {number}",
            number=number,
            stages=len(left),
            examples=sum(map(len, groups)),
        )
        run(model, settings, groups, keys, writer, progress)
        give_back()
        progress.ended()


def _gram_pass(
    model: Model,
    settings: Settings,
    groups: Sequence[Sequence[Example]],
    keys: Sequence[Key],
    writer: StatisticsWriter,
    progress: StageProgress,
) -> None:
    """Gather Grams in one pass, with the gradients of outputs where those are asked for."""
    collector = GramCollector(model, gradients=settings.wants_gradients)
    collector.gather(frozenset(keys))
    done = 0
    with collector.attached(), torch.set_grad_enabled(settings.wants_gradients):
        for examples in groups:
            batch = make_batch(examples, model.task, model.special, model.device)
            collector.begin(batch)
            with suppress(StopForward):
                logits = model.module(**batch.inputs).logits
                found = scores(logits, batch, settings) if settings.wants_gradients else []
                for number, (weight_B, loglik_B) in enumerate(found, start=1):
                    # Rows of an example carry the root of its weight, so that their products carry the weight.
                    torch.autograd.backward((weight_B.sqrt() * loglik_B).sum(), retain_graph=number < len(found))
            progress.seen(done := done + len(examples))
    save_grams(collector, writer)


def _gradient_pass(
    model: Model,
    settings: Settings,
    groups: Sequence[Sequence[Example]],
    keys: Sequence[Key],
    writer: StatisticsWriter,
    progress: StageProgress,
) -> None:
    """Gather moments of parameters' gradients in one pass, an example at a time."""
    moments = GradientMoments(model.parameters)
    moments.gather(keys)
    done = 0
    for examples in groups:
        batch = make_batch(examples, model.task, model.special, model.device)
        moments.add(scores(model.module(**batch.inputs).logits, batch, settings))
        progress.seen(done := done + len(examples))
    save_means(moments.take(done), writer)
