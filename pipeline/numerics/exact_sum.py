"""Sums of float64 that are exact, hence independent of the order and of who added what.

Owns the fixed-point accumulator and its integer form for an all-reduce; must not know what is summed. A finite float64
is an integer multiple of 2⁻¹⁰⁷⁴, so a wide enough integer holds any sum of them; it is kept as digits of 32 bits, and
only those between the lowest and the highest that any of the sums has used: six or so where the values are of one kind.

Legend: K sums, L digits, W digits held, R rows.
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
# The significand of a float64 without its leading bit.
_FRACTION_BITS = 52
# 2098 bits reach from 2^-1074 to the largest float64; 110 more hold 2^88 addends of that size, a carry and the sign.
LIMBS = 69
# A digit grows by less than 2^32 per addend: carries must be moved on before 2^31 addends; this leaves a factor of 8.
_MAX_PENDING = 1 << 28
# The highest digit held keeps its carries: beyond this it gets a higher one, long before int64 overflows.
_TOP_LIMIT = 1 << 31
# Values decomposed at a time: a dozen integer arrays of this size stay in the cache.
_BLOCK = 1 << 14
# Up to so many columns Python's own exact sum is faster than the digits.
_FEW_COLUMNS = 256

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def exact_column_sums(rows_RK: npt.ArrayLike | Sequence[Floats]) -> Floats:
    """Return the correctly rounded sum of every column.

    Args:
        rows_RK: (R, K) float64, finite: an array, or a list of rows, which is not copied into one.

    Returns:
        (K,) float64, each equal to `math.fsum` of its column whatever the order of the rows.

    Raises:
        ValueError: The array is not two-dimensional or holds a value that is not finite.
        OverflowError: A sum is beyond the range of float64.
    """
    rows, columns = _rows(rows_RK)
    for row in rows:
        _require_finite(row)
    if len(rows) == 1:
        # Adding zero takes the sign of a zero away, as any longer sum does.
        return np.asarray(rows[0] + 0.0)
    if columns <= _FEW_COLUMNS:
        array_KR = np.array(rows).reshape(len(rows), columns).T
        return np.array([math.fsum(column) for column in array_KR.tolist()], dtype=np.float64)
    total = ExactSum(columns)
    total.add(rows)
    return total.total()


def _rows(rows_RK: npt.ArrayLike | Sequence[Floats], *, single: bool = False) -> tuple[list[Floats], int]:
    """Return the rows, of which one may come alone if `single`, and their length."""
    if isinstance(rows_RK, Sequence) and rows_RK and all(isinstance(row, np.ndarray) for row in rows_RK):
        rows = [np.asarray(row, dtype=np.float64) for row in rows_RK]
        shapes = sorted({row.shape for row in rows})
        if len(shapes) > 1 or len(shapes[0]) != 1:
            raise ValueError(f"rows must have one dimension and one length, not the shapes {shapes}")
        return rows, rows[0].size
    array = np.asarray(rows_RK, dtype=np.float64)
    array = array[None] if single and array.ndim == 1 else array
    if array.ndim != 2:
        raise ValueError(f"rows must be two-dimensional, not of shape {array.shape}")
    return list(array), array.shape[1]


class ExactSum:
    """K exact sums of float64 values.

    Args:
        size: K, the number of sums.
    """

    __slots__ = ("_digits_WK", "_first", "_pending")

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"the number of sums must not be negative, not {size}")
        # A sum is Σ digit·2^(32·(first + row) − 1074); digits below and above those held are zero.
        self._digits_WK: Integers = np.zeros((0, size), dtype=np.int64)
        self._first = 0
        self._pending = 0

    def __len__(self) -> int:
        """K."""
        return int(self._digits_WK.shape[1])

    @property
    def nbytes(self) -> int:
        """The bytes of the digits held."""
        return int(self._digits_WK.nbytes)

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
        used = np.flatnonzero(limbs.any(axis=0))
        if used.size:
            result._first = int(used[0])
            result._digits_WK = np.ascontiguousarray(limbs[:, used[0] : used[-1] + 1].T)
            result._carry()
        return result

    def add(self, values_K: npt.ArrayLike | Sequence[float] | Sequence[Floats]) -> None:
        """Add one value to each sum, or a column of values to each.

        Args:
            values_K: (K,) or (R, K) float64, finite; a list of rows is not copied into one array.

        Raises:
            ValueError: The shape is another, or a value is not finite; nothing has been added then.
        """
        rows, columns = _rows(values_K, single=True)
        if columns != len(self):
            raise ValueError(f"values must have shape ({len(self)},) or (R, {len(self)}), not (…, {columns})")
        for row in rows:
            _require_finite(row)
        for first in range(0, len(rows), _MAX_PENDING):
            self._add_rows(rows[first : first + _MAX_PENDING])

    def _add_rows(self, rows: Sequence[Floats]) -> None:
        if self._pending + len(rows) > _MAX_PENDING:
            self._carry()
        self._pending += len(rows)
        size = len(self)
        if size <= _BLOCK:
            height = max(1, _BLOCK // max(1, size))
            for first in range(0, len(rows), height):
                self._add_block(np.stack(rows[first : first + height]))
            return
        for column in range(0, size, _BLOCK):
            # Digits of their own for a while: those of all columns do not fit in the cache.
            part = ExactSum(min(_BLOCK, size - column))
            part._add_rows([row[column : column + _BLOCK] for row in rows])
            self._take(part, column)

    def _add_block(self, values_RK: Floats) -> None:
        """Add R values to each sum."""
        bits = values_RK.view(np.int64)
        exponents = (bits >> _FRACTION_BITS) & 0x7FF
        magnitudes = (bits & ((1 << _FRACTION_BITS) - 1)) | (np.minimum(exponents, 1) << _FRACTION_BITS)
        if not magnitudes.any():
            return
        # A subnormal has the exponent of the smallest normal number, without the leading bit.
        shifts = np.maximum(exponents, 1) - 1
        digits, offsets = shifts >> 5, shifts & (_DIGIT_BITS - 1)
        low = (magnitudes & _DIGIT_MASK) << offsets
        high = ((magnitudes >> _DIGIT_BITS) << offsets) + (low >> _DIGIT_BITS)
        used = digits[magnitudes != 0]
        self._hold(int(used.min()), int(used.max()) + 3)
        # Zeros have a digit of their own, which need not be held: they add nothing to the lowest.
        places = np.maximum(digits - self._first, 0) * len(self) + np.arange(len(self))
        negative = bits < 0
        flat = self._digits_WK.reshape(-1)
        for part in (low & _DIGIT_MASK, high & _DIGIT_MASK, high >> _DIGIT_BITS):
            if negative.any():
                np.negative(part, out=part, where=negative)
            if len(values_RK) == 1:
                flat[places[0]] += part[0]
            else:
                np.add.at(flat, places.reshape(-1), part.reshape(-1))
            places += len(self)

    def _take(self, other: ExactSum, column: int) -> None:
        """Add another accumulator to the sums from `column` on."""
        height = other._digits_WK.shape[0]
        if height:
            self._hold(other._first, other._first + height)
            offset = other._first - self._first
            self._digits_WK[offset : offset + height, column : column + len(other)] += other._digits_WK

    def _hold(self, first: int, last: int) -> None:
        """Hold at least the digits from `first` to before `last`."""
        held, end = self._digits_WK, self._first + self._digits_WK.shape[0]
        if not held.shape[0]:
            self._first = end = first
        below, above = max(0, self._first - first), max(0, last - end)
        if below or above:
            self._digits_WK = np.pad(held, ((below, above), (0, 0)))
            self._first -= below

    def _carry(self) -> None:
        """Bring every digit but the highest held into 0 … 2³²−1, in place."""
        digits = self._digits_WK
        _propagate(digits)
        end = self._first + digits.shape[0]
        if digits.size and end < LIMBS and max(int(digits[-1].max()), -int(digits[-1].min())) >= _TOP_LIMIT:
            self._hold(self._first, end + 1)
            self._carry()
        self._pending = 0

    def merge(self, other: ExactSum) -> None:
        """Add another accumulator of as many sums.

        Args:
            other: The accumulator to add; it is left as it is.

        Raises:
            ValueError: The number of sums differs.
        """
        if len(other) != len(self):
            raise ValueError(f"cannot merge {len(other)} sums into {len(self)}")
        self._carry()
        self._take(other, 0)
        self._carry()

    def to_limbs(self) -> Integers:
        """Return the sums as integers that may be added by any plain int64 all-reduce.

        Returns:
            (K, L) int64, the same for equal sums; the element-wise sum of up to 2²⁰ such arrays does not overflow and
            describes the sum of the accumulators.
        """
        limbs = np.zeros((len(self), LIMBS), dtype=np.int64)
        limbs[:, self._first : self._first + self._digits_WK.shape[0]] = self._digits_WK.T
        _propagate(limbs.T)
        return limbs

    def total(self) -> Floats:
        """Return the sums, each rounded once, to nearest even: what `math.fsum` of all addends gives.

        Returns:
            (K,) float64.

        Raises:
            OverflowError: A sum is beyond the range of float64.
        """
        totals = np.empty(len(self))
        for start in range(0, len(self), _BLOCK):
            # Room below for the three digits that make a float64, and above for the sign.
            digits = np.pad(self._digits_WK[:, start : start + _BLOCK], ((2, 1), (0, 0)))
            _propagate(digits)
            negative = digits[-1] < 0
            np.negative(digits, out=digits, where=negative)
            _propagate(digits)
            rounded = _rounded(digits.view(np.uint64), self._first - 2)
            totals[start : start + _BLOCK] = np.where(negative, -rounded, rounded)
        if not np.isfinite(totals).all():
            raise OverflowError("an exact sum is too large for a float64")
        return totals


def _propagate(digits_WK: Integers) -> None:
    """Move the carries of every digit but the highest on, in place."""
    for row in range(digits_WK.shape[0] - 1):
        digits_WK[row + 1] += digits_WK[row] >> _DIGIT_BITS
        digits_WK[row] &= _DIGIT_MASK


def _rounded(digits_WK: npt.NDArray[np.uint64], first: int) -> Floats:
    """Return the float64 next to Σ digit·2^(32·(first + row) − 1074), digits in 0 … 2³²−1, the lowest two zero."""
    used = digits_WK != 0
    highest = np.maximum(len(digits_WK) - 1 - np.argmax(used[::-1], axis=0), 2)
    columns = np.arange(digits_WK.shape[1])
    a, b, c = (digits_WK[highest - step, columns] for step in range(3))
    # The bits of the highest digit: frexp of an integer below 2^32 is exact.
    bits = np.frexp(a.astype(np.float64))[1]
    up, down = (_DIGIT_BITS - bits).astype(np.uint64), bits.astype(np.uint64)
    word = (a << (up + np.uint64(_DIGIT_BITS))) | (b << up) | (c >> down)
    lost = (c & ((np.uint64(1) << down) - np.uint64(1))) != 0
    below = np.logical_or.accumulate(used, axis=0)[highest - 3, columns] & (highest > 2)
    # 64 bits, the last of which says that something follows: rounding them to 53 rounds the whole sum. In the range
    # of the subnormals, all of which are multiples of 2^-1074, nothing is left to round.
    word |= (lost | below).astype(np.uint64)
    with np.errstate(over="ignore"):
        scaled = np.ldexp(word.astype(np.float64), bits - 64 + _DIGIT_BITS * (highest + first) - _UNIT_EXPONENT)
    return np.asarray(scaled)


def _require_finite(values: Floats) -> None:
    if not np.isfinite(values).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"cannot add a value that is not finite: {values[place]} at {place}")
