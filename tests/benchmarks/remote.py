"""Merges from object storage beside the fastest client library that reads the same files.

    python -m tests.benchmarks.remote [--size 100M] [--models 4] [--rounds 5] [--memory 2GB] [--slow] [--python PATH]

Starts a real S3 server on the loopback interface, puts a family there, and lets every reader read all of it in a
process of its own, one after the other, several rounds: s3fs alone, with `--python` also boto3 and obstore (an
interpreter that has them), a worker's measuring pass, and whole merges, to a folder and to the bucket. The floor of a
merge is what the fastest library of the same round takes to read and to upload as many bytes, or a plain loop to write
them to a file and make that durable. `--slow` puts 30 ms and
15 MB/s a connection in between, which is nearer to a store across a network.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from tests.benchmarks.family import SHAPES, make_family

_AT_ONCE = (8, 32)

_Figures = dict[str, float]


def main() -> None:
    """Parse the arguments, measure, print a table."""
    # As in `tests.benchmarks.__main__`: what is timed is compiled once.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.remote", description=__doc__)
    parser.add_argument("--size", default="100M", choices=list(SHAPES))
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--python", help="an interpreter with boto3 and obstore, which are faster than s3fs")
    options = parser.parse_args()
    from tests.support.s3 import prefix, s3_server, upload

    rounds: list[dict[str, _Figures]] = []
    with tempfile.TemporaryDirectory(prefix="geomerge-remote-") as root, s3_server(Path(root) / "s3") as bucket:
        folder = Path(root)
        make_family(folder / "family", SHAPES[options.size], options.models)
        place = upload(folder / "family", prefix(bucket))
        recipes = {method: _recipe(folder, place, options.models, method) for method in ("geometric_median", "linear")}
        with _slow_way() if options.slow else nullcontext():
            for _ in range(options.rounds):
                rounds.append(_round(folder, place, recipes, options.memory, options.python))
    Console(width=120).print(_table(rounds))


def _recipe(folder: Path, place: str, count: int, method: str) -> Path:
    """Write the recipe of a merge and return its path."""
    recipe = folder / f"{method}.json"
    models = [{"model": f"{place}/model{number}"} for number in range(1, count + 1)]
    recipe.write_text(json.dumps({"merge_method": method, "base_model": f"{place}/model0", "models": models}))
    return recipe


def _round(
    folder: Path, place: str, recipes: dict[str, Path], memory: str, other_python: str | None
) -> dict[str, _Figures]:
    """Let everyone have a turn and return the figures of each, with their ratios to the fastest library's."""
    recipe = str(recipes["geometric_median"])
    plain = [("s3fs", sys.executable), *((name, other_python) for name in ("boto3", "obstore") if other_python)]
    script = str(Path(__file__).with_name("remote_plain.py"))
    found: dict[str, _Figures] = {}
    best = wrote = 0.0
    for library, interpreter in plain:
        for at_once in _AT_ONCE:
            figures = _run([str(interpreter), script, "read", library, str(at_once), recipe])
            found[f"{library}, {at_once} at a time"] = figures
            best = max(best, figures["rate"])
        wrote = max(wrote, _run([str(interpreter), script, "write", library, "8", recipe])["rate"])
    figures = _run([sys.executable, "-m", "tests.benchmarks.remote_reader", recipe, memory])
    found["measuring pass"] = {**figures, "passes": figures["rate"] / best}
    to_disk = _disk_rate(folder)
    for method, path in recipes.items():
        for name, output in (("a folder", str(folder / "out")), ("the bucket", f"{place}-out")):
            found[f"{method} to {name}"] = _merge(path, output, memory, best, wrote if "://" in output else to_disk)
    return found


def _disk_rate(folder: Path) -> float:
    """Return the MB/s at which a file is written and made durable."""
    data, count = os.urandom(8 << 20), 32
    begun = time.perf_counter()
    with (folder / "written").open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(data)
        os.fsync(file)
    seconds = time.perf_counter() - begun
    (folder / "written").unlink()
    return count * len(data) / seconds / 1e6


def _merge(recipe: Path, output: str, memory: str, best: float, wrote: float) -> _Figures:
    """Run a whole merge; `best` and `wrote` are the MB/s of the fastest reader and of the fastest such writer."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline", "merge", str(recipe), output, "--executor", "local", "--overwrite"]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    report = _run([*command, "--memory", memory, "--json"])
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    passes: object = report["seconds"]
    if not isinstance(passes, dict):
        raise TypeError(f"the report's seconds are {passes}")
    floor_s = report["bytes_read"] / best / 1e6 + report["bytes_written"] / wrote / 1e6
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak: object = report["peak_memory_bytes"]
    return {
        "rate": report["bytes_read"] / seconds / 1e6,
        "passes": floor_s / sum(passes.values()),
        "whole": floor_s / seconds,
        "cpu_s_per_gb": cpu_s / report["bytes_read"] * 1e9,
        "peak_mb": (peak["process"] if isinstance(peak, dict) else 0.0) / 1e6,
    }


def _run(command: list[str]) -> _Figures:
    """Run a command and return the JSON that it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr[-2000:]}")
    found: _Figures = json.loads(done.stdout)
    return found


def _table(rounds: list[dict[str, _Figures]]) -> Table:
    """Return medians over the rounds; ratios are taken within a round."""
    table = Table(title="from S3, medians")
    columns = {
        "MB/s": ("rate", "{:.0f}"),
        "passes / fastest": ("passes", "{:.2f}"),
        "command / fastest": ("whole", "{:.2f}"),
        "CPU s/GB": ("cpu_s_per_gb", "{:.1f}"),
        "peak MB": ("peak_mb", "{:.0f}"),
    }
    for heading in ("reader", *columns):
        table.add_column(heading, justify="left" if heading == "reader" else "right")
    for reader, first in rounds[0].items():
        cells = [
            form.format(median(figures[reader][key] for figures in rounds)) if key in first else ""
            for key, form in columns.values()
        ]
        table.add_row(reader, *cells)
    return table


@contextmanager
def _slow_way() -> Iterator[None]:
    """Run the slow way in front of the server and lead the environment to it."""
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.benchmarks.slow_way", str(port), endpoint.rpartition(":")[2]]
    process = subprocess.Popen(command)
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    try:
        _await_port(port)
        yield
    finally:
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        process.kill()
        process.wait()


def _await_port(port: int) -> None:
    for _ in range(200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError("the slow way did not start")


if __name__ == "__main__":
    main()
