"""The plain way to the per-matrix medians of adapters: every update as a dense matrix, Weiszfeld over all of them.

    python -m tests.benchmarks.dense_median RESULT MATRICES [--published] ADAPTER…

Owns that loop and its clock: float32, from the mean, in tensor operations, until a step is one that float32 cannot tell
from none. `--published` does what the published code does: the mean is the sum of a stack of scaled copies, and only a
step shorter than 1e-8 ends the loop, or 300 iterations: which, hangs on whether float32 comes to a standstill.
What it reads and imports is not timed; whatever is done to a matrix from its factors on is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from tests.support.adapters import ADAPTER_CONFIG, ADAPTER_FILE

_LONGEST, _STEP, _NEAREST = 300, 1e-8, 1e-10
# Of the median's norm: a few units in the last place of float32.
_RELATIVE_STEP = 3e-7


def weiszfeld(points_NE: torch.Tensor, *, published: bool) -> tuple[torch.Tensor, int]:
    """Return the median (E,) and the number of iterations."""
    median_E = points_NE.mean(dim=0)
    iterations, step, length = 0, torch.inf, 0.0
    while step >= max(_STEP, 0 if published else _RELATIVE_STEP * length) and iterations < _LONGEST:
        distances_N = torch.stack([torch.dist(point_E, median_E) for point_E in points_NE])
        rates_N = 1 / distances_N.clamp(min=_NEAREST)
        if published:
            scaled_NE = torch.stack([rate * point_E for rate, point_E in zip(rates_N, points_NE, strict=True)])
            following_E = scaled_NE.sum(dim=0) / rates_N.sum()
        else:
            following_E = (rates_N @ points_NE) / rates_N.sum()
        step = float(torch.dist(following_E, median_E))
        median_E, length, iterations = following_E, float(following_E.norm()), iterations + 1
    return median_E, iterations


def measure(adapters: Sequence[Path], matrices: int, *, published: bool) -> list[dict[str, float]]:
    """Return seconds and iterations of the first matrices."""
    files = [safe_open(folder / ADAPTER_FILE, "pt") for folder in adapters]
    configs = [json.loads((folder / ADAPTER_CONFIG).read_text()) for folder in adapters]
    names = [name for name in files[0].keys() if ".lora_A." in name]  # noqa: SIM118 - safe_open is no mapping
    found = []
    for name in names[:matrices]:
        pairs = [
            (file.get_tensor(name.replace(".lora_A.", ".lora_B.")).float(), file.get_tensor(name).float())
            for file in files
        ]
        started = time.perf_counter()
        updates = [
            (config["lora_alpha"] / config["r"]) * (left @ right).flatten()
            for (left, right), config in zip(pairs, configs, strict=True)
        ]
        _, iterations = weiszfeld(torch.stack(updates), published=published)
        found.append({"seconds": time.perf_counter() - started, "iterations": iterations, "of": len(names)})
    return found


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--published"]
    result = measure([Path(word) for word in words[2:]], int(words[1]), published="--published" in sys.argv)
    Path(words[0]).write_text(json.dumps(result))
