"""Facts about the process a worker runs in: its peak memory, its threads, its device.

Owns the platform calls.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from pipeline.errors import PipelineError, Problem


def peak_memory_bytes() -> int:
    """Return the largest resident set of this process so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        # Not Linux: ru_maxrss is in bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cores() -> int:
    """Return the processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it may: a family of many shards needs more than the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 1 << 20)
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def single_threaded_products() -> Iterator[None]:
    """Make torch's products single-threaded: a threaded one may split its sums by the number of threads.

    The worker runs several chunks at once instead, so no core idles. The setting is the process's and is put back.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str, worker: int) -> str:
    """Return the torch device of a worker.

    Args:
        name: "auto", "cpu" or "cuda"; "auto" is cuda where torch finds a device.
        worker: Its rank; workers of one process share the devices in turn.

    Raises:
        PipelineError: cuda was asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise PipelineError(
            Problem(what="torch finds no CUDA device here", remedy="use --device cpu, or install a CUDA build of torch")
        )
    return f"cuda:{worker % torch.cuda.device_count()}"
