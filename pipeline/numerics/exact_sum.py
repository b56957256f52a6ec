"""Sums of float64 that are exact, hence independent of the order and of who added what.

Owns the fixed-point accumulator and its integer form for an all-reduce; must not know what is summed. A finite float64
is an integer multiple of 2⁻¹⁰⁷⁴, so a wide enough integer holds any sum of them; it is kept as L digits of 32 bits.

Legend: K sums, L digits, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_DIGIT_BITS = 32
_DIGIT_MASK = (1 << _DIGIT_BITS) - 1
# The smallest positive float64 is 2^-1074.
_UNIT_EXPONENT = 1074
# The significand of a float64 as an integer has 53 bits.
_SIGNIFICAND_BITS = 53
# 2098 bits reach from 2^-1074 to the largest float64; 110 more hold 2^88 addends of that size, a carry and the sign.
LIMBS = 69
# A digit grows by less than 2^32 per addend: carries must be moved on before 2^31 addends; this leaves a factor of 8.
_MAX_PENDING = 1 << 28

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def exact_column_sums(rows_RK: npt.ArrayLike) -> Floats:
    """Return the correctly rounded sum of every column.

    Args:
        rows_RK: (R, K) float64, finite.

    Returns:
        (K,) float64, each equal to `math.fsum` of its column whatever the order of the rows.

    Raises:
        ValueError: The array is not two-dimensional or holds a value that is not finite.
    """
    rows = np.asarray(rows_RK, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"rows must be two-dimensional, not of shape {rows.shape}")
    _require_finite(rows)
    return np.array([math.fsum(column) for column in rows.T.tolist()], dtype=np.float64)


class ExactSum:
    """K exact sums of float64 values.

    Args:
        size: K, the number of sums.
    """

    __slots__ = ("_limbs_KL", "_pending")

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"the number of sums must not be negative, not {size}")
        self._limbs_KL: Integers = np.zeros((size, LIMBS), dtype=np.int64)
        self._pending = 0

    @classmethod
    def from_limbs(cls, limbs_KL: npt.ArrayLike) -> ExactSum:
        """Return the accumulator that `to_limbs`, or a sum of up to 2²⁰ such arrays, describes.

        Args:
            limbs_KL: (K, L) int64.

        Returns:
            An accumulator of K sums.

        Raises:
            ValueError: The shape or the data type is another.
        """
        limbs = np.asarray(limbs_KL)
        if limbs.ndim != 2 or limbs.shape[1] != LIMBS or limbs.dtype != np.int64:
            raise ValueError(f"limbs must be int64 of shape (K, {LIMBS}), not {limbs.dtype} of shape {limbs.shape}")
        result = cls(limbs.shape[0])
        result._limbs_KL = _carried(limbs)
        return result

    def add(self, values_K: npt.ArrayLike | Sequence[float]) -> None:
        """Add one value to each sum, or a column of values to each.

        Args:
            values_K: (K,) or (R, K) float64, finite.

        Raises:
            ValueError: The shape is another, or a value is not finite; nothing has been added then.
        """
        values = np.asarray(values_K, dtype=np.float64)
        size = self._limbs_KL.shape[0]
        if values.ndim not in (1, 2) or values.shape[-1] != size:
            raise ValueError(f"values must have shape ({size},) or (R, {size}), not {values.shape}")
        _require_finite(values)
        for row in range(0, max(1, values.size // max(1, size)), _MAX_PENDING):
            self._add_rows(np.atleast_2d(values)[row : row + _MAX_PENDING])

    def _add_rows(self, rows_RK: Floats) -> None:
        self._pending += rows_RK.shape[0]
        if self._pending > _MAX_PENDING:
            self._limbs_KL = _carried(self._limbs_KL)
            self._pending = rows_RK.shape[0]
        fractions, exponents = np.frexp(rows_RK)
        magnitudes = np.abs(np.ldexp(fractions, _SIGNIFICAND_BITS)).astype(np.int64)
        signs = np.where(rows_RK < 0, np.int64(-1), np.int64(1))
        shifts = exponents.astype(np.int64) + (_UNIT_EXPONENT - _SIGNIFICAND_BITS)
        # Subnormals sit below the unit by zeros only: shifting them back is exact.
        magnitudes >>= np.maximum(-shifts, 0)
        digits, offsets = np.divmod(np.maximum(shifts, 0), _DIGIT_BITS)
        low = (magnitudes & _DIGIT_MASK) << offsets
        high = ((magnitudes >> _DIGIT_BITS) << offsets) + (low >> _DIGIT_BITS)
        columns = np.broadcast_to(np.arange(rows_RK.shape[1]), rows_RK.shape)
        for step, part in enumerate((low & _DIGIT_MASK, high & _DIGIT_MASK, high >> _DIGIT_BITS)):
            np.add.at(self._limbs_KL, (columns, digits + step), signs * part)

    def merge(self, other: ExactSum) -> None:
        """Add another accumulator of as many sums.

        Args:
            other: The accumulator to add; it is left as it is.

        Raises:
            ValueError: The number of sums differs.
        """
        if other._limbs_KL.shape != self._limbs_KL.shape:
            raise ValueError(f"cannot merge {other._limbs_KL.shape[0]} sums into {self._limbs_KL.shape[0]}")
        self._limbs_KL = _carried(self.to_limbs() + other.to_limbs())
        self._pending = 0

    def to_limbs(self) -> Integers:
        """Return the sums as integers that may be added by any plain int64 all-reduce.

        Returns:
            (K, L) int64, the same for equal sums; the element-wise sum of up to 2²⁰ such arrays does not overflow and
            describes the sum of the accumulators.
        """
        return _carried(self._limbs_KL)

    def total(self) -> Floats:
        """Return the sums, each rounded once, to nearest even: what `math.fsum` of all addends gives.

        Returns:
            (K,) float64.

        Raises:
            OverflowError: A sum is beyond the range of float64.
        """
        limbs = _carried(self._limbs_KL)
        low = limbs[:, :-1].astype("<u4")
        totals = np.empty(limbs.shape[0], dtype=np.float64)
        for index in range(limbs.shape[0]):
            top = int(limbs[index, -1]) << (_DIGIT_BITS * (LIMBS - 1))
            # Division of integers is correctly rounded in Python, down to the subnormal range.
            totals[index] = (top + int.from_bytes(low[index].tobytes(), "little")) / (1 << _UNIT_EXPONENT)
        return totals


def _carried(limbs_KL: Integers) -> Integers:
    """Return the same integers with every digit but the last in 0 … 2³²−1: the one canonical form."""
    limbs = limbs_KL.copy()
    for digit in range(LIMBS - 1):
        carry = limbs[:, digit] >> _DIGIT_BITS
        limbs[:, digit] &= _DIGIT_MASK
        limbs[:, digit + 1] += carry
    return limbs


def _require_finite(values: Floats) -> None:
    if not np.isfinite(values).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"cannot add a value that is not finite: {values[place]} at {place}")
