"""Moments and matrices for the tests of linear systems, and exact oracles in rationals and many digits."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import mpmath
import numpy as np
import torch


def rationals(values: torch.Tensor) -> list[Fraction]:
    """The exact values of a tensor."""
    return [Fraction(value) for value in values.to(torch.float64).flatten().tolist()]


def matrices(seed: int, count: int, rows: int, columns: int) -> list[torch.Tensor]:
    """Matrices of normal values, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(count)]


def grams(seed: int, count: int, size: int, samples: int) -> list[torch.Tensor]:
    """Means of xxᵀ, float64; singular if there are fewer samples than inputs."""
    return [data.T @ data / samples for data in matrices(seed, count, samples, size)]


def kronecker_matrix(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
    """Σ A ⊗ B as one dense matrix on X read row by row."""
    return np.asarray(sum(np.kron(left.double().numpy(), right.double().numpy()) for left, right in pairs))


def exact_solution(matrix: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """The solution of a regular system by fifty digits."""
    with mpmath.workdps(50):
        columns = [mpmath.lu_solve(mpmath.matrix(matrix.tolist()), mpmath.matrix(c.tolist())) for c in rhs.T]
        return np.array([[float(value) for value in column] for column in columns]).T


def relative_error(found: torch.Tensor | np.ndarray, exact: torch.Tensor | np.ndarray) -> float:
    """‖found − exact‖ / ‖exact‖."""
    one, other = np.asarray(found, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))
