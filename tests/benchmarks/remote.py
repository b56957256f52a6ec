"""How fast a measuring pass reads from object storage, beside the fastest plain reader of the same files.

    python -m tests.benchmarks.remote [--size 100M] [--models 4] [--rounds 3] [--memory 2GB] [--slow]

Starts a real S3 server on the loopback interface, puts a family there, and lets every reader read all of it in a
process of its own, one after the other, several rounds. `--slow` puts 30 ms and 15 MB/s a connection in between, which
is nearer to a store across a network. Start-up does not count: every reader is warm before its clock runs.
"""

from __future__ import annotations

import argparse
import json
import os
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


def main() -> None:
    """Parse the arguments, measure, print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.remote", description=__doc__)
    parser.add_argument("--size", default="100M", choices=list(SHAPES))
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--slow", action="store_true")
    options = parser.parse_args()
    from tests.support.s3 import prefix, s3_server, upload

    readers = ("plain 8", "plain 32", "one by one", "read ahead")
    rates: dict[str, list[dict[str, float]]] = {reader: [] for reader in readers}
    with tempfile.TemporaryDirectory(prefix="geomerge-remote-") as root, s3_server(Path(root) / "s3") as bucket:
        make_family(Path(root) / "family", SHAPES[options.size], options.models)
        place = upload(Path(root) / "family", prefix(bucket))
        recipe = Path(root) / "recipe.json"
        models = [{"model": f"{place}/model{number}"} for number in range(1, options.models + 1)]
        recipe.write_text(
            json.dumps({"merge_method": "geometric_median", "base_model": f"{place}/model0", "models": models})
        )
        with _slow_way() if options.slow else nullcontext():
            for _ in range(options.rounds):
                for reader in readers:
                    command = [sys.executable, "-m", "tests.benchmarks.remote_reader", reader, str(recipe)]
                    done = subprocess.run([*command, options.memory], capture_output=True, text=True, check=True)
                    rates[reader].append(json.loads(done.stdout))
    Console(width=120).print(_table(rates))


def _table(rates: dict[str, list[dict[str, float]]]) -> Table:
    """Return medians over the rounds; ratios are taken within a round, to the faster plain reader."""
    best = [max(pair, key=lambda run: run["rate"]) for pair in zip(rates["plain 8"], rates["plain 32"], strict=True)]
    table = Table(title="reading from S3, medians")
    for heading in ("reader", "MB/s", "of the fastest plain", "CPU s/GB", "peak MB"):
        table.add_column(heading, justify="left" if heading == "reader" else "right")
    for reader, runs in rates.items():
        ratios = [run["rate"] / plain["rate"] for run, plain in zip(runs, best, strict=True)]
        figures = [median(run[key] for run in runs) for key in ("rate", "cpu_s_per_gb", "peak_mb")]
        table.add_row(reader, f"{figures[0]:.0f}", f"{median(ratios):.2f}", f"{figures[1]:.1f}", f"{figures[2]:.0f}")
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
