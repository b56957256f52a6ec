"""Points that are known by their squared distances only, and places Σ cⱼxⱼ among them.

Owns the reduced problem (checked, ordered, scaled, duplicates collapsed) and the stable formulas of distances and inner
products relative to the nearest point; must not know what is to be minimised.

Everything is written relative to a base point k: with eⱼ = cⱼ for j ≠ k and the local Gram
G_ij = ⟨xᵢ − x_k, xⱼ − x_k⟩ = ½(D_ik + D_jk − D_ij), a place is x_k + Σ eⱼ(xⱼ − x_k), so c_k = 1 − Σe is only implied.
This keeps full relative accuracy however close to x_k the place is, where c itself has long run out of digits.

Legend: N points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

UNIT_ROUNDOFF = 2.0**-53
# Points closer than 2^-50 of the diameter: the other distances, rounded to 2^-53, cannot tell them apart.
_SAME_POINT = 2.0**-50
# Sums of measured partial sums are symmetric up to the accuracy asked of them; beyond it the matrix is another thing.
_ASYMMETRY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class DistanceFrame:
    """The reduced problem: distinct points in an order of their own, largest squared distance in [1, 4).

    Attributes:
        squared_NN: (N, N) float64, squared distances times 2^-exponent.
        weights_N: (N,) float64, summed over the duplicates of each point.
        total_weight: Their sum, correctly rounded.
        exponent: Even; distances are to be multiplied by 2^(exponent / 2).
        weight_exponent: Weights are to be multiplied by 2^weight_exponent.
        owner_M: (M,) int64, the reduced point of each of the M given ones.
        given_weights_M: (M,) float64, the scaled weights of the given points.
        displacement: Σ wᵢ‖xᵢ − its reduced point‖, scaled; 0 unless points that only nearly agree were collapsed.
    """

    squared_NN: Floats
    weights_N: Floats
    total_weight: float
    exponent: int
    weight_exponent: int
    owner_M: Integers
    given_weights_M: Floats
    displacement: float

    @property
    def size(self) -> int:
        """N, the number of distinct points."""
        return int(self.weights_N.shape[0])

    def gather(self, coefficients_M: Floats) -> Floats:
        """Return (N,) coefficients of the reduced points: those of duplicates added."""
        sums: Floats = np.bincount(self.owner_M, weights=coefficients_M, minlength=self.size).astype(np.float64)
        return sums

    def expand(self, coefficients_N: Floats) -> tuple[float, ...]:
        """Return the coefficients of the given points: duplicates share theirs in proportion to their weights."""
        share = self.given_weights_M / self.weights_N[self.owner_M]
        return tuple((coefficients_N[self.owner_M] * share).tolist())

    def lengths(self, squares_N: Floats) -> tuple[float, ...]:
        """Return the distances of the given points, unscaled, from the scaled squares of the reduced ones."""
        return tuple(np.ldexp(np.sqrt(squares_N), self.exponent // 2)[self.owner_M].tolist())

    def length(self, scaled: float) -> float:
        """Return a length in the unit of the input."""
        return math.ldexp(scaled, self.exponent // 2)

    def objective(self, scaled: float) -> float:
        """Return a weighted sum of lengths in the units of the input."""
        return math.ldexp(scaled, self.exponent // 2 + self.weight_exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """x_k + Σ eⱼ(xⱼ − x_k), k the nearest point, and what is known of its distances.

    Attributes:
        base: k.
        offsets_N: (N,) float64, e, with e_k = 0.
        products_N: (N,) float64, ⟨place − x_k, xᵢ − x_k⟩.
        squares_N: (N,) float64, squared distances, not negative.
        errors_N: (N,) float64, bounds of the rounding errors of `squares_N`.
    """

    base: int
    offsets_N: Floats
    products_N: Floats
    squares_N: Floats
    errors_N: Floats

    @property
    def coefficients(self) -> Floats:
        """(N,) float64, c, with the base's coefficient implied by the sum of one."""
        coefficients = self.offsets_N.copy()
        coefficients[self.base] = 1.0 - math.fsum(self.offsets_N.tolist())
        return coefficients


def reduce_distances(
    distances_MM: npt.ArrayLike, weights_M: Sequence[float] | Floats, *, same_point: float = _SAME_POINT
) -> DistanceFrame:
    """Check, order, scale and collapse a weighted set of points given by squared distances.

    The order follows from each point's own weighted distance sum, so that permuting the models permutes the answer
    and changes no bit of it (unless two models are mirror images of each other).

    Args:
        distances_MM: (M, M) float64, squared distances, symmetric, zero diagonal.
        weights_M: M positive weights.
        same_point: Points within about this share of the diameter are collapsed like duplicates.

    Returns:
        The reduced problem.

    Raises:
        ValueError: The matrix or the weights are not what is said above.
    """
    squared = _checked_distances(distances_MM)
    weights = _checked_weights(weights_M, squared.shape[0])
    # Scaling by powers of two rounds nothing, and no sum or square can overflow later on.
    weight_exponent = math.frexp(float(weights.max()))[1]
    weights = np.ldexp(weights, -weight_exponent)
    largest = float(squared.max())
    exponent = 0 if largest == 0.0 else (math.frexp(largest)[1] - 1) // 2 * 2
    squared = np.ldexp(squared, -exponent)
    roots = np.sqrt(squared)
    sums = [math.fsum((weights * row).tolist()) for row in roots]
    order = sorted(range(len(sums)), key=lambda index: (sums[index], weights[index], index))
    owner = np.full(len(sums), -1, dtype=np.int64)
    kept: list[int] = []
    for index in order:
        if owner[index] < 0:
            owner[(owner < 0) & (squared[index] <= same_point**2)] = len(kept)
            kept.append(index)
    merged = [math.fsum(weights[owner == point].tolist()) for point in range(len(kept))]
    return DistanceFrame(
        squared_NN=np.ascontiguousarray(squared[np.ix_(kept, kept)]),
        weights_N=np.array(merged),
        total_weight=math.fsum(weights.tolist()),
        exponent=exponent,
        weight_exponent=weight_exponent,
        owner_M=owner,
        given_weights_M=weights,
        displacement=math.fsum((weights * roots[np.arange(len(sums)), np.array(kept)[owner]]).tolist()),
    )


def _checked_distances(distances_MM: npt.ArrayLike) -> Floats:
    squared = np.array(distances_MM, dtype=np.float64)
    if squared.ndim != 2 or squared.shape[0] != squared.shape[1] or squared.shape[0] == 0:
        raise ValueError(f"squared distances must be a square matrix of at least one row, not {squared.shape}")
    if not np.isfinite(squared).all():
        i, j = np.argwhere(~np.isfinite(squared))[0]
        raise ValueError(f"the squared distance of {i} and {j} is not finite: {squared[i, j]}")
    if squared.min() < 0.0:
        i, j = np.unravel_index(int(squared.argmin()), squared.shape)
        raise ValueError(f"the squared distance of {i} and {j} is negative: {squared[i, j]}")
    if squared.diagonal().any():
        i = int(np.flatnonzero(squared.diagonal())[0])
        raise ValueError(f"the squared distance of {i} to itself is not zero: {squared[i, i]}")
    gap = np.abs(squared - squared.T) - _ASYMMETRY * np.maximum(squared, squared.T)
    if gap.max() > 0.0:
        i, j = np.unravel_index(int(gap.argmax()), gap.shape)
        raise ValueError(f"the squared distances of {i} and {j} differ by direction: {squared[i, j]}, {squared[j, i]}")
    return np.asarray(0.5 * squared + 0.5 * squared.T)


def _checked_weights(weights_M: Sequence[float] | Floats, size: int) -> Floats:
    weights = np.array(weights_M, dtype=np.float64)
    if weights.shape != (size,):
        raise ValueError(f"{size} points need {size} weights, not an array of shape {weights.shape}")
    if not (np.isfinite(weights).all() and (weights > 0.0).all()):
        i = int(np.flatnonzero(~(np.isfinite(weights) & (weights > 0.0)))[0])
        raise ValueError(f"the weight of point {i} must be positive and finite, not {weights[i]}")
    return weights


def local_products(squared_NN: Floats, base: int, offsets_N: Floats) -> Floats:
    """Return G e: the inner products of Σ eⱼ(xⱼ − x_k) with every xᵢ − x_k.

    Args:
        squared_NN: (N, N) float64, squared distances.
        base: k.
        offsets_N: (N,) float64, e; e_k must be 0.

    Returns:
        (N,) float64.
    """
    row = squared_NN[base]
    products = 0.5 * (row * offsets_N.sum() + (row @ offsets_N - squared_NN @ offsets_N))
    # G_k· = 0 by definition; the formula leaves rounding there.
    products[base] = 0.0
    return np.asarray(products)


def product_errors(squared_NN: Floats, base: int, offsets_N: Floats) -> Floats:
    """Return (N,) bounds of the rounding errors of `local_products`, sums taken in any order."""
    row, sizes = squared_NN[base], np.abs(offsets_N)
    bound = 0.5 * (row * sizes.sum() + row @ sizes + squared_NN @ sizes)
    return np.asarray((offsets_N.size + 8) * UNIT_ROUNDOFF * bound)


def locate(squared_NN: Floats, coefficients_N: Floats) -> Place:
    """Return the place Σ cⱼxⱼ relative to its nearest point.

    Args:
        squared_NN: (N, N) float64, squared distances.
        coefficients_N: (N,) float64, c, of sum one; the coefficient of the nearest point is not read.

    Returns:
        The place with its distances.
    """
    place = place_at(squared_NN, int(np.argmax(coefficients_N)), coefficients_N)
    nearest = int(np.argmin(place.squares_N))
    if nearest == place.base:
        return place
    return place_at(squared_NN, nearest, coefficients_N)


def place_at(squared_NN: Floats, base: int, coefficients_N: Floats) -> Place:
    """Return the place Σ cⱼxⱼ relative to a given point, whose coefficient is not read.

    Args:
        squared_NN: (N, N) float64, squared distances.
        base: k.
        coefficients_N: (N,) float64, c.

    Returns:
        The place with its distances.
    """
    offsets = coefficients_N.copy()
    offsets[base] = 0.0
    products = local_products(squared_NN, base, offsets)
    bounds = product_errors(squared_NN, base, offsets)
    roundoff = (offsets.size + 8) * UNIT_ROUNDOFF
    own = float(offsets @ products)
    own_error = float(np.abs(offsets) @ (bounds + roundoff * np.abs(products)))
    # A square can only be negative by rounding, by no more than its error bound: zero is the nearest truth.
    squares = np.maximum(squared_NN[base] - 2.0 * products + own, 0.0)
    squares[base] = max(own, 0.0)
    errors = 2.0 * bounds + own_error + 4.0 * UNIT_ROUNDOFF * (squared_NN[base] + 2.0 * np.abs(products) + abs(own))
    errors[base] = own_error
    return Place(base=base, offsets_N=offsets, products_N=products, squares_N=squares, errors_N=errors)
