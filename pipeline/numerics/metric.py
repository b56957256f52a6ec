"""Distances in a metric of second moments: differences scaled, or multiplied by a factor, before they are measured.

Owns the arithmetic of both metrics on one chunk, in float64, on any device torch knows; importing this module imports
torch. Must not know files or plans. With a diagonal F the squared length of a difference d is Σ F_k d_k²; with a Gram A
of a matrix's inputs it is tr(D A Dᵀ) = ‖D L‖², A = L Lᵀ, of the difference D as rows × columns. Legend: P points,
E elements of a chunk (of whole rows, for a Gram), D columns of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.numerics.dtypes import widen
from pipeline.numerics.torch_dtypes import tensor_over

# Storing a Gram in float32 moves its eigenvalues by about so much of its largest entry.
_FIRST_SHIFT = 2.0**-24
# From one shift to the next; few are ever tried.
_SHIFT_STEP = 16.0
# A matrix that needs more than this share of its largest entry was never a mean of outer products.
_LARGEST_SHIFT = 1e-3


class IndefiniteError(ValueError):
    """A matrix has eigenvalues so far below zero that it is no Gram."""


class Metric(Protocol):
    """A linear map whose image's Euclidean length is the length in the metric."""

    def image(self, differences_E: torch.Tensor) -> torch.Tensor:
        """Return the image of a difference, float64 of shape (E,); the argument may be overwritten."""


@dataclass(frozen=True, slots=True, eq=False)
class DiagonalMetric:
    """Elements count by their own factor.

    Attributes:
        roots_E: Square roots of the diagonal, float64.
    """

    roots_E: torch.Tensor

    def image(self, differences_E: torch.Tensor) -> torch.Tensor:
        """See `Metric`."""
        return differences_E.mul_(self.roots_E)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class GramMetric:
    """Rows count by the moments of what they are multiplied with.

    Attributes:
        factor_DD: Lower triangle L, float64.
        shift: What was added to the Gram's diagonal to make it definite, as a share of its largest entry.
    """

    factor_DD: torch.Tensor
    shift: float

    def image(self, differences_E: torch.Tensor) -> torch.Tensor:
        """See `Metric`."""
        return (differences_E.view(-1, len(self.factor_DD)) @ self.factor_DD).view(-1)


def diagonal_metric(diagonal_E: np.ndarray, device: str) -> DiagonalMetric:
    """Return the metric of a chunk's part of a diagonal.

    Args:
        diagonal_E: Finite and nowhere negative, of any float dtype.
        device: torch's name.
    """
    return DiagonalMetric(torch.from_numpy(np.sqrt(diagonal_E, dtype=np.float64)).to(device))


def gram_metric(gram_DD: torch.Tensor) -> GramMetric:
    """Return the metric of a Gram.

    Where it is singular, or rounding has made it slightly indefinite, the smallest shift of a fixed ladder is added to
    its diagonal: such directions then count a hundred-millionth instead of nothing, and no squared length is negative.

    Args:
        gram_DD: Symmetric, float64, finite; overwritten.

    Raises:
        IndefiniteError: No small shift makes it definite.
    """
    largest = float(gram_DD.diagonal().max()) if len(gram_DD) else 0.0
    if largest <= 0.0:
        if bool((gram_DD != 0).any()):
            raise IndefiniteError("its diagonal is zero, its other entries are not")
        return GramMetric(gram_DD, 0.0)
    shift = 0.0
    while True:
        factor_DD, failed = torch.linalg.cholesky_ex(gram_DD)
        if not int(failed):
            return GramMetric(factor_DD, shift)
        before, shift = shift, shift * _SHIFT_STEP or _FIRST_SHIFT
        if shift > _LARGEST_SHIFT:
            raise IndefiniteError(
                f"it has eigenvalues below {-before * largest:.3g}, and its largest entry is {largest:.3g}"
            )
        gram_DD.diagonal().add_((shift - before) * largest)


def images(points: Sequence[Any], metric: Metric) -> tuple[list[Any], np.ndarray]:
    """Return points whose Euclidean distances are the points' distances in the metric, and counts.

    Differences are formed before they are mapped, so that nothing of them is lost beside large values.

    Args:
        points: P arrays, or tensors of the metric's device, of shape (E,) and any float dtype.
        metric: The chunk's.

    Returns:
        P arrays or tensors as the points are, float64, the first zero; and how many elements of each equal the first's.
    """
    first_E = _double(points[0])
    found, unchanged_P = [], np.zeros(len(points), dtype=np.int64)
    for row, point in enumerate(points):
        differences_E = _double(point) - first_E
        unchanged_P[row] = int((differences_E == 0).sum())
        found.append(metric.image(differences_E))
    return (found if isinstance(points[0], torch.Tensor) else [image_E.numpy() for image_E in found]), unchanged_P


def written_distances(
    values_E: Any, points: Sequence[Any], factors_P: Sequence[float], metric: Metric
) -> tuple[np.ndarray, float]:
    """Return how far written values lie from the points and from the exact combination, squared, in the metric.

    The distance from the exact values is ‖Σ c_p (x_p − written)‖: the factors sum to 1.

    Args:
        values_E: What is written, an array or a tensor as the points are.
        points: P arrays or tensors of shape (E,).
        factors_P: c, one a point.
        metric: The chunk's.
    """
    written_E = _double(values_E)
    squared_P = np.zeros(len(points))
    error_E: torch.Tensor | None = None
    for row, (point, factor) in enumerate(zip(points, factors_P, strict=True)):
        image_E = metric.image(_double(point) - written_E)
        squared_P[row] = float(image_E.square().sum())
        image_E *= factor
        error_E = image_E if error_E is None else error_E.add_(image_E)
    return squared_P, 0.0 if error_E is None else float(error_E.square().sum())


def _double(values_E: Any) -> torch.Tensor:
    """Return values in float64; what is subtracted from it is new memory, so it may be the values' own."""
    if isinstance(values_E, torch.Tensor):
        return values_E.to(torch.float64)
    return tensor_over(np.ascontiguousarray(widen(values_E, np.dtype(np.float64))))
