"""Systems with diagonal moments: closed forms, element by element.

Owns the Fisher quotient and the gradient matching of Daheim et al.; must not know files or chunks. All arithmetic is
float64, on differences from one of the points, so that equal models are returned bit for bit. Legend: N models, E
elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagonalSolution:
    """The solution of one range of elements.

    Attributes:
        values_E: float64.
        null_directions: How many elements no diagonal says anything about: they are the weighted average, or, in
            gradient matching, task arithmetic.
    """

    values_E: torch.Tensor
    null_directions: int


def fisher_quotient(
    points: Sequence[torch.Tensor],
    diagonals: Sequence[torch.Tensor],
    weights_N: Sequence[float],
    average_N: Sequence[float] | None = None,
) -> DiagonalSolution:
    """Return Σ λᵢFᵢθᵢ / Σ λᵢFᵢ, and the weighted average where every Fᵢ is zero.

    Every element is scaled by its own largest λᵢFᵢ first: a common factor changes nothing, however small or large.

    Args:
        points: N tensors of shape (E,), any float dtype.
        diagonals: N tensors of shape (E,), float32 or float64, not negative.
        weights_N: λ, positive; a normalisation of the diagonals belongs in here.
        average_N: Weights of the average; λ when absent.

    Returns:
        The quotient.

    Raises:
        ValueError: The numbers of tensors or their shapes differ, or a diagonal is negative or not finite.

    Source:
        Matena & Raffel 2022, Fisher merging.
    """
    _require_alike(points, diagonals, weights_N)
    # By a power of two: the products with the largest finite diagonal are finite.
    unit = math.ldexp(1.0, -math.frexp(max(weights_N))[1])
    factors_N = [weight * unit for weight in weights_N]
    largest_E = torch.zeros(points[0].shape, dtype=torch.float64, device=points[0].device)
    for diagonal_E, factor in zip(diagonals, factors_N, strict=True):
        torch.maximum(largest_E, _checked(diagonal_E).mul_(factor), out=largest_E)
    null_E = largest_E == 0
    largest_E.masked_fill_(null_E, 1.0)
    reference_E = points[0].to(torch.float64)
    shift_E, total_E = torch.zeros_like(largest_E), torch.zeros_like(largest_E)
    for model, point_E in enumerate(points):
        share_E = diagonals[model].to(torch.float64, copy=True).mul_(factors_N[model]).div_(largest_E)
        share_E.masked_fill_(null_E, (average_N or weights_N)[model])
        total_E += share_E
        shift_E += share_E.mul_(point_E.to(torch.float64, copy=True).sub_(reference_E))
    return DiagonalSolution(values_E=_moved(reference_E, shift_E.div_(total_E)), null_directions=int(null_E.sum()))


def gradient_matching(
    points: Sequence[torch.Tensor],
    diagonals: Sequence[torch.Tensor],
    base_E: torch.Tensor,
    base_diagonal_E: torch.Tensor | None,
    weights_N: Sequence[float],
    *,
    sizes_N: Sequence[float],
    base_size: float = 1.0,
    prior: float = 0.0,
) -> DiagonalSolution:
    """Return θ₀ + Σ αₜ H̄⁻¹(H₀ + Hₜ)(θₜ − θ₀) with H̄ = H₀ + Σ αₜHₜ, Hₜ = sₜFₜ and H₀ = s₀F₀ + δ.

    Where H₀ and every Hₜ are zero it is task arithmetic, the limit of a small prior.

    Args:
        points: N tensors of shape (E,), any float dtype.
        diagonals: F of the models: N tensors of shape (E,), float32 or float64, not negative.
        base_E: θ₀.
        base_diagonal_E: F₀; None stands for zeros.
        weights_N: α, of either sign.
        sizes_N: s of the models, positive.
        base_size: s₀.
        prior: δ, not negative.

    Returns:
        The merged elements.

    Raises:
        ValueError: The numbers of tensors or their shapes differ, a diagonal is negative or not finite, or a negative α
            leaves an element with H̄ ≤ 0, where there is no minimum.

    Source:
        Daheim et al. 2024, uncertainty-based gradient matching.
    """
    _require_alike([*points, base_E], [*diagonals, base_E], [*weights_N, 1.0])
    anchor_E = torch.zeros(base_E.shape, dtype=torch.float64, device=base_E.device)
    if base_diagonal_E is not None:
        _require_alike([base_E], [base_diagonal_E], [1.0])
        anchor_E += _checked(base_diagonal_E).mul_(base_size)
    anchor_E += prior
    total_E, null_E = anchor_E.clone(), anchor_E == 0
    for diagonal_E, weight, size in zip(diagonals, weights_N, sizes_N, strict=True):
        hessian_E = _checked(diagonal_E).mul_(size)
        null_E &= hessian_E == 0
        total_E += hessian_E.mul_(weight)
    if bool(((total_E <= 0) & ~null_E).any()):
        place = int(torch.argmin(torch.where(null_E, 1.0, total_E)))
        raise ValueError(f"the weighted sum of the diagonals is {float(total_E[place]):.3g} at element {place}")
    anchor_E.masked_fill_(null_E, 1.0)
    total_E.masked_fill_(null_E, 1.0)
    reference_E = base_E.to(torch.float64)
    shift_E = torch.zeros_like(total_E)
    for point_E, diagonal_E, weight, size in zip(points, diagonals, weights_N, sizes_N, strict=True):
        share_E = diagonal_E.to(torch.float64, copy=True).mul_(size).add_(anchor_E).div_(total_E)
        task_E = point_E.to(torch.float64, copy=True).sub_(reference_E)
        shift_E.add_(share_E.mul_(task_E), alpha=weight)
    return DiagonalSolution(values_E=_moved(reference_E, shift_E), null_directions=int(null_E.sum()))


def _moved(reference_E: torch.Tensor, shift_E: torch.Tensor) -> torch.Tensor:
    """Return the sum; where nothing moved the reference keeps its bits, those of a negative zero too."""
    return torch.where(shift_E == 0, reference_E, reference_E + shift_E)


def _checked(diagonal_E: torch.Tensor) -> torch.Tensor:
    """Return a float64 copy of a diagonal that is fit for use."""
    wide_E = diagonal_E.to(torch.float64, copy=True)
    if not bool(((wide_E >= 0) & (wide_E < torch.inf)).all()):
        raise ValueError("a diagonal has an element that is negative or not finite")
    return wide_E


def _require_alike(
    points: Sequence[torch.Tensor], diagonals: Sequence[torch.Tensor], weights_N: Sequence[float]
) -> None:
    if not points or not len(points) == len(diagonals) == len(weights_N):
        raise ValueError(f"{len(points)} points, {len(diagonals)} diagonals and {len(weights_N)} weights are no system")
    shapes = sorted({tuple(tensor.shape) for tensor in (*points, *diagonals)})
    if len(shapes) > 1:
        raise ValueError(f"points and diagonals must have one shape, not {shapes}")
