"""The medians alone, from factors: what `dense_median` times, done our way, with the same clock.

    python -m tests.benchmarks.factor_median RESULT ADAPTER…

Owns the loop: every matrix's distances from its factors and its solution, a thread a core; then the same for the sum of
all tables, the full vector. What it reads and imports is not timed.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open

from pipeline.engine.process import cores, single_threaded_products
from pipeline.numerics.exact_sum import exact_column_sums
from pipeline.numerics.geometric_median import solve_geometric_median
from pipeline.numerics.low_rank.distances import pairwise_low_rank
from pipeline.numerics.low_rank.factors import LowRank
from tests.support.adapters import ADAPTER_CONFIG, ADAPTER_FILE


def measure(adapters: list[Path]) -> dict[str, float]:
    """Return the seconds of all matrices' medians, and of the full vector's."""
    files = [safe_open(folder / ADAPTER_FILE, "pt") for folder in adapters]
    configs = [json.loads((folder / ADAPTER_CONFIG).read_text()) for folder in adapters]
    names = [name for name in files[0].keys() if ".lora_A." in name]  # noqa: SIM118 - safe_open is no mapping
    families = [
        [
            LowRank(
                left_MR=file.get_tensor(name.replace(".lora_A.", ".lora_B.")),
                right_RK=file.get_tensor(name),
                scale=config["lora_alpha"] / config["r"],
            )
            for file, config in zip(files, configs, strict=True)
        ]
        for name in names
    ]
    weights = [1.0] * len(adapters)
    with single_threaded_products(), ThreadPoolExecutor(cores()) as pool:
        pairwise_low_rank(families[0])  # the libraries' own start
        started = time.perf_counter()
        tables = list(pool.map(pairwise_low_rank, families))
        measured = time.perf_counter()
        for table_NN in tables:
            solve_geometric_median(table_NN, weights, tolerance=1e-10)
        each = time.perf_counter()
        total_NN = exact_column_sums([table.ravel() for table in tables]).reshape(len(adapters), -1)
        solve_geometric_median(total_NN, weights, tolerance=1e-10)
        whole = time.perf_counter()
    return {"matrices": len(names), "each_s": each - started, "whole_s": (measured - started) + (whole - each)}


if __name__ == "__main__":
    torch.manual_seed(0)
    Path(sys.argv[1]).write_text(json.dumps(measure([Path(name) for name in sys.argv[2:]])))
