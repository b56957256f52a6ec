"""The parts of the rehearsal, each run in a process of its own.

    python -m tests.benchmarks.rehearsal_parts RESULT PART ARGUMENT…

Owns what is run and measured inside a process; `tests.benchmarks.rehearsal` runs them and tells. Each leaves JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from pipeline.engine.executors.local import LocalExecutor
from pipeline.engine.process import peak_memory_bytes, single_threaded_products
from pipeline.engine.solutions import Solution
from pipeline.engine.worker import Job, ShardWorker
from pipeline.merging import Resources, load_recipe, plan_merge
from pipeline.planning.memory import Memory, project_memory
from pipeline.planning.plan import Plan
from pipeline.storage import open_store
from tests.support.llama import llama_family
from tests.support.sparse import save_sparse

# Of every run so much is left aside: first use of code and buffers, and chunks being kept until their room is full.
_WARM_SHARE = 0.25
# A tensor of four chunks takes 75 MB in 9 models: enough to leave the processor's caches, as chunks of a 70B do.
_VALUES_TENSORS = {f"model.layers.{layer}.mlp.up_proj.weight": (1024, 4096) for layer in range(4)}
_MODELS = 8
# As large as one model's part of a chunk.
_READ_BYTES = 2 << 20
# The share of free memory below which the page cache reuses its own pages.
_FULL = 0.04


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The process at one moment of a run."""

    time_s: float
    user_s: float
    system_s: float
    resident_bytes: int
    done_bytes: int


def _sample(done_bytes: int) -> Sample:
    times = os.times()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        time_s=time.perf_counter(),
        user_s=times.user,
        system_s=times.system,
        resident_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        done_bytes=done_bytes,
    )


def family(folder: str, size: str, file_size: str) -> dict[str, Any]:
    """Make the family; the recipe says how large output files are."""
    started = time.perf_counter()
    llama_family(Path(folder), "8B" if size == "8B" else "70B", _MODELS, pipeline={"file_size": file_size})
    places = [file.stat() for file in Path(folder).glob("*/*.safetensors")]
    return {
        "seconds": time.perf_counter() - started,
        "files": len(places),
        "apparent_bytes": sum(place.st_size for place in places),
        "disk_bytes": sum(place.st_blocks * 512 for place in places),
    }


def measure(recipe: str, threads: str, memory_bytes: str, seconds: str, skipped: str) -> dict[str, Any]:
    """Run the measuring pass on file after file of the plan until the time is up; sample memory and progress.

    A share of the files is skipped, so that a second run does not find what the first one left in the page cache.
    """
    with tempfile.TemporaryDirectory(prefix="geomerge-rehearsal-") as output:
        plan, memory = _planned(recipe, output, int(memory_bytes), int(threads))
        executor = LocalExecutor()
        samples: list[Sample] = []

        def sample(done_bytes: int) -> None:
            samples.append(_sample(done_bytes))

        # The first file holds the embedding alone where files are small: it comes last.
        first = 1 + int(float(skipped) * len(plan.files))
        files = [*range(first, len(plan.files)), *range(first)]
        executor.start(Job(plan=plan, output_url=output, memory=memory, device="cpu"), [files])
        try:
            sample(0)
            measured = 0
            for file in files:
                for _ in executor.map("measure", {file: ()}, sample):
                    measured += 1
                if samples[-1].time_s - samples[0].time_s > float(seconds):
                    break
            usage = executor.usage()
        finally:
            executor.close()
    return {**_figures(samples), "files": measured, "of_files": len(plan.files), "threads": int(threads)} | {
        "projected_bytes": memory.total_bytes,
        "retained_bytes": memory.retained_bytes,
        "peak_bytes": max(usage.peak_memory_bytes.values()),
    }


def write(recipe: str, seconds: str, room_bytes: str) -> dict[str, Any]:
    """Run the writing pass on files of the plan in one thread, every input read again, until the time is up."""
    wall_s = cpu_s = 0.0
    written = read = files = 0
    with tempfile.TemporaryDirectory(prefix="geomerge-rehearsal-") as output:
        plan, memory = _planned(recipe, output, 1_500_000_000, 1)
        worker = ShardWorker(
            Job(plan=plan, output_url=output, memory=dataclasses.replace(memory, retained_bytes=0), device="cpu")
        )
        even = _even(plan)
        try:
            with single_threaded_products():
                for file, layout in enumerate(plan.files):
                    if layout.size_bytes > int(room_bytes):
                        continue
                    worker.measure(file)
                    before, started, cpu = worker.traffic()[0], time.perf_counter(), time.process_time()
                    record = worker.write(file, {0: even})
                    if files:
                        wall_s += time.perf_counter() - started
                        cpu_s += time.process_time() - cpu
                        read += worker.traffic()[0] - before
                        written += record.size_bytes
                    files += 1
                    (Path(output) / record.name).unlink()
                    if wall_s > float(seconds):
                        break
        finally:
            worker.close()
    return {"files": files, "wall_s": wall_s, "cpu_s": cpu_s, "read_bytes": read, "written_bytes": written}


def read(recipe: str, seconds: str, fill_s: str) -> dict[str, Any]:
    """Read the inputs and do nothing with them, in one thread, from the end: holes that are in no cache.

    Before it is timed, the page cache is filled as far as time allows: a virtual machine may get memory that it has not
    used lately from its host page by page, which takes several times longer than reading.
    """
    folder = Path(recipe).parent
    paths = iter(sorted(folder.glob("*/*.safetensors"), key=lambda path: path.name, reverse=True))
    full_s = time.perf_counter() + float(fill_s)
    filled = _read_files(paths, lambda: _free_share() < _FULL or time.perf_counter() > full_s)
    started, cpu = time.perf_counter(), time.process_time()
    done = _read_files(paths, lambda: time.perf_counter() > started + float(seconds))
    found = {"bytes": done, "wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
    return {**found, "filled_bytes": filled, "free_share": _free_share()}


def values(folder: str, rounds: str) -> dict[str, Any]:
    """Compare zeros of sparse files with random values, both in the page cache: CPU seconds a GB of the same worker."""
    root = Path(folder)
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in _VALUES_TENSORS.items()}
    recipes = {}
    for kind in ("zeros", "random"):
        names = ["base", *(f"expert{number}" for number in range(_MODELS))]
        for name in names:
            place = save_sparse(root / kind / name, _VALUES_TENSORS)
            if kind == "random":
                step = 0.0 if name == "base" else 0.002
                tensors = {
                    key: (value + step * torch.randn(value.shape, generator=generator)).bfloat16()
                    for key, value in base.items()
                }
                save_file(tensors, place / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
        recipes[kind] = root / kind / "recipe.yaml"
        entries = [{"model": str(root / kind / name)} for name in names]
        document = {"merge_method": "geometric_median", "base_model": entries[0]["model"], "models": entries[1:]}
        recipes[kind].write_text(json.dumps(document))
    runs: dict[str, list[float]] = {kind: [] for kind in recipes}
    workers = {kind: _worker(recipe, root / kind / "out") for kind, recipe in recipes.items()}
    with single_threaded_products():
        for number in range(int(rounds) + 1):
            for kind, worker in workers.items():
                before, cpu = worker.done_bytes, time.process_time()
                worker.measure(0)
                # The first round brings the files into the cache.
                if number:
                    runs[kind].append((time.process_time() - cpu) / (worker.done_bytes - before) * 1e9)
    for worker in workers.values():
        worker.close()
    ratios = [zeros / random for zeros, random in zip(runs["zeros"], runs["random"], strict=True)]
    return {
        **{f"{kind}_cpu_s_per_gb": median(found) for kind, found in runs.items()},
        "zeros_by_random": median(ratios),
        "ratios": ratios,
    }


def _read_files(paths: Iterator[Path], enough: Callable[[], bool]) -> int:
    """Read files until it is enough; return how many bytes."""
    buffer = memoryview(bytearray(_READ_BYTES))
    total = 0
    while not enough() and (path := next(paths, None)) is not None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while not enough() and (size := os.preadv(descriptor, [buffer], done)):
                done += size
        finally:
            os.close(descriptor)
        total += done
    return total


def _free_share() -> float:
    """Return the share of memory that nothing uses, not even as a cache."""
    lines = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemFree:"]) / int(lines["MemTotal:"])


def _worker(recipe: Path, output: Path) -> ShardWorker:
    plan, memory = _planned(str(recipe), str(output), 1_500_000_000, 1)
    memory = dataclasses.replace(memory, retained_bytes=0)
    return ShardWorker(Job(plan=plan, output_url=str(output), memory=memory, device="cpu"))


def _planned(recipe: str, output: str, memory_bytes: int, threads: int) -> tuple[Plan, Memory]:
    resources = Resources(workers=1, memory_bytes=memory_bytes, executor="local")
    plan = plan_merge(load_recipe(recipe)[0], open_store(output), resources, probe=False).plan
    return plan, project_memory(plan, budget_bytes=memory_bytes, threads=threads)


def _even(plan: Plan) -> Solution:
    share = 1.0 / len(plan.models)
    return Solution(
        group=0,
        factors=(0.0,) * plan.offset + (share,) * len(plan.models),
        coefficients=(share,) * len(plan.models),
        scale=1.0,
        median=None,
        distances=np.zeros((0, 0)),
    )


def _figures(samples: list[Sample]) -> dict[str, Any]:
    """Return rates and the memory's slope after the warm-up, and up to 200 samples of all."""
    begun_s, end_s = samples[0].time_s, samples[-1].time_s
    warm = [sample for sample in samples if sample.time_s >= begun_s + _WARM_SHARE * (end_s - begun_s)]
    first, last = warm[0], warm[-1]
    times = np.array([sample.time_s for sample in warm]) - begun_s
    resident = np.array([sample.resident_bytes for sample in warm], dtype=np.float64)
    slope = float(np.polyfit(times, resident, 1)[0]) if len(warm) > 2 else 0.0
    done, wall_s = last.done_bytes - first.done_bytes, last.time_s - first.time_s
    user_s, system_s = last.user_s - first.user_s, last.system_s - first.system_s
    every = -(-len(samples) // 200)
    return {
        "wall_s": end_s - begun_s,
        "bytes": samples[-1].done_bytes,
        "bytes_per_s": done / wall_s,
        "bytes_per_cpu_s": done / (user_s + system_s),
        "user_s_per_gb": user_s / done * 1e9,
        "system_s_per_gb": system_s / done * 1e9,
        "resident_slope_bytes_per_s": slope,
        "resident_slope_bytes_per_gb": slope * wall_s / done * 1e9,
        "resident_range_bytes": [int(resident.min()), int(resident.max())],
        "samples": [[round(s.time_s - begun_s, 2), s.resident_bytes, s.done_bytes] for s in samples[::every]],
    }


PARTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "family": family,
    "measure": measure,
    "write": write,
    "read": read,
    "values": values,
}

if __name__ == "__main__":
    result = PARTS[sys.argv[2]](*sys.argv[3:])
    Path(sys.argv[1]).write_text(json.dumps({**result, "process_peak_bytes": peak_memory_bytes()}))
