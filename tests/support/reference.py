"""The merge done the plain way: everything in memory, float64, a general-purpose minimizer for the median."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

Weights = Mapping[str, torch.Tensor]


def dense_median(points_NE: np.ndarray, weights_N: Sequence[float]) -> np.ndarray:
    """The geometric median of dense points: Weiszfeld with the vertex test, many iterations, no distance matrix.

    Returns:
        Coefficients (N,), for points in general position.
    """
    weights = np.asarray(weights_N, dtype=np.float64)
    for k in range(len(points_NE)):
        steps = np.delete(points_NE - points_NE[k], k, axis=0)
        lengths = np.linalg.norm(steps, axis=1)
        pull = (np.delete(weights, k)[:, None] * steps / lengths[:, None]).sum(axis=0)
        if np.linalg.norm(pull) <= weights[k]:
            return np.eye(len(points_NE))[k]
    coefficients = weights / weights.sum()
    for _ in range(20_000):
        distances = np.linalg.norm(points_NE - coefficients @ points_NE, axis=1)
        rates = weights / distances
        following = rates / rates.sum()
        if np.abs(following - coefficients).max() < 1e-15:
            return following
        coefficients = following
    return coefficients


def flatten(weights: Weights, names: Sequence[str]) -> np.ndarray:
    """The named tensors of one model as one float64 vector."""
    return torch.cat([weights[name].to(torch.float64).flatten() for name in names]).numpy()


def reference_median(
    models: Sequence[Weights],
    weights: Sequence[float],
    group_of: Callable[[str], str],
    dtype: torch.dtype,
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Merged tensors in `dtype` and coefficients by group."""
    groups: dict[str, list[str]] = {}
    for name in models[0]:
        groups.setdefault(group_of(name), []).append(name)
    merged, found = {}, {}
    for group, names in groups.items():
        coefficients = dense_median(np.stack([flatten(model, names) for model in models]), weights)
        found[group] = coefficients
        for name in names:
            exact = sum(c * model[name].to(torch.float64) for c, model in zip(coefficients, models, strict=True))
            merged[name] = exact.to(dtype)
    return merged, found


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of everything that makes the checkpoint: weights, index, configuration, tokenizer."""
    skipped = {"geomerge_report.json", "README.md"}
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in skipped
    }


def assert_within_rounding(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], ulps: int = 1
) -> None:
    """Equal names, shapes and dtypes, and values at most `ulps` neighbours apart, or 1e-12 where terms cancel."""
    assert set(found) == set(wanted)
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        assert value.shape == wanted[name].shape, name
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
        apart = (value.view(bits).to(torch.float64) - wanted[name].view(bits).to(torch.float64)).abs()
        same_sign = torch.sign(value) == torch.sign(wanted[name])
        close = same_sign & (apart <= ulps) | ((value.double() - wanted[name].double()).abs() < 1e-12)
        assert bool(close.all()), f"{name}: {int((~close).sum())} of {value.numel()} elements differ"
