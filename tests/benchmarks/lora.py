"""`python -m tests.benchmarks.lora CACHE`: merges of adapters, timed as whole commands.

The paper's job is twenty adapters of rank 16 for the 144 query and value matrices (2048 × 2048) of T5-XL, merged into
an adapter, beside a plain dense Weiszfeld on a few of these matrices in the same round; its time for all of them is
reckoned from these. The other job is a thousand adapters of rank 8 over a base of half a billion parameters. Inputs are
made once and kept in CACHE. A child starts with the peak of its parent, so no torch here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.contest import Contestant, take, take_merge

_PAPER = {
    "per matrix, to an adapter": {"scope": "tensor", "output": "adapter"},
    "whole vector, to an adapter": {"scope": "model", "output": "adapter"},
}
# The goal is 1 GB without the base.
_PAPER_MEMORY = ("--memory", "1GB")
_THOUSAND = {"whole vector, to a model": {}, "per matrix, to a model": {"scope": "tensor"}}


def main() -> None:
    """Parse the arguments, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.lora", description=__doc__)
    parser.add_argument("cache", type=Path, help="a folder for the inputs, outside the repository")
    parser.add_argument("--jobs", default="paper,qv", help="of paper, qv, seven; default paper,qv")
    parser.add_argument("--adapters", type=int, default=1000, help="of qv and seven; default 1000")
    parser.add_argument("--matrices", type=int, default=4, help="how many the dense loop is timed on; default 4")
    parser.add_argument("--rounds", type=int, default=3, help="of the paper's job; default 3")
    parser.add_argument("--memory", default="4GB", help="for qv and seven; default 4GB")
    parser.add_argument("--out", type=Path, default=Path("build/bench-lora.json"))
    options = parser.parse_args()
    console = Console(width=150)
    result: dict[str, Any] = {"machine": _machine(), "jobs": {}}
    console.print(json.dumps(result["machine"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for job in options.jobs.split(","):
        folder: Path = options.cache / job
        folder.mkdir(parents=True, exist_ok=True)
        adapters = 20 if job == "paper" else options.adapters
        take((sys.executable, "-m", "tests.benchmarks.lora_inputs", str(folder), job, str(adapters)))
        folders = [folder / f"adapter{number}" for number in range(adapters)]
        if job == "paper":
            entries = _paper(folder, folders, options.rounds, options.matrices)
        else:
            command = ("--memory", options.memory)
            entries = [_merge(folder, folders, title, keys, command) for title, keys in _THOUSAND.items()]
        result["jobs"][job] = entries
        console.print(_table(f"{job}: {adapters} adapters", entries))
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"load at the end {os.getloadavg()[0]:.1f}; figures in {options.out}")


def _paper(folder: Path, adapters: list[Path], rounds: int, matrices: int) -> list[dict[str, Any]]:
    """Return our runs and the dense ones of all rounds, and in each of ours the ratio within its round."""
    collected: dict[str, list[dict[str, Any]]] = {}
    # Once and on one matrix: it takes minutes.
    published = _dense(adapters, 1, published=True)
    for _ in range(rounds):
        dense = _dense(adapters, matrices, published=False)
        merges = [_merge(folder, adapters, title, keys, _PAPER_MEMORY) for title, keys in _PAPER.items()]
        ours = [*_factors(adapters), *merges]
        for entry in ours:
            entry["ratio"] = dense["wall_s"] / entry["wall_s"]
            entry["ratio_published"] = published["wall_s"] / entry["wall_s"]
        for entry in (*ours, dense):
            collected.setdefault(entry["name"], []).append(entry)
    collected[published["name"]] = [published]
    return [_middle(entries) for entries in collected.values()]


def _middle(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first round's entry with medians over the rounds, and the highest peak."""
    merged = {**entries[0], "rounds": len(entries), "runs": entries}
    for key in ("wall_s", "cpu_s", "ratio", "ratio_published"):
        if key in entries[0]:
            merged[key] = median(entry[key] for entry in entries)
    return {**merged, "peak_bytes": max(entry["peak_bytes"] for entry in entries)}


def _merge(
    folder: Path, adapters: list[Path], title: str, keys: dict[str, object], options: tuple[str, ...]
) -> dict[str, Any]:
    """Run one merge by the command line into an empty folder."""
    document: dict[str, Any] = {"merge_method": "geometric_median", "base_model": str(folder / "base")}
    document |= {"models": [{"model": str(path)} for path in adapters], "pipeline": keys}
    with tempfile.TemporaryDirectory(prefix="geomerge-bench-", dir=folder) as scratch:
        recipe = Path(scratch) / "recipe.yaml"
        recipe.write_text(json.dumps(document))  # JSON is YAML
        command = (sys.executable, "-m", "pipeline", "merge", "--executor", "local", *options, str(recipe))
        program = Contestant(name=title, command=command)
        figures, report = take_merge(program, Path(scratch) / "out")
    if report is None:
        raise RuntimeError(f"{title}: the merge left no report")
    gaps = [group["relative_gap"] for group in report["groups"] if group["relative_gap"] is not None]
    return {
        "name": title,
        "wall_s": figures.wall_s,
        "cpu_s": figures.cpu_s,
        "peak_bytes": figures.peak_bytes,
        "read_bytes": report["bytes_read"],
        "phases_s": report["seconds"],
        "largest_gap": max(gaps),
    }


def _factors(adapters: list[Path]) -> list[dict[str, Any]]:
    """Time the medians alone, by the same clock as the dense loop: reading and start-up left aside."""
    with tempfile.TemporaryDirectory(prefix="geomerge-bench-") as scratch:
        result = Path(scratch) / "result.json"
        command = (sys.executable, "-m", "tests.benchmarks.factor_median", str(result))
        figures = take((*command, *map(str, adapters)))
        run = json.loads(result.read_text())
    shared = {"cpu_s": figures.cpu_s, "peak_bytes": figures.peak_bytes}
    return [
        {"name": "medians alone, per matrix", "wall_s": run["each_s"], **shared},
        {"name": "median alone, whole vector", "wall_s": run["whole_s"], **shared},
    ]


def _dense(adapters: list[Path], matrices: int, *, published: bool) -> dict[str, Any]:
    """Time the dense loop on a few matrices and reckon all of them, its start-up left aside."""
    with tempfile.TemporaryDirectory(prefix="geomerge-bench-") as scratch:
        result = Path(scratch) / "result.json"
        flags = ("--published",) if published else ()
        command = (sys.executable, "-m", "tests.benchmarks.dense_median", str(result), str(matrices), *flags)
        figures = take((*command, *map(str, adapters)))
        runs = json.loads(result.read_text())
    seconds = sum(run["seconds"] for run in runs)
    return {
        "name": "dense Weiszfeld, as published" if published else "dense Weiszfeld",
        "wall_s": seconds * runs[0]["of"] / len(runs),
        "cpu_s": figures.cpu_s * runs[0]["of"] / len(runs),
        "peak_bytes": figures.peak_bytes,
        "measured_s": seconds,
        "matrices": len(runs),
        "iterations": [run["iterations"] for run in runs],
    }


def _table(title: str, entries: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    table.add_column("program")
    for heading in ("wall s", "CPU s", "peak GB", "read GB", "dense / this", "published / this", "what"):
        table.add_column(heading, justify="right")
    for entry in entries:
        what = json.dumps(entry["phases_s"]) if "phases_s" in entry else ""
        if "matrices" in entry:
            what = (
                f"reckoned from {entry['measured_s']:.1f} s for {entry['matrices']}, {entry['iterations']} iterations"
            )
        ratios = [f"{entry[key]:.0f}" if key in entry else "" for key in ("ratio", "ratio_published")]
        reads = f"{entry['read_bytes'] / 1e9:.2f}" if "read_bytes" in entry else ""
        cells = [f"{entry['wall_s']:.1f}", f"{entry['cpu_s']:.1f}", f"{entry['peak_bytes'] / 1e9:.2f}", reads]
        table.add_row(entry["name"], *cells, *ratios, what)
    return table


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
