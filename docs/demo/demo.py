"""A real merge from end to end: `make demo`.

Fine-tunes a pretrained sentence encoder on four real text tasks, breaks one more expert on purpose, merges each pool of
experts with the command line, and prints what the merged models still know. Everything lands in ``build/demo/``, where
experts are trained once. Needs no network: weights and texts come out of installed packages.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

# Before transformers is imported: nothing may be looked up on a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
import yaml
from broken import make_foreign, make_loud
from encoder import Encoder, Head, Training, accuracy, describe, embed, fine_tune, load, make_head, pretrained_folder
from picture import bar_chart, markdown_table
from tasks import Task, load_tasks

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "demo"
SETTINGS = Training()
# What an adapter merged with alpha in place of alpha / rank is off by, roughly.
LOUD_FACTOR = 30.0
# Reordering changes the order of float32 additions and nothing else.
SAME_FUNCTION = 1e-4
METHODS: dict[str, dict[str, object]] = {
    "average": {"merge_method": "linear"},
    "median": {"merge_method": "geometric_median"},
    "median, scale norm": {"merge_method": "geometric_median", "pipeline": {"scale": "norm"}},
    "median, scale median_norm": {"merge_method": "geometric_median", "pipeline": {"scale": "median_norm"}},
}

log = logging.getLogger("demo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """One merge: what went in, what the command line reported, and how well the result does."""

    pool: str
    method: str
    models: tuple[str, ...]
    coefficients: tuple[float, ...]
    scale: float
    gap: float | None
    accuracies: tuple[float, ...]


def main() -> None:
    """Run the demo."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    tasks = load_tasks()
    load(pretrained_folder()).save(WORK / "base")
    base = load(WORK / "base")
    heads = [make_head(base, task) for task in tasks]
    experts = {task.name: train_expert(task, head) for task, head in zip(tasks, heads, strict=True)}
    foreign, loud = break_experts(base, experts, tasks)
    pools = {
        "four experts": experts,
        "four experts + one foreign": {**experts, "foreign": foreign},
        "four experts + one loud": {**experts, "loud": loud},
    }
    before = percentages(base, heads, tasks)
    own = tuple(
        percentages(load(experts[task.name]), [head], (task,))[0] for task, head in zip(tasks, heads, strict=True)
    )
    merged = [merge(pool, method, models, heads, tasks) for pool, models in pools.items() for method in METHODS]
    show(tasks, before, own, merged)


def train_expert(task: Task, head: Head) -> Path:
    """Return the checkpoint of a task's expert, trained now unless the same settings have made it before."""
    folder, note = WORK / "experts" / task.name, WORK / "experts" / f"{task.name}.json"
    rows = sha256(json.dumps([task.train.texts, task.train.classes]).encode()).hexdigest()
    wanted = {**describe(SETTINGS), "rows": rows}
    if note.is_file() and json.loads(note.read_text())["settings"] == wanted:
        log.info("expert %s: trained before", task.name)
        return folder
    started = time.perf_counter()
    expert = load(WORK / "base")
    fine_tune(expert, head, task.train, SETTINGS)
    expert.save(folder)
    seconds = round(time.perf_counter() - started)
    # Written last: an expert without its note is trained again.
    note.write_text(json.dumps({"settings": wanted, "training_s": seconds}, indent=2))
    log.info("expert %s: %d rows, %d s", task.name, len(task.train.texts), seconds)
    return folder


def break_experts(base: Encoder, experts: dict[str, Path], tasks: tuple[Task, ...]) -> tuple[Path, Path]:
    """Write the two broken experts and return their checkpoints.

    Raises:
        SystemExit: The foreign expert is not the same function as the expert that it was made from.
    """
    origin, texts = load(experts[tasks[0].name]), tasks[0].held_out.texts[:32]
    foreign, loud = load(experts[tasks[0].name]), load(experts[tasks[-1].name])
    make_foreign(foreign.model, SETTINGS.seed)
    change = (embed(origin, texts) - embed(foreign, texts)).abs().max().item()
    if change > SAME_FUNCTION:
        raise SystemExit(f"the foreign expert computes something else: its embeddings differ by up to {change:.2g}")
    log.info("foreign: %s reordered; embeddings differ by at most %.1e", tasks[0].name, change)
    make_loud(loud.model, base.model, LOUD_FACTOR)
    log.info("loud: what %s learnt, times %g", tasks[-1].name, LOUD_FACTOR)
    folders = WORK / "broken" / "foreign", WORK / "broken" / "loud"
    foreign.save(folders[0])
    loud.save(folders[1])
    return folders


def percentages(encoder: Encoder, heads: list[Head], tasks: tuple[Task, ...]) -> tuple[float, ...]:
    """Return the held-out accuracy of one encoder on every task, in percent."""
    return tuple(100 * accuracy(encoder, head, task.held_out) for head, task in zip(heads, tasks, strict=True))


def merge(pool: str, method: str, models: dict[str, Path], heads: list[Head], tasks: tuple[Task, ...]) -> Merged:
    """Write the recipe, run the command line as a user would, and score what it wrote.

    Raises:
        SystemExit: The command line failed.
    """
    name = f"{pool} {method}".replace(" ", "-").replace(",", "").replace("+-", "")
    recipe, output = WORK / "recipes" / f"{name}.yaml", WORK / "merged" / name
    recipe.parent.mkdir(parents=True, exist_ok=True)
    listed = [{"model": str(path), "parameters": {"weight": 1.0}} for path in models.values()]
    words = {**METHODS[method], "base_model": str(WORK / "base"), "models": listed}
    recipe.write_text(yaml.safe_dump(words, sort_keys=False))
    command = [sys.executable, "-m", "pipeline", "merge", str(recipe), str(output), "--json", "--overwrite"]
    started = time.perf_counter()
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"geomerge failed on {recipe}:\n{ran.stderr}")
    log.info("merged %s, %s: %.0f s", pool, method, time.perf_counter() - started)
    report = json.loads((output / "geomerge_report.json").read_text())["groups"][0]
    return Merged(
        pool=pool,
        method=method,
        models=tuple(models),
        coefficients=tuple(report["coefficients"]),
        scale=report["scale"],
        gap=report["relative_gap"],
        accuracies=percentages(load(output), heads, tasks),
    )


def show(tasks: tuple[Task, ...], base: tuple[float, ...], own: tuple[float, ...], merged: list[Merged]) -> None:
    """Print the tables, and write them and the picture beside the models."""
    rows = [("base", base), ("experts, each on its own task", own)]
    rows += [(f"{item.pool}: {item.method}", item.accuracies) for item in merged]
    accuracies = markdown_table(
        ["held-out accuracy, %", *(task.name for task in tasks), "mean"],
        [[name, *(f"{value:.1f}" for value in (*values, mean(values)))] for name, values in rows],
    )
    columns = list(dict.fromkeys(model for item in merged for model in item.models))
    coefficients = markdown_table(
        ["coefficients", *columns, "scale λ", "gap"], [coefficient_row(item, columns) for item in merged]
    )
    text = f"{accuracies}\n\n{coefficients}\n"
    (WORK / "table.md").write_text(text)
    sections = {
        "before merging": [("base", "given", mean(base)), ("experts, each on its own task", "given", mean(own))]
    }
    for item in merged:
        kind = item.method.partition(",")[0]
        sections.setdefault(item.pool, []).append((item.method, kind, mean(item.accuracies)))
    (WORK / "demo.svg").write_text(bar_chart("One broken expert among four good ones", sections))
    log.info("\n%s\nWritten: %s and demo.svg beside it", text, WORK / "table.md")


def coefficient_row(item: Merged, columns: list[str]) -> list[str]:
    """Return what every model contributes to one merge, the scale, and the certified relative gap."""
    shares = dict(zip(item.models, item.coefficients, strict=True))
    return [
        f"{item.pool}: {item.method}",
        *(f"{shares[model]:.4f}" if model in shares else "" for model in columns),
        f"{item.scale:.2f}",
        "" if item.gap is None else f"{item.gap:.0e}",
    ]


def mean(values: tuple[float, ...]) -> float:
    """Return the plain mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
