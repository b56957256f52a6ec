"""`python -m tests.benchmarks`: time whole merges against their floors and each other, print ratios, keep JSON.

Every round runs every program once, so that a busy machine slows all of them alike; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import caches, compare, programs, sections, tuning
from tests.benchmarks.ratios import Ratio, ratios
from tests.benchmarks.rounds import Clock
from tests.benchmarks.sections import Bench

_VERSION_OF = "import importlib.metadata as m; print(m.version('mergekit'), 'with torch', m.version('torch'))"
# Where `make bench-peer` puts an interpreter that has mergekit.
_PEER = Path("build/mergekit/bin/python")
# Parts in the order in which they run, and their share of the time.
_WEIGHTS = {"start": 1.0, "four": 2.5, "eight": 4.0, "ray": 1.5, "cold": 2.0, "growth": 2.0}
# A model that the goals speak of: a gigabyte.
_LARGE_BYTES = 900_000_000
# A family whose first chunk is far longer than its headers.
_START_SIZE, _START_MODELS = "25M", 2


def main() -> None:
    """Parse the arguments, measure, report."""
    # All that is timed is compiled once, as pip compiles what it installs, whatever this shell says.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    options = _options()
    # A pipe gets the same width as a terminal.
    console = Console(width=150)
    machine = _machine(options.mergekit)
    console.print(json.dumps(machine))
    path: Path = options.out or compare.RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = {**vars(options), "out": str(path), "folder": str(options.folder)}
    result: dict[str, Any] = {"machine": machine, "options": shown, "sections": []}
    with tempfile.TemporaryDirectory(prefix="geomerge-bench-", dir=options.folder) as folder:
        for title, section in _sections(options, Path(folder), result):
            result["sections"].append(section)
            result["ratios"] = [ratio.to_json() for ratio in ratios(result["sections"])]
            path.write_text(json.dumps(result, indent=1) + "\n")
            console.print(_programs_table(title, section, result["sections"]))
    console.print(_ratios_table(ratios(result["sections"])))
    for text in result["left_out"]:
        console.print(f"left out: {text}")
    took = time.strftime("%H:%M:%S", time.gmtime(time.time() - machine["unix_s"]))
    console.print(f"took {took}, load at the end {os.getloadavg()[0]:.1f}; figures in {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small families, one round")
    parser.add_argument("--size", default="500M", help="parameters of a model; default 500M")
    parser.add_argument("--models", default="4,8", help="how many models; default 4,8")
    parser.add_argument("--growth", default="2,4,8,16,32", help="models of the small family; default 2,4,8,16,32")
    parser.add_argument("--growth-size", default="100M", help="parameters of its models; default 100M")
    parser.add_argument("--rounds", type=int, default=5, help="at most; default 5")
    parser.add_argument("--minutes", type=float, default=14, help="no round begins that would go beyond; default 14")
    parser.add_argument("--only", default=",".join(_WEIGHTS), help=f"of {','.join(_WEIGHTS)}")
    parser.add_argument("--mergekit", metavar="PYTHON", help=f"one that has mergekit; default {_PEER} if it is there")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default where temporary files go")
    parser.add_argument("--out", type=Path, help=f"default {compare.RUNS}/TIME.json")
    options = parser.parse_args()
    if options.quick:
        options.size, options.growth_size, options.growth, options.rounds = "25M", "25M", "2,4,8", 1
    if options.mergekit is None and _PEER.exists():
        options.mergekit = str(_PEER)
    return options


def _sections(options: argparse.Namespace, root: Path, result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every part's title and figures; families are made when they are first needed."""
    few, many = min(_numbers(options.models)), max(_numbers(options.models))
    wanted = [name for name in _WEIGHTS if name in options.only.split(",") and (name != "eight" or few < many)]
    clock = Clock(minutes=options.minutes, weights={name: _WEIGHTS[name] for name in wanted}, most=options.rounds)
    family = programs.make(options.size, many, root / "family")
    settings, tried = tuning.tune(family.of(2).inputs, root / "floor", tries=1 if options.quick else 3)
    tiny = programs.make("200K", 2, root / "tiny")
    bench = Bench(folder=root, floor=settings, mergekit=options.mergekit, tiny=tiny)
    result |= {"floor": dataclasses.asdict(settings), "tuning": tried, "left_out": bench.left_out}

    def cold(numbers: Iterator[int]) -> dict[str, Any]:
        settings, tried = tuning.tune_cold(bench.floor, family.of(1).inputs, root / "floor")
        result["cold_floor"] = dataclasses.asdict(settings)
        result["tuning"] += tried
        return sections.cold(bench, family.of(few), settings, numbers)

    def growth(numbers: Iterator[int]) -> dict[str, Any]:
        counts = _numbers(options.growth)
        # The large family makes room, on the disk and in the page cache.
        _remove(family.inputs)
        small = programs.make(options.growth_size, max(counts), root / "small")
        return sections.growth(bench, small, counts, numbers)

    def start(numbers: Iterator[int]) -> dict[str, Any]:
        return sections.start(bench, programs.make(_START_SIZE, _START_MODELS, root / "start"), numbers)

    parts: dict[str, tuple[str, str, Callable[[Iterator[int]], dict[str, Any]]]] = {
        "start": ("start", "", start),
        "four": ("warm", family.of(few).name, lambda numbers: sections.warm(bench, family.of(few), numbers)),
        "eight": ("warm", family.name, lambda numbers: sections.warm(bench, family, numbers)),
        "ray": ("ray", family.of(few).name, lambda numbers: sections.ray(bench, family.of(few), numbers)),
        "cold": ("cold", family.of(few).name, cold),
        "growth": ("growth", options.growth_size, growth),
    }
    for name in wanted:
        kind, of, run = parts[name]
        large = kind not in ("warm", "cold", "ray") or family.bytes >= _LARGE_BYTES
        section = {"kind": kind, "family": of, "large": large, **run(clock.rounds(name))}
        if not any(program["runs"] for program in section["programs"]):
            bench.left_out.append(f"{kind} {of}: the time was up")
        yield f"{kind} {of}".strip(), section


def _programs_table(title: str, section: Mapping[str, Any], all_: Sequence[Mapping[str, Any]]) -> Table:
    """Return medians over the rounds; net is the processor time beyond what the program takes for next to nothing."""
    headings = ("rounds", "reads", "wall s", "floor s", "wall / floor", "CPU s", "net CPU / floor", "peak GB", "own GB")
    table = Table(title=title)
    table.add_column("program")
    for heading in headings:
        table.add_column(heading, justify="right")
    starts = [program for one in all_ if one["kind"] == "start" for program in one["programs"] if program["runs"]]
    fixed = {program["name"]: _middle(program["runs"], "cpu_s") for program in starts}
    for program in section["programs"]:
        runs = program["runs"]
        if not runs:
            table.add_row(program["name"], "0")
            continue
        cells = [str(len(runs)), f"{_middle(runs, 'passes'):.2f}" if "passes" in runs[0] else ""]
        cells += [f"{_middle(runs, 'wall_s'):.2f}", *_floor_cells(runs), f"{_middle(runs, 'cpu_s'):.2f}"]
        net = ""
        if "floor" in runs[0] and program["fixed"] in fixed:
            beyond = fixed[program["fixed"]]
            net = f"{median((run['cpu_s'] - beyond) / run['floor']['cpu_s'] for run in runs):.2f}"
        peaks = [f"{max(run[key] for run in runs) / 1e9:.2f}" for key in ("peak_bytes", "anonymous_bytes")]
        table.add_row(program["name"], *cells, net, *peaks)
    return table


def _floor_cells(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    if "floor" not in runs[0]:
        return "", ""
    ratio = median(run["wall_s"] / run["floor"]["wall_s"] for run in runs)
    return f"{median(run['floor']['wall_s'] for run in runs):.2f}", f"{ratio:.2f}"


def _ratios_table(found: Sequence[Ratio]) -> Table:
    table = Table(title="ratios, medians over the rounds")
    for heading in ("", "median", "from", "to", "rounds", "goal"):
        table.add_column(heading, justify="right" if heading else "left")
    for ratio in found:
        cells = [f"{value:.2f}" for value in (ratio.middle, min(ratio.values), max(ratio.values))]
        table.add_row(ratio.key, *cells, str(len(ratio.values)), compare.goal(ratio.to_json()))
    return table


def _middle(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(median(run[key] for run in runs))


def _numbers(text: str) -> list[int]:
    return sorted(int(number) for number in text.split(","))


def _remove(inputs: Sequence[Path]) -> None:
    caches.drop(inputs)
    for path in inputs:
        path.unlink()


def _machine(mergekit: str | None) -> dict[str, Any]:
    command = (mergekit, "-c", _VERSION_OF) if mergekit else None
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "unix_s": time.time(),
        "system": platform.platform(),
        "processor": model.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "mergekit": subprocess.run(command, capture_output=True, text=True).stdout.strip() if command else None,
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
