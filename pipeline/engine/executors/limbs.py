"""Exact partial sums on their way between workers: one flat array of integers, and one form for equal sums.

Owns the layout; the integers themselves are those of `numerics.exact_sum`. Legend: Q combinations, N models,
K = Q·N + Q·Q sums of a group, L limbs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.numerics.exact_sum import LIMBS, ExactSum

# By group, coefficients (Q × N).
Requests = Mapping[int, np.ndarray]


def add_limbs(totals: dict[int, np.ndarray], partial: Mapping[int, np.ndarray]) -> None:
    """Add one part's limbs to the totals, by group; exact in any order."""
    for group, limbs_KL in partial.items():
        totals[group] = totals[group] + limbs_KL if group in totals else limbs_KL


def pack(requests: Requests, totals: Mapping[int, np.ndarray]) -> np.ndarray:
    """Return all groups' limbs as one array, zeros for a group that has none here."""
    parts = [totals[group].ravel() if group in totals else _zeros(requests[group]).ravel() for group in requests]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def unpack(requests: Requests, flat: np.ndarray) -> dict[int, np.ndarray]:
    """Return the limbs of `pack` by group, the same for equal sums whoever added which parts."""
    result, start = {}, 0
    for group, coefficients in requests.items():
        shape = _zeros(coefficients).shape
        size = shape[0] * shape[1]
        result[group] = canonical(flat[start : start + size].reshape(shape))
        start += size
    return result


def canonical(limbs_KL: np.ndarray) -> np.ndarray:
    """Return the limbs with all carries moved on: sums of the same parts in other portions become equal."""
    return ExactSum.from_limbs(limbs_KL).to_limbs()


def _zeros(coefficients_QN: np.ndarray) -> np.ndarray:
    rows, models = coefficients_QN.shape
    return np.zeros((rows * models + rows * rows, LIMBS), dtype=np.int64)
