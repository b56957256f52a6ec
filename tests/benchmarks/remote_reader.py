"""One reader of a family in object storage; prints its rate as JSON.

    python -m tests.benchmarks.remote_reader "plain 8"|"plain 32"|"one by one"|"read ahead" RECIPE MEMORY

Owns the readers: s3fs alone with so many ranges in flight, or a worker's measuring pass with and without read-ahead.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.engine.process import peak_memory_bytes
from pipeline.engine.worker import Job, ShardWorker
from pipeline.merging import Resources, load_recipe, plan_merge
from pipeline.storage import open_store
from pipeline.units import parse_bytes

# What s3fs and other readers are fastest with.
_PIECE_BYTES = 8 << 20


def main(reader: str, recipe: str, memory: str) -> None:
    """Read everything and print the figures."""
    read = _plain(recipe, int(reader.split()[1])) if reader.startswith("plain") else _ours(reader, recipe, memory)
    begun, cpu = time.perf_counter(), time.process_time()
    read_bytes = read()
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    figures = {
        "rate": read_bytes / seconds / 1e6,
        "cpu_s_per_gb": cpu_s / read_bytes * 1e9,
        "peak_mb": peak_memory_bytes() / 1e6,
    }
    print(json.dumps(figures))


def _plain(recipe: str, at_once: int) -> Callable[[], int]:
    """Return a reader by s3fs alone: so many pieces in flight, each dropped as it comes."""
    import s3fs

    document = json.loads(Path(recipe).read_text())
    places = [document["base_model"], *(entry["model"] for entry in document["models"])]
    system = s3fs.S3FileSystem(config_kwargs={"max_pool_connections": 64})
    files = [f"{place}/model.safetensors" for place in places]
    sizes = {file: system.info(file)["size"] for file in files}
    pieces = [
        (file, start, min(start + _PIECE_BYTES, size))
        for file, size in sizes.items()
        for start in range(0, size, _PIECE_BYTES)
    ]

    def read() -> int:
        total = 0
        for begin in range(0, len(pieces), at_once):
            paths, starts, stops = zip(*pieces[begin : begin + at_once], strict=True)
            total += sum(map(len, system.cat_ranges(list(paths), list(starts), list(stops))))
        return total

    return read


def _ours(reader: str, recipe: str, memory: str) -> Callable[[], int]:
    """Return the measuring pass of one worker, its loops compiled by a first chunk."""
    output = tempfile.mkdtemp(prefix="geomerge-remote-out-")
    resources = Resources(workers=1, memory_bytes=parse_bytes(memory))
    planned = plan_merge(load_recipe(recipe)[0], open_store(output), resources, probe=False)
    # Kept chunks are fresh memory, which costs the same in both: what is compared is reading.
    projected = dataclasses.replace(planned.memory, retained_bytes=0)
    if reader == "one by one":
        projected = dataclasses.replace(projected, requests=0, ahead_bytes=0)
    worker = ShardWorker(Job(plan=planned.plan, output_url=output, memory=projected, device="cpu"))
    list(worker.measured(planned.plan.chunks(0)[:1]))
    before = worker.traffic()[0]

    def read() -> int:
        for file in range(len(planned.plan.files)):
            worker.measure(file)
        return worker.traffic()[0] - before

    return read


if __name__ == "__main__":
    main(*sys.argv[1:4])
