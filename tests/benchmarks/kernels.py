"""How fast one core measures and combines points: GB/s of input, against copying the same bytes.

    python -m tests.benchmarks.kernels [--dtype bfloat16] [--rounds 7] [MODELS …]

Owns the arithmetic alone: no files, no threads. Points lie in memory (2 Mi elements each), or pass again and again
through the cache (128 Ki elements each). Kernels and copies take turns within a round; of each, the fastest counts, by
the thread's own processor time, so that a busy machine changes little.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

from pipeline.numerics import compiled

_ELEMENTS = {"memory": 1 << 21, "cache": 1 << 17}
# A round works through so many elements of each point.
_ROUND = 1 << 21
_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("bfloat16", "float16", "float32", "float64")}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=int, default=[2, 4, 8, 16, 32])
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(f"{arguments.dtype}: GB/s of n models and their base, one core; in brackets as a share of copying")
    print("first use of a process, s of processor time: " + ", ".join(_first_use(n) for n in (2, 8, 32)))
    for where, elements in _ELEMENTS.items():
        print(f"{where:>8}      copy       gram            combine")
        for models in arguments.models:
            copy, *kernels = rates(models, elements, _DTYPES[arguments.dtype], arguments.rounds)
            shares = "  ".join(f"{rate:6.2f} ({rate / copy:4.2f})" for rate in kernels)
            print(f"   n = {models:2d}  {copy:6.2f}  {shares}", flush=True)


def rates(models: int, elements: int, dtype: np.dtype, rounds: int) -> list[float]:
    """GB/s of input of a copy, of the products and of the combination."""
    points = _points(models + 1, elements, dtype)
    addresses = np.array([point.ctypes.data for point in points], dtype=np.int64)
    target, values = np.empty_like(points[0]), np.empty_like(points[0])
    factors = np.linspace(0.0, 1.0, len(points))
    factors /= factors.sum()

    def copy() -> None:
        for point in points:
            np.copyto(target, point)

    def gram() -> None:
        products, unchanged = np.zeros((len(points), len(points))), np.zeros(len(points), dtype=np.int64)
        compiled.gram(addresses, points[0], elements, 0, products, unchanged)

    def combine() -> None:
        compiled.combine(addresses, points[0], factors, models, 1.0, values, np.zeros(len(points)))

    repeats = max(1, _ROUND // elements)
    nbytes = len(points) * points[0].nbytes * repeats
    best = [float("inf")] * 3
    for _ in range(rounds + 1):  # the first one compiles
        for number, work in enumerate((copy, gram, combine)):
            best[number] = min(best[number], _seconds(work, repeats))
    return [nbytes / seconds / 1e9 for seconds in best]


def _points(count: int, elements: int, dtype: np.dtype) -> list[np.ndarray]:
    """A base and models near it."""
    generator = np.random.default_rng(0)
    base = 0.02 * generator.standard_normal(elements, dtype=np.float32)
    moved = (base + 5e-4 * generator.standard_normal(elements, dtype=np.float32) for _ in range(count - 1))
    return [values.astype(dtype) for values in (base, *moved)]


def _seconds(work: Callable[[], None], repeats: int) -> float:
    start = time.thread_time()
    for _ in range(repeats):
        work()
    return time.thread_time() - start


def _first_use(models: int) -> str:
    """What importing and compiling costs a process that has NumPy already."""
    program = f"""
import time, numpy as np
start = time.thread_time()
from pipeline.numerics import compiled
imported = time.thread_time()
points = np.zeros(({models + 1}, 256), dtype=np.uint16)
addresses = points.ctypes.data + 512 * np.arange({models + 1})
compiled.gram(addresses, points, 256, 0, np.zeros(({models + 1},) * 2), np.zeros({models + 1}, dtype=np.int64))
compiled.combine(addresses, points, np.ones({models + 1}), 0, 1.0, points[0].copy(), np.zeros({models + 1}))
print(f"{{imported - start:.3f}} + {{time.thread_time() - imported:.3f}} (n = {models})")
"""
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
