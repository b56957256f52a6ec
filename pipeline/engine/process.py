"""Facts about the process a worker runs in: its peak memory, its threads, its device.

Owns the platform calls. torch is imported here only where a device or an update of low rank asks for it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import PipelineError, Problem

# What must be there for torch to find a device: NVIDIA's driver, as the CUDA runtime loads it, or AMD's.
_NVIDIA_DRIVER = "libcuda.so.1"
_AMD_DRIVER = Path("/dev/kfd")


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


class _Products:
    """How many want torch's products single-threaded, and what the process had before; torch may come later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: int | None = None

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            self._apply()

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._before is not None:
                import torch

                torch.set_num_threads(self._before)
                self._before = None

    def load(self) -> None:
        """Import torch, under the setting that is wanted."""
        import torch  # noqa: F401

        with self._lock:
            self._apply()

    def _apply(self) -> None:
        if self._users and self._before is None and "torch" in sys.modules:
            # Waits for another thread that is importing it.
            import torch

            self._before = torch.get_num_threads()
            torch.set_num_threads(1)


_products = _Products()


@contextmanager
def single_threaded_products() -> Iterator[None]:
    """Make torch's products single-threaded: a threaded one may split its sums by the number of threads.

    The worker runs several chunks at once instead, so no core idles. The setting is the process's and is put back.
    Holds as well for a torch that `load_torch` imports meanwhile; nothing is imported here.
    """
    _products.enter()
    try:
        yield
    finally:
        _products.leave()


def load_torch() -> None:
    """Import torch, and make its products single-threaded if they are to be."""
    _products.load()


def pick_device(name: str, worker: int) -> str:
    """Return the torch device of a worker; torch is not imported where no device can be.

    Args:
        name: "auto", "cpu" or "cuda"; "auto" is cuda where torch finds a device.
        worker: Its rank; workers of one process share the devices in turn.

    Raises:
        PipelineError: cuda was asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not _has_driver()):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return f"cuda:{worker % torch.cuda.device_count()}"
    if name == "auto":
        return "cpu"
    raise PipelineError(
        Problem(what="torch finds no CUDA device here", remedy="use --device cpu, or install a CUDA build of torch")
    )


def _has_driver() -> bool:
    """Return whether a driver is installed that torch could find a device by."""
    if _AMD_DRIVER.exists():
        return True
    try:
        ctypes.CDLL(_NVIDIA_DRIVER)
    except OSError:
        return False
    return True
