"""The operator X ↦ Σ λᵢ Aᵢ X Bᵢ on one matrix, whose moments may be read anew at every product.

Owns the product, its right-hand side and its scale; must not know where the moments come from. A common factor of all
moments is divided out as a power of two, so that products in float32 neither vanish nor overflow and the same system in
another unit gives the same digits. Legend: N models, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat

import torch

from pipeline.numerics.linear_systems.dense import require_semidefinite

# Either moment may be None, which is the identity.
Pair = tuple[torch.Tensor | None, torch.Tensor | None]
# What is left of the exponents of float32 carries the other factors of a product.
_LARGEST_EXPONENT = 90


class KroneckerOperator:
    """Σ λᵢ Aᵢ X Bᵢ divided by a power of two.

    The moments are read once to begin with. Products of the same bits take single-threaded arithmetic and moments in
    memory of torch's own making, which is aligned.

    Args:
        pairs: Returns the N pairs of symmetric moments, Aᵢ (I, I) and Bᵢ (O, O), the same at every call; they are not
            changed, and may be dropped as soon as the next is asked for.
        weights_N: λ, positive; all 1 when absent.

    Raises:
        ValueError: A moment has a value that is not finite or a negative one on its diagonal, one of a pair of two is
            indefinite beyond rounding, or it is so small or large that float32 cannot carry its products; the message
            ends with the model's number.
    """

    def __init__(self, pairs: Callable[[], Iterable[Pair]], weights_N: Sequence[float] | None = None) -> None:
        self._pairs = pairs
        self._exponents: list[tuple[int, int]] = []
        self._traces: list[tuple[float, float]] = []
        factors: list[tuple[float, int]] = []
        self._diagonal: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
        for model, pair in enumerate(pairs()):
            weight = 1.0 if weights_N is None or model >= len(weights_N) else weights_N[model]
            left, right = (_Moment(moment, model) for moment in pair)
            if left.used is not None and right.used is not None:
                # Many indefinite products look like those of a weak direction, and the iteration runs away on them.
                _require_semidefinite(pair, model)
            self._exponents.append((left.exponent, right.exponent))
            self._traces.append((left.trace * weight, right.trace))
            self._diagonal.append((left.used, right.used))
            factors.append((weight, left.exponent + right.exponent if left.trace and right.trace else -(1 << 30)))
        if weights_N is not None and len(weights_N) != len(factors):
            raise ValueError(f"{len(weights_N)} weights for {len(factors)} pairs of moments")
        self.exponent = max((e + math.frexp(weight)[1] for weight, e in factors if e > -(1 << 30)), default=0)
        self._factors = [math.ldexp(weight, e - self.exponent) if e > -(1 << 30) else 0.0 for weight, e in factors]

    @property
    def traces(self) -> tuple[float, ...]:
        """Of λᵢ Aᵢ times that of Bᵢ, an identity counting as 1: N numbers, before the division."""
        return tuple(left * right for left, right in self._traces)

    def null_directions(self, inputs: int, outputs: int) -> int:
        """Return how many elements of X no moment says anything about: those with a dead input or output everywhere.

        Args:
            inputs: I.
            outputs: O.
        """
        used_IO = torch.zeros((inputs, outputs), dtype=torch.bool)
        for left_I, right_O in self._diagonal:
            rows = slice(None) if left_I is None else left_I
            columns_O = torch.ones(outputs, dtype=torch.bool) if right_O is None else right_O
            used_IO[rows] |= columns_O
        return inputs * outputs - int(used_IO.sum())

    def __call__(self, x_IO: torch.Tensor) -> torch.Tensor:
        """Return the product, in the dtype and on the device of X."""
        return self._sum(repeat(x_IO), x_IO)

    def right_hand_side(self, values: Iterable[torch.Tensor]) -> torch.Tensor:
        """Return Σ λᵢ Aᵢ Xᵢ Bᵢ divided by the same power of two.

        Args:
            values: The N matrices Xᵢ (I, O), one at a time.

        Raises:
            ValueError: There are more or fewer than N of them.
        """
        left, count = iter(values), len(self._factors)
        first = next(left, None)
        if first is None:
            raise ValueError(f"0 matrices for {count} pairs of moments")
        remaining = iter(_chained(first, left))
        result = self._sum(remaining, first)
        if next(remaining, None) is not None:
            raise ValueError(f"more than {count} matrices for {count} pairs of moments")
        return result

    def _sum(self, values: Iterable[torch.Tensor], like_IO: torch.Tensor) -> torch.Tensor:
        sum_IO = torch.zeros_like(like_IO, memory_format=torch.contiguous_format)
        matrices = iter(values)
        for model, (left_II, right_OO) in enumerate(self._pairs()):
            value_IO = next(matrices, None)
            if value_IO is None:
                raise ValueError(f"{model} matrices for {len(self._factors)} pairs of moments")
            factor, (left, right) = self._factors[model], self._exponents[model]
            if factor == 0.0:
                continue
            value_IO = value_IO.to(like_IO.dtype)
            if left_II is not None:
                # Powers of two: each scaling is exact.
                value_IO = (left_II.to(like_IO.dtype) @ value_IO).mul_(math.ldexp(1.0, -left))
            if right_OO is not None:
                scale = factor * math.ldexp(1.0, -right)
                sum_IO.addmm_(value_IO.contiguous(), right_OO.to(like_IO.dtype), alpha=scale)
            else:
                sum_IO.add_(value_IO, alpha=factor)
        return sum_IO


def _chained(first: torch.Tensor, rest: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    yield first
    yield from rest


def _require_semidefinite(pair: Pair, model: int) -> None:
    for moment_DD in pair:
        if moment_DD is not None:
            try:
                require_semidefinite(moment_DD)
            except ValueError as error:
                raise ValueError(f"{error}: model {model}") from error


class _Moment:
    """What the operator keeps of a moment: its trace, the exponent of its largest element, and where it is used."""

    __slots__ = ("exponent", "trace", "used")

    def __init__(self, moment_DD: torch.Tensor | None, model: int) -> None:
        self.exponent, self.trace = 0, 1.0
        self.used: torch.Tensor | None = None
        if moment_DD is None:
            return
        diagonal_D = moment_DD.diagonal().to(torch.float64)
        self.trace = float(diagonal_D.sum())
        # Not finite anywhere: the sum of all elements is not either, but for infinities that cancel into NaN.
        if not math.isfinite(float(moment_DD.sum(dtype=torch.float64))):
            raise ValueError(f"a moment has a value that is not finite: model {model}")
        if bool((diagonal_D < 0).any()):
            raise ValueError(f"a moment has a negative value on its diagonal: model {model}")
        self.used = (diagonal_D > 0).cpu()
        if self.trace > 0:
            # A positive semidefinite matrix has its largest element on the diagonal.
            self.exponent = math.frexp(float(diagonal_D.max()))[1]
        if abs(self.exponent) > _LARGEST_EXPONENT:
            raise ValueError(
                f"a moment's diagonal reaches 2^{self.exponent}, beyond 2^±{_LARGEST_EXPONENT}: model {model}"
            )
