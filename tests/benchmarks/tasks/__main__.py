"""`python -m tests.benchmarks.tasks`: fine-tune a real base on real tasks, merge by every method, score held-out rows.

Weights and texts come out of public packages. Everything lands in one folder, and what is there already is kept:
experts, statistics and scores. Prints a table and writes it, with all figures as JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

# Before transformers is imported: nothing may be looked up on a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from tests.benchmarks.tasks import candidates, models, texts
from tests.benchmarks.tasks.merging import Merger, Scored, calibrate
from tests.benchmarks.tasks.metric import equal_weights, write_mean_fisher
from tests.benchmarks.tasks.setting import DECODER, ENCODER, Setting

_KINDS = ("fisher", "gram", "kfac")


def main() -> None:
    """Run what is asked for."""
    options = _options()
    # A pipe gets the same width as a terminal.
    console = Console(width=150)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    setting = ENCODER if options.family == "encoder" else DECODER
    packages: Path = options.folder / "packages"
    texts.install(packages, setting.family == "decoder")
    folder: Path = options.folder / f"{setting.family}-{setting.digest()}"
    tasks = texts.load_tasks(packages, setting)
    heads = _train(folder, packages, tasks, setting, console)
    if options.until == "experts":
        return
    _statistics(folder, tasks, setting, options, console)
    if options.until == "statistics":
        return
    _merge(folder, tasks, heads, setting, options, console)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.tasks", description=__doc__)
    parser.add_argument("--family", choices=("encoder", "decoder"), default="encoder")
    parser.add_argument("--folder", type=Path, default=Path("build/tasks"), help="default build/tasks")
    parser.add_argument("--until", choices=("experts", "statistics", "merges"), default="merges")
    parser.add_argument("--kinds", default=",".join(_KINDS), help=f"of statistics; default {','.join(_KINDS)}")
    parser.add_argument("--labels", default="sampled", help="of fisher and kfac; default sampled")
    parser.add_argument("--examples", default="480", help="for Grams, of a task; default 480")
    parser.add_argument("--fisher-examples", default="128", help="for squared gradients, one by one; default 128")
    parser.add_argument("--iterations", default="10,100", help="of MaTS, to choose from; default 10,100")
    parser.add_argument("--only", help="methods, separated by commas; default all")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _train(
    folder: Path, packages: Path, tasks: tuple[texts.Task, ...], setting: Setting, console: Console
) -> dict[str, dict[str, torch.Tensor]]:
    """Make the base, the heads and the experts that are not there yet; return the heads."""
    pretrained = folder / "pretrained"
    if not (folder / "base/model.safetensors").is_file():
        models.make_base(packages, setting, pretrained)
        models.Classifier(pretrained, setting, 2).save(folder / "plain")
        models.take_trunk(folder / "plain", folder / "base")
    console.print(f"base: {models.describe(folder / 'base')}")
    heads = {}
    for task in tasks:
        rows = {part: getattr(task, part) for part in ("train", "validation", "test")}
        for part, content in rows.items():
            texts.write_rows(task, content, folder / "data" / f"{task.name}-{part}.jsonl")
        place, note = folder / "experts" / task.name, folder / "experts" / f"{task.name}.json"
        if not note.is_file():
            started = time.perf_counter()
            head = models.fit_head(folder / "base", task, setting)
            models.save_head(head, folder / "heads" / f"{task.name}.safetensors")
            expert = models.Classifier(folder / "base", setting, len(task.labels))
            expert.set_head(head)
            loss = models.fine_tune(expert, task, setting)
            expert.save(place)
            models.take_trunk(place, folder / "trunks" / task.name)
            counts = {part: len(content.texts) for part, content in rows.items()}
            found = {"classes": len(task.labels), **counts, "loss": loss, "seconds": time.perf_counter() - started}
            # Written last: an expert without it is trained again.
            note.write_text(json.dumps(found) + "\n")
        console.print(f"expert {task.name}: {note.read_text().strip()}")
        heads[task.name] = load_file(folder / "heads" / f"{task.name}.safetensors")
    return heads


def _statistics(
    folder: Path, tasks: tuple[texts.Task, ...], setting: Setting, options: argparse.Namespace, console: Console
) -> None:
    """Collect the statistics that are not there yet."""
    for task in tasks:
        for kind in options.kinds.split(","):
            examples = options.fisher_examples if kind == "fisher" else options.examples
            words = {"task": "classification", "examples": examples, "max-length": str(setting.tokens)}
            if kind != "gram":
                words["labels"] = options.labels
            took = calibrate(
                folder / "experts" / task.name,
                folder / "data" / f"{task.name}-train.jsonl",
                folder / "statistics" / f"{task.name}-{kind}",
                kind,
                words,
            )
            console.print(f"statistics {task.name} {kind}: {took:.0f} s")
    if "fisher" in options.kinds.split(","):
        write_mean_fisher([folder / "statistics" / f"{task.name}-fisher" for task in tasks], folder / "statistics/mean")


def _merge(
    folder: Path,
    tasks: tuple[texts.Task, ...],
    heads: dict[str, dict[str, torch.Tensor]],
    setting: Setting,
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Score the base, the experts and every method's best candidate; print and write the table."""
    by_name = {task.name: task for task in tasks}

    def score(trunk: Path, part: str) -> dict[str, float]:
        return {
            name: models.accuracy(trunk, heads[name], getattr(task, part), setting) for name, task in by_name.items()
        }

    experts = {task.name: folder / "trunks" / task.name for task in tasks}
    # Every expert on every task: what one task's training did to the others.
    given = folder / "given.json"
    if not given.is_file():
        others = {name: score(trunk, "test") for name, trunk in experts.items()}
        own = {name: found[name] for name, found in others.items()}
        given.write_text(json.dumps({"base": score(folder / "base", "test"), "experts": own, "others": others}) + "\n")
    rows: list[tuple[str, str, dict[str, float]]] = []
    found = json.loads(given.read_text())
    rows += [("base", "", found["base"]), ("experts, each on its own task", "", found["experts"])]
    merger = Merger(folder, experts, score)
    arithmetic = merger.best(candidates.task_arithmetic(len(tasks)))
    scale = candidates.scale_of(arithmetic.candidate)
    figures: dict[str, Any] = {}
    iterations = [int(number) for number in options.iterations.split(",")]

    def weights() -> tuple[float, ...]:
        return equal_weights([folder / "statistics" / f"{task.name}-kfac" for task in tasks])

    planned = candidates.plan(len(tasks), str(folder / "statistics/mean"), iterations, weights)
    for method, choices in planned.items():
        if options.only and method not in options.only.split(","):
            continue
        tried = choices(scale)
        best = merger.best(tried)
        figures[method] = [_figures(merger.validated(candidate)) for candidate in tried]
        rows.append((method, best.candidate.setting, dict(best.test)))
        console.print(f"{method}: {best.candidate.setting}: {_mean(dict(best.test)):.1f}")
    table = _table(tuple(by_name), rows)
    (folder / "table.md").write_text(table)
    (folder / "figures.json").write_text(json.dumps({"methods": figures, "given": found}, indent=1) + "\n")
    console.print(table, markup=False)


def _figures(scored: Scored) -> dict[str, Any]:
    return {
        "setting": scored.candidate.setting,
        "validation": scored.choice,
        "test": dict(scored.test),
        "seconds": scored.seconds,
    }


def _table(names: tuple[str, ...], rows: list[tuple[str, str, dict[str, float]]]) -> str:
    lines = ["| held-out accuracy, % | chosen on validation rows | " + " | ".join([*names, "mean"]) + " |"]
    lines.append("| --- | --- |" + " ---: |" * (len(names) + 1))
    for title, chosen, values in rows:
        cells = [f"{value:.1f}" for value in (*(values[name] for name in names), _mean(values))]
        lines.append(f"| {title} | {chosen} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


if __name__ == "__main__":
    main()
