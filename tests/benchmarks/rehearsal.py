"""`python -m tests.benchmarks.rehearsal`: a merge of nine 70B models, as far as one small machine can rehearse it.

A sparse family with the names, shapes and files of Llama 3 70B is planned by the real command in a fresh process, and
the measuring and writing passes run on a slice of it. Prints tables, writes JSON. A child starts with the peak of its
parent, so no torch here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.contest import take

# What planning may take.
_PLAN_S, _PLAN_BYTES = 10.0, 1_000_000_000
_START = (sys.executable, "-c", "import pipeline.merging, rich.console")
# Output of the writing slice that may lie on the disk at a time.
_ROOM_BYTES = 1_000_000_000


def main() -> None:
    """Parse the arguments, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rehearsal", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds a part, small output files, one plan")
    parser.add_argument("--size", default="70B", choices=("70B", "8B"))
    parser.add_argument("--seconds", type=float, default=180, help="of every measuring run; default 180")
    parser.add_argument("--threads", default="2", help="measuring runs, one for each number of the list; default 2")
    parser.add_argument("--memory", type=int, default=4_000_000_000, help="bytes of the worker; default 4e9")
    parser.add_argument("--file-size", default="5GB", help="of the output; default 5GB")
    parser.add_argument("--rounds", type=int, default=3, help="of planning; default 3")
    parser.add_argument("--out", type=Path, default=Path("build/rehearsal.json"))
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.memory, options.file_size, options.rounds = 4, 1_200_000_000, "500MB", 1
    console = Console(width=150)
    result: dict[str, Any] = {"machine": machine(), "options": {**vars(options), "out": str(options.out)}}
    console.print(json.dumps(result["machine"]))
    with tempfile.TemporaryDirectory(prefix="geomerge-rehearsal-") as folder:
        root = Path(folder)
        (root / "large").mkdir()
        (root / "small").mkdir()
        recipe = str(root / "large/recipe.yaml")
        result["family"] = part(root, "family", str(root / "large"), options.size, options.file_size)
        console.print(_family(options.size, result["family"]))
        result["plan"] = [_plan(recipe, str(root / "out")) for _ in range(options.rounds)]
        console.print(_plan_table(result["plan"]))
        fill_s = "0" if options.quick else "240"
        result["read"] = part(root, "read", recipe, str(min(options.seconds, 20)), fill_s)
        threads = options.threads.split(",")
        result["measure"] = [
            part(root, "measure", recipe, count, str(options.memory), str(options.seconds), str(run / len(threads)))
            for run, count in enumerate(threads)
        ]
        console.print(_measure_table(result["measure"]))
        # Files that the disk holds, of the same plan otherwise.
        part(root, "family", str(root / "small"), options.size, "500MB")
        seconds = str(min(options.seconds, 30))
        result["write"] = part(root, "write", str(root / "small/recipe.yaml"), seconds, str(_ROOM_BYTES))
        result["values"] = part(root, "values", str(root / "values"), "3" if options.quick else "15")
        console.print(_rates_table(result))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"load at the end {os.getloadavg()[0]:.1f}; figures in {options.out}")


def machine() -> dict[str, Any]:
    """Return what a figure is worth without."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "system": platform.platform(),
        "processor": model.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def part(root: Path, name: str, *arguments: str) -> dict[str, Any]:
    """Run one part in a process of its own and return its figures, with the load before it."""
    load = os.getloadavg()[0]
    path = root / "part.json"
    take((sys.executable, "-m", "tests.benchmarks.rehearsal_parts", str(path), name, *arguments))
    found: dict[str, Any] = json.loads(path.read_text())
    return {**found, "load": load}


def _plan(recipe: str, output: str) -> dict[str, Any]:
    """Plan as a user does; beside it, what importing alone takes."""
    load = os.getloadavg()[0]
    start = take(_START)
    figures = take((sys.executable, "-m", "pipeline", "plan", recipe, output))
    return {
        "wall_s": figures.wall_s,
        "cpu_s": figures.cpu_s,
        "peak_bytes": figures.peak_bytes,
        "start_wall_s": start.wall_s,
        "load": load,
    }


def _family(size: str, family: dict[str, Any]) -> str:
    return (
        f"{size}, 9 models: {family['files']} files of {family['apparent_bytes'] / 1e12:.2f} TB,"
        f" {family['disk_bytes'] / 1e6:.1f} MB on the disk, made in {family['seconds']:.1f} s"
    )


def _plan_table(runs: list[dict[str, Any]]) -> Table:
    table = _table("geomerge plan, fresh process", "wall s", "CPU s", "imports wall s", "peak MB", "load", "within")
    for run in runs:
        within = run["wall_s"] <= _PLAN_S and run["peak_bytes"] <= _PLAN_BYTES
        cells = [f"{run[key]:.1f}" for key in ("wall_s", "cpu_s", "start_wall_s")]
        table.add_row("plan", *cells, f"{run['peak_bytes'] / 1e6:.0f}", f"{run['load']:.1f}", "yes" if within else "NO")
    return table


def _measure_table(runs: list[dict[str, Any]]) -> Table:
    headings = (
        "wall s",
        "files",
        "GB read",
        "GB/s",
        "user s/GB",
        "sys s/GB",
        "peak MB",
        "projected MB",
        "RSS MB, warm",
    )
    table = _table("measuring pass on a slice", *headings, "slope MB/min", "KB/GB read", "load")
    for run in runs:
        low, high = run["resident_range_bytes"]
        table.add_row(
            f"{run['threads']} threads",
            f"{run['wall_s']:.0f}",
            f"{run['files']} of {run['of_files']}",
            f"{run['bytes'] / 1e9:.0f}",
            f"{run['bytes_per_s'] / 1e9:.2f}",
            f"{run['user_s_per_gb']:.2f}",
            f"{run['system_s_per_gb']:.2f}",
            f"{run['peak_bytes'] / 1e6:.0f}",
            f"{run['projected_bytes'] / 1e6:.0f}",
            f"{low / 1e6:.0f} to {high / 1e6:.0f}",
            f"{run['resident_slope_bytes_per_s'] * 60 / 1e6:+.2f}",
            f"{run['resident_slope_bytes_per_gb'] / 1e3:+.1f}",
            f"{run['load']:.1f}",
        )
    return table


def _rates_table(result: dict[str, Any]) -> Table:
    table = _table("rates of one thread", "GB of input / CPU s", "wall s", "what")
    measure = median(run["bytes_per_cpu_s"] for run in result["measure"])
    table.add_row("measure", f"{measure / 1e9:.2f}", "", "the slice: holes, in no cache")
    write, read, values = result["write"], result["read"], result["values"]
    rate = write["read_bytes"] / write["cpu_s"] / 1e9
    what = f"{write['files']} files, {write['written_bytes'] / 1e9:.1f} GB written"
    table.add_row("write", f"{rate:.2f}", f"{write['wall_s']:.1f}", what)
    table.add_row("read alone", f"{read['bytes'] / read['cpu_s'] / 1e9:.2f}", f"{read['wall_s']:.1f}", "the same holes")
    for kind in ("zeros", "random"):
        table.add_row(f"measure, {kind}", f"{1 / values[f'{kind}_cpu_s_per_gb']:.2f}", "", "in the page cache")
    table.caption = f"CPU time of zeros by that of random values: {values['zeros_by_random']:.3f}"
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


if __name__ == "__main__":
    main()
