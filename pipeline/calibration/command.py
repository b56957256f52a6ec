"""A calibration from model and data to finished statistics, as one call.

Owns the wiring of this room; every decision lives in one of its modules.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from pipeline import __version__
from pipeline.calibration.data import read_rows
from pipeline.calibration.examples import Example, encode_rows
from pipeline.calibration.grams import GramCollector
from pipeline.calibration.layers import LayerRunner
from pipeline.calibration.model import Model
from pipeline.calibration.opening import open_model
from pipeline.calibration.residence import resident_bytes
from pipeline.calibration.rounds import Budget, key_sizes, plan_memory, rounds
from pipeline.calibration.saving import tell_outside
from pipeline.calibration.settings import Settings, check_settings
from pipeline.calibration.spill import Spill
from pipeline.calibration.stacks import Stacks, find_stacks
from pipeline.calibration.whole import run_whole
from pipeline.checkpoints.statistics import Statistics, open_statistics
from pipeline.checkpoints.statistics_facts import COMPLETE_FILE, StatisticsFacts
from pipeline.checkpoints.statistics_writer import StatisticsWriter, first_difference
from pipeline.engine.process import peak_memory_bytes
from pipeline.errors import CalibrationError, OutputError, Problem
from pipeline.events import Committed, Listener, Note, ignore
from pipeline.storage import Store, join_url, open_store, shown_url

# In the output, unless the user names another place; removed when the statistics are finished.
SCRATCH = "scratch"


def calibrate(
    model_url: str,
    data_url: str,
    output_url: str,
    settings: Settings,
    *,
    memory_bytes: int,
    device: str = "cpu",
    scratch_url: str | None = None,
    process_bytes: int | None = None,
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Collect statistics of a model from data and return what was done.

    A second call with the same arguments goes on where the first was interrupted, or finds it finished.

    Args:
        model_url: A model folder.
        data_url: A file of JSON lines or a Parquet file.
        output_url: A folder of its own for the statistics.
        settings: What is collected.
        memory_bytes: What the process may hold.
        device: "cpu", "cuda" or "auto".
        scratch_url: Where outputs of layers wait when the model is larger than memory; None for inside the output.
        process_bytes: What the process holds of that already; None to measure it.
        listener: Told what happens.

    Raises:
        PipelineError: Anything that stands in the way; the statistics are not finished then.
    """
    started_s = time.perf_counter()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = open_model(model_url, settings.task, device)
    check_settings(settings, model.task)
    _refuse_padding(model, settings, model_url)
    rows, data_version = read_rows(data_url, settings.examples)
    examples = encode_rows(rows, settings, model.task, model.vocabulary, model.tokenizer)
    if len(examples) < settings.examples:
        listener(Note(text=f"the data has {len(examples)} examples, {settings.examples} were asked for"))
    facts = _facts(model, model_url, data_url, data_version, settings, examples)
    output = open_store(output_url)
    try:
        found = _finished(output, output_url, facts)
        budget = None
        if found is None:
            # Before hours of work, not after them.
            output.probe_writable()
            scratch_url = scratch_url or join_url(output_url, SCRATCH)
            process_bytes = resident_bytes() if process_bytes is None else process_bytes
            memory = (memory_bytes, process_bytes)
            budget = _collect(model, settings, examples, facts, output, scratch_url, memory, listener)
            found = open_statistics(output_url)
            listener(Committed(location=output.location()))
        else:
            listener(Note(text="these statistics are finished already; nothing to do"))
    finally:
        output.close()
    return _document(found, budget, time.perf_counter() - started_s)


def _refuse_padding(model: Model, settings: Settings, model_url: str) -> None:
    """Refuse to put several texts into a batch when the model cannot tell which tokens are padding."""
    unknown = getattr(model.module.config.get_text_config(), "pad_token_id", None) is None
    if unknown and model.task == "classification" and settings.examples_at_once > 1:
        what = "its config has no pad_token_id, by which a classifier finds a text's last token"
        problem = Problem(what=what, where=f"model {shown_url(model_url)}", remedy="set it, or --batch 1")
        raise CalibrationError(problem)


def _collect(
    model: Model,
    settings: Settings,
    examples: Sequence[Example],
    facts: StatisticsFacts,
    output: Store,
    scratch_url: str,
    memory: tuple[int, int],
    listener: Listener,
) -> Budget:
    """Gather and save all statistics, and say that they are complete.

    `memory` has the bytes that may be held, and those that are held already.
    """
    writer = StatisticsWriter(output, facts)
    sizes = key_sizes(model, settings)
    if not sizes:
        what = f"has nothing that {settings.statistics} statistics are of: no linear layer, or no vector"
        raise CalibrationError(Problem(what=what, where=f"model {facts.model}"))
    stacks = find_stacks(model)
    budget = plan_memory(
        model,
        settings,
        examples,
        sizes,
        stacks,
        budget_bytes=memory[0],
        process_bytes=memory[1],
    )
    size = settings.examples_at_once
    groups = [examples[start : start + size] for start in range(0, len(examples), size)]
    if budget.mode == "layers" and stacks is not None:
        _by_layers(model, stacks, groups, facts, writer, scratch_url, budget, listener)
    else:
        run_whole(model, settings, groups, rounds(sizes, budget.room_bytes), writer, listener)
    tell_outside(model, settings, writer)
    writer.finish()
    return budget


def _by_layers(
    model: Model,
    stacks: Stacks,
    groups: Sequence[Sequence[Example]],
    facts: StatisticsFacts,
    writer: StatisticsWriter,
    scratch_url: str,
    budget: Budget,
    listener: Listener,
) -> None:
    listener(Note(text="the model is run layer by layer: with more --memory it would be held whole"))
    scratch = open_store(scratch_url)
    try:
        runner = LayerRunner(
            model,
            stacks,
            GramCollector(model, gradients=False),
            groups,
            writer,
            Spill(scratch, json.dumps(facts.to_json())),
            room_bytes=budget.room_bytes,
            listener=listener,
        )
        runner.run()
    finally:
        scratch.close()


def _facts(
    model: Model, model_url: str, data_url: str, data_version: str, settings: Settings, examples: Sequence[Example]
) -> StatisticsFacts:
    """Return where the statistics come from; whatever changes them is in it, so that no run goes on with others."""
    files = [(file.path, file.size_bytes, file.version) for file in model.checkpoint.files]
    extra = {
        "statistics": settings.statistics,
        "task": model.task,
        "class": type(model.module).__name__,
        "model_version": _digest(files),
        "data_version": _digest(data_version),
        "text_fields": ",".join(settings.text_fields),
        "label_field": settings.label_field or "",
        "max_length": str(settings.max_length),
        "batch": str(settings.examples_at_once),
        "program": f"geomerge {__version__}",
    }
    if settings.wants_gradients and settings.labels == "sampled":
        extra["seed"] = str(settings.seed)
    return StatisticsFacts(
        model=shown_url(model_url),
        data=shown_url(data_url),
        examples=len(examples),
        tokens=sum(len(example.tokens) + len(example.targets) for example in examples),
        reduction=settings.reduction if settings.wants_gradients else "none",
        labels=settings.labels if settings.wants_gradients else "none",
        normalisation="tokens" if settings.statistics in ("gram", "kfac") else "examples",
        extra=extra,
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _finished(output: Store, output_url: str, facts: StatisticsFacts) -> Statistics | None:
    """Return the statistics that an earlier run has finished of the same; None when there are none.

    Raises:
        OutputError: There are others.
    """
    if not output.exists(COMPLETE_FILE):
        return None
    found = open_statistics(output_url)
    if found.facts != facts:
        what = f"holds finished statistics of something else: {first_difference(found.facts, facts)}"
        remedy = "choose another folder for the statistics, or delete this one"
        raise OutputError(Problem(what=what, where=output.location(), remedy=remedy))
    return found


def _document(found: Statistics, budget: Budget | None, seconds: float) -> dict[str, Any]:
    """Return what was done, for programs and for the line that people see."""
    return {
        "output": found.url,
        "facts": found.facts.to_json(),
        "stored": len(found.entries),
        "shared": len(found.shared),
        "outside": len(found.reasons),
        "files": len(found.files),
        "bytes": sum(file.size_bytes for file in found.files),
        "mode": budget.mode if budget else None,
        "memory": budget.terms if budget else None,
        "peak_memory": peak_memory_bytes(),
        "seconds": round(seconds, 3),
    }
