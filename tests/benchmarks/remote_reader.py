"""A worker's measuring pass over a family in object storage; prints its rate as JSON.

    python -m tests.benchmarks.remote_reader RECIPE MEMORY

Owns nothing else. Start-up and planning do not count; that buffers are touched for the first time does.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time

from pipeline.engine.process import peak_memory_bytes
from pipeline.engine.worker import Job, ShardWorker
from pipeline.merging import Resources, load_recipe, plan_merge
from pipeline.storage import open_store
from pipeline.units import parse_bytes


def main(recipe: str, memory: str) -> None:
    """Read everything, loops compiled by a first chunk, and print the figures."""
    output = tempfile.mkdtemp(prefix="geomerge-remote-out-")
    resources = Resources(workers=1, memory_bytes=parse_bytes(memory))
    planned = plan_merge(load_recipe(recipe)[0], open_store(output), resources, probe=False)
    # What is compared is reading: kept chunks are fresh memory, which has a cost of its own.
    projected = dataclasses.replace(planned.memory, retained_bytes=0)
    worker = ShardWorker(Job(plan=planned.plan, output_url=output, memory=projected, device="cpu"))
    list(worker.measured(planned.plan.chunks(0)[:1]))
    before = worker.traffic()[0]
    begun, cpu = time.perf_counter(), time.process_time()
    for file in range(len(planned.plan.files)):
        worker.measure(file)
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    read_bytes = worker.traffic()[0] - before
    worker.close()
    figures = {
        "rate": read_bytes / seconds / 1e6,
        "cpu_s_per_gb": cpu_s / read_bytes * 1e9,
        "peak_mb": peak_memory_bytes() / 1e6,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:3])
