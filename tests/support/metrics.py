"""Statistics on disk that make metrics of small families, and what they mean for dense vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from pipeline.checkpoints.statistics_facts import StatisticsFacts
from pipeline.checkpoints.statistics_writer import StatisticsWriter
from pipeline.storage import open_store

FACTS = StatisticsFacts(
    model="experts", data="data", examples=10, tokens=100, reduction="mean", labels="none", normalisation="tokens"
)
Shapes = Mapping[str, tuple[int, ...]]


def random_grams(shapes: Shapes, seed: int = 0, *, rank: int | None = None) -> dict[str, np.ndarray]:
    """A float32 Gram of the inputs of every matrix of blocks, of some tokens of unequal features."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and ".layers." in name:
            rows = rng.standard_normal((rank or 2 * shape[1], shape[1])) * rng.uniform(0.1, 3, shape[1])
            found[name] = (rows.T @ rows / len(rows)).astype(np.float32)
    return found


def random_diagonals(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """A float32 diagonal of every tensor, a part of it zero."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.lognormal(0, 2, shape) * (rng.random(shape) > 0.1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def save_metric(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    kind: str,
    *,
    outside: Mapping[str, str] | None = None,
    share: Mapping[str, str] | None = None,
) -> Path:
    """Write statistics of one kind, those that are shared without an array of their own."""
    writer = StatisticsWriter(open_store(str(folder)), FACTS)
    for name, array in arrays.items():
        if name not in (share or {}):
            writer.add(kind, name, np.ascontiguousarray(array))  # type: ignore[arg-type]
    for name, stored in (share or {}).items():
        writer.share(kind, name, stored)  # type: ignore[arg-type]
    for name, reason in (outside or {}).items():
        writer.outside(name, reason)
    writer.finish()
    return folder


def gram_root(gram: np.ndarray) -> np.ndarray:
    """The symmetric square root, by the eigenvalues."""
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


def by_grams(grams: Mapping[str, np.ndarray]) -> Callable[[str, torch.Tensor], np.ndarray]:
    """Map a tensor so that Euclidean distances of what it becomes are those of its Gram; nothing without one."""
    roots = {name: gram_root(gram) for name, gram in grams.items()}
    return lambda name, value: (
        np.asarray(value.double().numpy() @ roots[name]).ravel() if name in roots else np.zeros(0)
    )


def by_diagonals(diagonals: Mapping[str, np.ndarray]) -> Callable[[str, torch.Tensor], np.ndarray]:
    """The same of diagonals."""
    return lambda name, value: (
        (value.double().numpy() * np.sqrt(diagonals[name].astype(np.float64))).ravel()
        if name in diagonals
        else np.zeros(0)
    )
