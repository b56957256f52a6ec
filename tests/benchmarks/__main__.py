"""`python -m tests.benchmarks`: time whole merges against their floors, print a table, write JSON.

Every round runs every program once, so that a busy machine slows all of them alike; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.contest import Contestant, Figures, contestants, take, take_merge

_VERSION_OF = "import importlib.metadata as m; print(m.version('mergekit'), 'with torch', m.version('torch'))"
# Heading and key of the table's columns.
_COLUMNS = {
    "wall s": "wall_s",
    "floor s": "floor_wall_s",
    "wall / floor": "ratio",
    "net CPU / floor": "net_ratio",
    "CPU s": "cpu_s",
    "of that start": "start_cpu_s",
    "floor CPU s": "floor_cpu_s",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a program, with what belongs to it in its round."""

    merge: Figures
    floor: Figures
    start: Figures
    reads: int


def main() -> None:
    """Parse the arguments, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest family, one round")
    parser.add_argument("--sizes", default="25M,100M,400M", help="default 25M,100M,400M")
    parser.add_argument("--models", default="4,8", help="how many models; default 4,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8, help="no round begins after that; default 8")
    parser.add_argument("--mergekit", metavar="PYTHON", help="an interpreter that has mergekit, to compare with")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.models, options.rounds = "25M", "4", 1
    # A pipe gets the same width as a terminal.
    console = Console(width=150)
    counts = [int(count) for count in options.models.split(",")]
    result: dict[str, Any] = {"machine": _machine(options.mergekit), "families": []}
    console.print(json.dumps(result["machine"]))
    deadline_s = time.monotonic() + options.minutes * 60
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for size in options.sizes.split(","):
        with tempfile.TemporaryDirectory(prefix="geomerge-bench-") as folder:
            take((sys.executable, "-m", "tests.benchmarks.family", folder, size, str(max(counts))))
            for count in counts:
                if time.monotonic() > deadline_s:
                    console.print(f"left out, the time is up: {size} parameters x {count} models")
                    continue
                folders = [Path(folder) / f"model{number}" for number in range(count + 1)]
                programs = _measure(Path(folder), folders, options.rounds, options.mergekit, deadline_s)
                result["families"].append({"size": size, "models": count, "programs": programs})
                console.print(_table(f"{size} parameters x {count} models", programs))
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"load at the end {os.getloadavg()[0]:.1f}; figures in {options.out}")


def _measure(
    root: Path, folders: list[Path], rounds: int, mergekit: str | None, deadline_s: float
) -> list[dict[str, Any]]:
    """Return every program's runs on one family, each with the floor and the start of its round."""
    output = root / "out"
    programs = contestants(root, folders, mergekit)
    runs: dict[str, list[Run]] = {program.name: [] for program in programs}
    reports: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        if number and time.monotonic() > deadline_s:
            break
        floors: dict[int, Figures] = {}
        starts: dict[tuple[str, ...], Figures] = {}
        for program in programs:
            if program.slow and number:
                continue
            if program.start not in starts:
                starts[program.start] = take(program.start)
            merge, report = take_merge(program, output)
            # What it read by its own account: the plan only projects how much of the first read is kept.
            reads = int(report["bytes_read"]) if report else program.reads
            # Two programs that read the same but for headers share one floor, or its noise would part them.
            shared = next((known for known in floors if abs(known - reads) < reads / 100), reads)
            if shared not in floors:
                floors[shared] = _take_floor(root, folders, reads)
            runs[program.name].append(Run(merge=merge, floor=floors[shared], start=starts[program.start], reads=reads))
            if report is not None:
                reports[program.name] = report
    return [_summary(program, runs[program.name], reports.get(program.name)) for program in programs]


def _take_floor(root: Path, folders: list[Path], reads: int) -> Figures:
    base, *models = [str(folder / "model.safetensors") for folder in folders]
    target = root / "floor.bin"
    writes = Path(base).stat().st_size
    # The base last: the floor of a method that reads no base ends before it.
    numbers = (str(reads), str(writes), str(target))
    figures = take((sys.executable, "-m", "tests.benchmarks.floor", *numbers, *models, base))
    target.unlink()
    return figures


def _summary(program: Contestant, runs: list[Run], report: dict[str, Any] | None) -> dict[str, Any]:
    """Return medians over the rounds; ratios are medians of the rounds' ratios."""
    return {
        "name": program.name,
        "rounds": len(runs),
        "read_bytes": median(run.reads for run in runs),
        "passes": report["passes"] if report else None,
        "wall_s": median(run.merge.wall_s for run in runs),
        "cpu_s": median(run.merge.cpu_s for run in runs),
        "start_cpu_s": median(run.start.cpu_s for run in runs),
        "floor_wall_s": median(run.floor.wall_s for run in runs),
        "floor_cpu_s": median(run.floor.cpu_s for run in runs),
        "ratio": median(run.merge.wall_s / run.floor.wall_s for run in runs),
        "net_ratio": median((run.merge.cpu_s - run.start.cpu_s) / run.floor.cpu_s for run in runs),
        "peak_bytes": max(run.merge.peak_bytes for run in runs),
        "phases_s": report["seconds"] if report else None,
        "runs": [dataclasses.asdict(run) for run in runs],
    }


def _table(title: str, programs: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    table.add_column("program")
    for heading in ("GB read", *_COLUMNS, "peak GB"):
        table.add_column(heading, justify="right")
    for entry in programs:
        reads = f"{entry['read_bytes'] / 1e9:.2f}" + (f" ({entry['passes']:.2f} x)" if entry["passes"] else "")
        cells = [f"{entry[key]:.2f}" for key in _COLUMNS.values()]
        table.add_row(entry["name"], reads, *cells, f"{entry['peak_bytes'] / 1e9:.2f}")
    return table


def _machine(mergekit: str | None) -> dict[str, Any]:
    command = (mergekit, "-c", _VERSION_OF) if mergekit else None
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "mergekit": subprocess.run(command, capture_output=True, text=True).stdout.strip() if command else None,
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
