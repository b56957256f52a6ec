"""What is made of statistics: one diagonal for a whole family, and weights that make K-FAC pairs of one size."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from pipeline.checkpoints.statistics import Statistics, open_statistics, triangle_row, triangle_size
from pipeline.checkpoints.statistics_writer import StatisticsWriter
from pipeline.storage import open_store


def write_mean_fisher(sources: Sequence[Path], output: Path) -> None:
    """Write the mean of diagonal Fishers, each first divided by its sum, so that every task counts alike.

    Args:
        sources: Folders of statistics with diagonals.
        output: A folder; what is complete there is kept.
    """
    if (output / "statistics.json").is_file():
        return
    shutil.rmtree(output, ignore_errors=True)
    opened = [open_statistics(str(source)) for source in sources]
    # A head differs from task to task; only what all have can be averaged.
    names = [name for name in opened[0].parameters("diagonal") if all(_fits(one, name, opened[0]) for one in opened)]
    loaded = [_diagonals(one, source) for one, source in zip(opened, sources, strict=True)]
    totals = [sum(float(diagonals[name].sum()) for name in names) for diagonals in loaded]
    # Every fact that is of one task alone is said once for all.
    facts = dataclasses.replace(opened[0].facts, model="mean of experts", data="every expert's own task")
    output.mkdir(parents=True)
    writer = StatisticsWriter(open_store(str(output), None), facts)
    for name in names:
        mean = sum(diagonals[name] / total for diagonals, total in zip(loaded, totals, strict=True)) / len(loaded)
        writer.add("diagonal", name, np.ascontiguousarray(mean, dtype=np.float64))
    for name, reason in opened[0].reasons.items():
        writer.outside(name, reason)
    writer.finish()


def equal_weights(sources: Sequence[Path]) -> tuple[float, ...]:
    """Return one factor a model, after which the gradients' Grams of all have the same sum of traces.

    Args:
        sources: Folders of K-FAC statistics.
    """
    totals = []
    for source in sources:
        opened = open_statistics(str(source))
        tensors = {name: array for file in opened.files for name, array in load_file(source / file.path).items()}
        # A head is of one task alone.
        names = [name for name in opened.parameters("output_gram") if not name.startswith(("classifier", "score"))]
        totals.append(sum(_trace(tensors[f"output_gram:{name}"]) for name in names))
    return tuple(min(totals) / total for total in totals)


def _trace(triangle: NDArray[np.float32]) -> float:
    size = triangle_size(triangle.size)
    assert size is not None
    return float(sum(float(triangle[triangle_row(size, row)]) for row in range(size)))


def _fits(one: Statistics, name: str, first: Statistics) -> bool:
    found, wanted = one.find("diagonal", name), first.find("diagonal", name)
    return found is not None and wanted is not None and found.shape == wanted.shape


def _diagonals(one: Statistics, folder: Path) -> dict[str, NDArray[np.float64]]:
    tensors = {name: array for file in one.files for name, array in load_file(folder / file.path).items()}
    found = {}
    for name in one.parameters("diagonal"):
        stored = f"diagonal:{name}"
        found[name] = tensors[one.shared.get(stored, stored)].astype(np.float64)
    return found
