"""What one call, one wait and one reference of a wait cost a driver of a real Ray, in CPU seconds of its process.

    python -m tests.benchmarks.ray_costs RESULT

Owns the measurement behind `tests.benchmarks.simulate`: a Ray of its own on this machine's loopback, one busy actor.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Loopback only, with a token of its own: nothing outside this machine can reach it.
os.environ.update(
    {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
)

import ray

_CALLS = 2000
_PENDING = (16, 128, 1024)
_WAITS = 50


class _Actor:
    """Answers small questions, or sleeps and lets the calls behind it wait."""

    def answer(self, value: tuple[int, ...]) -> tuple[int, ...]:
        return value

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def measure() -> dict[str, Any]:
    """Return CPU microseconds of the driver's process for a call with its answer, and for waiting for many."""
    actor: Any = ray.remote(_Actor).options(num_cpus=0).remote()
    argument = tuple(range(8))
    ray.get([actor.answer.remote(argument) for _ in range(_CALLS // 10)])
    cpu = time.process_time()
    ray.get([actor.answer.remote(argument) for _ in range(_CALLS)])
    call_us = (time.process_time() - cpu) / _CALLS * 1e6
    wait_us = {}
    for pending in _PENDING:
        actor.sleep.remote(5.0)
        references = [actor.answer.remote(argument) for _ in range(pending)]
        time.sleep(1.0)
        started = time.thread_time()
        for _ in range(_WAITS):
            done, _ = ray.wait(references, num_returns=1, timeout=0)
            if done:
                raise RuntimeError("what was to wait was answered")
        wait_us[pending] = (time.thread_time() - started) / _WAITS * 1e6
        ray.get(references)
    low, high = _PENDING[0], _PENDING[-1]
    reference_us = (wait_us[high] - wait_us[low]) / (high - low)
    return {
        "call_us": call_us,
        "wait_us": wait_us,
        "reference_us": reference_us,
        "wait_base_us": max(0.0, wait_us[low] - low * reference_us),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="geomerge-ray-", dir="/tmp") as folder:
        ray.init(
            address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
            object_store_memory=100_000_000,
        )  # fmt: skip
        try:
            found = measure()
        finally:
            ray.shutdown()
    Path(sys.argv[1]).write_text(json.dumps(found))
