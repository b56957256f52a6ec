"""The direct solve of A X = R for one matrix, with a singular A as welcome as any.

Owns the decision which directions A knows nothing about, and the solve on the others; must not know what A is made of.
All arithmetic is float64. Legend: I inputs, O outputs, K null directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Each element of a moment in float32 is off by up to this share of itself.
FLOAT32_ROUNDING = 2.0**-24
# Moments are weighted sums, and were themselves added up: a few times the rounding of what is stored.
_NOISE = 4.0
_EPSILON = torch.finfo(torch.float64).eps
# An eigenvalue below zero by more than this share of the largest is no rounding, whatever the moments were added up in.
_LARGEST_NEGATIVE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSolution:
    """The solution of one system.

    Attributes:
        x_IO: float64.
        null_directions: Of the I directions, how many the system says nothing about; the start decides there.
    """

    x_IO: torch.Tensor
    null_directions: int


def solve_dense(
    moment_II: torch.Tensor, rhs_IO: torch.Tensor, start_IO: torch.Tensor, *, rounding: float = FLOAT32_ROUNDING
) -> DenseSolution:
    """Solve moment · X = rhs, the component of X − start in the moment's null space being zero.

    Rows and columns are scaled by powers of two to a diagonal of 1 … 4, so that an input with small activations is not
    taken for none. A direction is null if its eigenvalue there is not above what the rounding of the moment can make of
    zero. Without null directions the solve is by Cholesky; else by eigenvectors, and X − start is made orthogonal to
    the null space, as conjugate gradients from the same start would leave it. A start that already solves the system to
    rounding is returned as it is.

    Args:
        moment_II: (I, I) symmetric, positive semidefinite up to rounding.
        rhs_IO: (I, O).
        start_IO: (I, O).
        rounding: Relative rounding error of the moment's elements.

    Returns:
        The solution.

    Raises:
        ValueError: The shapes are not those of a system, a value is not finite, or the moment is indefinite beyond
            rounding.
    """
    _require_system(moment_II, rhs_IO, start_IO)
    moment, start = moment_II.to(torch.float64), start_IO.to(torch.float64)
    residual_IO = rhs_IO.to(torch.float64) - moment @ start
    if _is_rounding(residual_IO, moment, rhs_IO, start):
        residual_IO.zero_()
    scales_I, unit, dead_I = _scales(moment)
    scaled_II = (moment * unit).mul_(scales_I[:, None]).mul_(scales_I[None, :])
    # A dead input is its own null direction: 1 on its diagonal keeps it out of all others.
    scaled_II[dead_I, dead_I] = 1.0
    residual_IO.mul_(unit).mul_(scales_I[:, None])
    # Errors independent of each other move eigenvalues by no more than about the longest row of them.
    threshold = _NOISE * rounding * float(torch.linalg.vector_norm(scaled_II, dim=1).max())
    factor_II = _cholesky(scaled_II, threshold)
    null = int(dead_I.sum())
    if factor_II is not None:
        step_IO = torch.cholesky_solve(residual_IO, factor_II).mul_(scales_I[:, None])
    else:
        step_IO, more = _by_eigenvectors(scaled_II, residual_IO, scales_I, threshold)
        null += more
    return DenseSolution(x_IO=step_IO.add_(start), null_directions=null)


def scale_off_diagonals(gram_II: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply what lies off the diagonal, in place, and return the matrix; factor 1 changes no bit.

    Args:
        gram_II: (I, I).
        factor: From 0 to 1.

    Raises:
        ValueError: The matrix is not square, or the factor does not lie in the range.

    Source:
        Jin et al. 2023 (RegMean), the factor on non-diagonal items.
    """
    if gram_II.ndim != 2 or gram_II.shape[0] != gram_II.shape[1]:
        raise ValueError(f"a matrix of shape {tuple(gram_II.shape)} has no diagonal to keep")
    if not 0.0 <= factor <= 1.0:
        raise ValueError(f"off-diagonals are scaled by a factor from 0 to 1, not {factor}")
    if factor != 1.0:
        diagonal_I = gram_II.diagonal().clone()
        gram_II.mul_(factor)
        gram_II.diagonal().copy_(diagonal_I)
    return gram_II


def require_semidefinite(moment_II: torch.Tensor) -> None:
    """Raise unless a matrix is positive semidefinite up to rounding, as `solve_dense` would.

    An iterative solve would not notice before it has run away. Takes two matrices of its size in float32, and before
    those one of its own dtype.

    Args:
        moment_II: (I, I) symmetric, finite.

    Raises:
        ValueError: It has eigenvalues that are clearly negative.
    """
    scales_I, unit, dead_I = _scales(moment_II)
    scaled_II = (moment_II * unit).mul_(scales_I[:, None]).mul_(scales_I[None, :]).to(torch.float32)
    if not len(scaled_II):
        return
    scaled_II[dead_I, dead_I] = 1.0
    # The longest row is no longer than the largest eigenvalue.
    share = float(torch.linalg.vector_norm(scaled_II, dim=1).max()) * _LARGEST_NEGATIVE
    scaled_II.diagonal().add_(share)
    if int(torch.linalg.cholesky_ex(scaled_II).info):
        raise ValueError(_indefinite(-_LARGEST_NEGATIVE))


def _indefinite(share: float) -> str:
    """Return what to say of a moment with an eigenvalue of this share of the largest, or below."""
    return (
        f"the moment has an eigenvalue of {share:.2g} times the largest, or below; means of outer products have none"
        " below zero"
    )


def _require_system(moment_II: torch.Tensor, rhs_IO: torch.Tensor, start_IO: torch.Tensor) -> None:
    inputs = rhs_IO.shape[0]
    if moment_II.shape != (inputs, inputs) or rhs_IO.ndim != 2 or start_IO.shape != rhs_IO.shape:
        shapes = [tuple(tensor.shape) for tensor in (moment_II, rhs_IO, start_IO)]
        raise ValueError(f"moment, right-hand side and start of shapes {shapes} are no system")
    for name, tensor in (("moment", moment_II), ("right-hand side", rhs_IO), ("start", start_IO)):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the {name} has a value that is not finite")


def _scales(moment_II: torch.Tensor) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Return powers of two by row, and one for all, that bring the diagonal to 1 … 4, and which inputs have none."""
    diagonal_I = moment_II.diagonal()
    # A diagonal of a positive semidefinite matrix is zero only where its whole row is; below zero it is rounding.
    dead_I = diagonal_I <= 0
    exponents_I = torch.frexp(torch.where(dead_I, 1.0, diagonal_I)).exponent
    if bool(dead_I.all()):
        return torch.zeros_like(diagonal_I), 1.0, dead_I
    # From the largest on, so that the same moment in another unit comes to the same numbers; and 1 stays 1.
    largest = int(exponents_I[~dead_I].max())
    halves_I = (exponents_I - largest).to(torch.float64).div(2).floor()
    return torch.where(dead_I, 0.0, torch.exp2(-halves_I)), math.ldexp(1.0, 1 - largest), dead_I


def _cholesky(scaled_II: torch.Tensor, threshold: float) -> torch.Tensor | None:
    """Return the factor, or None if an eigenvalue is not above the threshold."""
    shifted_II = scaled_II.clone()
    shifted_II.diagonal().sub_(threshold)
    if int(torch.linalg.cholesky_ex(shifted_II).info):
        return None
    factor = torch.linalg.cholesky_ex(scaled_II)
    return None if int(factor.info) else factor.L


def _is_rounding(
    residual_IO: torch.Tensor, moment_II: torch.Tensor, rhs_IO: torch.Tensor, start_IO: torch.Tensor
) -> bool:
    """Say whether no element of a residual is more than the rounding of the sums it is made of."""
    if not bool(residual_IO.any()):
        return True
    limits_IO = (moment_II.abs() @ start_IO.abs()).add_(rhs_IO.abs()).mul_(len(moment_II) * _EPSILON)
    return bool((residual_IO.abs() <= limits_IO).all())


def _by_eigenvectors(
    scaled_II: torch.Tensor, residual_IO: torch.Tensor, scales_I: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, int]:
    """Return the step in the unscaled inputs, orthogonal to the null space there, and the dimension of that."""
    values_I, vectors_II = torch.linalg.eigh(scaled_II)
    if float(values_I[0]) < -_LARGEST_NEGATIVE * float(values_I[-1]):
        raise ValueError(_indefinite(float(values_I[0] / values_I[-1])))
    # The exact moment has no negative eigenvalue: those that are here show how far rounding has moved them.
    null_I = values_I <= max(threshold, -_NOISE * float(values_I[0]))
    kept_IJ = vectors_II[:, ~null_I]
    step_IO = kept_IJ @ (kept_IJ.T @ residual_IO).div_(values_I[~null_I, None])
    step_IO.mul_(scales_I[:, None])
    # A vector is null for the moment if it is the scaled moment's null vector, scaled.
    basis_IK = torch.linalg.qr(vectors_II[:, null_I] * scales_I[:, None]).Q
    step_IO.sub_(basis_IK @ (basis_IK.T @ step_IO))
    return step_IO, int(null_I.sum())
