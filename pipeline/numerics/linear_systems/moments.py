"""What is added up, model by model, for a system with one moment per matrix: Σ λᵢCᵢ and Σ λᵢCᵢXᵢ.

Owns the two accumulators, in float64, and moments made from the weights alone; must not know where moments come from.
Legend: I inputs, O outputs; a weight W is stored (O, I), and X = Wᵀ.
"""

from __future__ import annotations

import math

import torch

from pipeline.numerics.linear_systems.dense import FLOAT32_ROUNDING, DenseSolution, require_semidefinite, solve_dense
from pipeline.numerics.linear_systems.kronecker import KroneckerOperator, Pair


class GramSystem:
    """(Σ λᵢCᵢ) X = Σ λᵢCᵢXᵢ of one matrix.

    Give differences from one reference as the values, and the start relative to it: what models have in common takes
    no digits then, and equal models give exactly zero.

    Args:
        inputs: I.
        outputs: O.
        device: torch's name of where to add up.
    """

    __slots__ = ("_traces", "moment_II", "rhs_IO")

    def __init__(self, inputs: int, outputs: int, *, device: str = "cpu") -> None:
        self.moment_II = torch.zeros((inputs, inputs), dtype=torch.float64, device=device)
        self.rhs_IO = torch.zeros((inputs, outputs), dtype=torch.float64, device=device)
        self._traces: list[float] = []

    def add(self, moment_II: torch.Tensor, values_IO: torch.Tensor, weight: float = 1.0) -> None:
        """Add one model.

        Args:
            moment_II: C, symmetric, not changed.
            values_IO: X of the model, any float dtype.
            weight: λ, positive.

        Raises:
            ValueError: The shapes are others, or a value of the moment is not finite.
        """
        if moment_II.shape != self.moment_II.shape or values_IO.shape != self.rhs_IO.shape:
            shapes = f"{tuple(moment_II.shape)} and {tuple(values_IO.shape)}"
            raise ValueError(f"moment and values of shapes {shapes} belong to another matrix")
        if not bool(torch.isfinite(moment_II).all()):
            raise ValueError("the moment has a value that is not finite")
        # The weight is in float64 already when the product is made: both sums see the same rounded moment.
        weighted_II = moment_II.to(torch.float64) * weight
        self._traces.append(float(weighted_II.diagonal().sum()))
        self.moment_II += weighted_II
        self.rhs_IO.addmm_(weighted_II, values_IO.to(torch.float64))

    @property
    def traces(self) -> tuple[float, ...]:
        """Of λᵢCᵢ, in the order they were added."""
        return tuple(self._traces)

    @property
    def null_directions(self) -> int:
        """How many inputs no moment says anything about; more directions may be null, which only a solve finds."""
        return int((self.moment_II.diagonal() <= 0).sum())

    def solve(self, start_IO: torch.Tensor, *, rounding: float = FLOAT32_ROUNDING) -> DenseSolution:
        """Return the direct solution; see `solve_dense`."""
        return solve_dense(self.moment_II, self.rhs_IO, start_IO, rounding=rounding)

    def narrowed(self) -> tuple[KroneckerOperator, torch.Tensor]:
        """Return the system in float32, divided by a power of two, for an iterative solve: operator, right-hand side.

        The sums in float64 are given up: the system takes no further model.

        Raises:
            ValueError: The sum of the moments is indefinite beyond rounding, which an iteration would run away on.
        """
        require_semidefinite(self.moment_II)
        largest = float(self.moment_II.diagonal().max()) if self.moment_II.numel() else 0.0
        scale = math.ldexp(1.0, -math.frexp(largest)[1])
        narrow: Pair = (self.moment_II.mul_(scale).to(torch.float32), None)
        rhs_IO = self.rhs_IO.mul_(scale).to(torch.float32)
        self.moment_II, self.rhs_IO = self.moment_II[:0, :0].clone(), self.rhs_IO[:0].clone()
        operator = KroneckerOperator(lambda: (narrow,))
        # What the operator divides by once more is a power of two as well.
        return operator, rhs_IO.mul_(math.ldexp(1.0, -operator.exponent))


def weight_moment(delta_IO: torch.Tensor) -> torch.Tensor:
    """Return ΔΔᵀ/‖Δ‖² of a task vector in X layout, that is ΔᵀΔ/‖Δ‖² of the weight as stored.

    Args:
        delta_IO: The task vector of one matrix, transposed, any float dtype.

    Returns:
        (I, I) float64, of trace 1; zeros for a task vector of zeros.

    Source:
        Cheng et al. 2025 (WUDI): with it the minimiser of their loss has a closed form.
    """
    wide_IO = delta_IO.to(torch.float64)
    largest = float(wide_IO.abs().max()) if wide_IO.numel() else 0.0
    if largest == 0.0:
        return torch.zeros((len(wide_IO), len(wide_IO)), dtype=torch.float64, device=delta_IO.device)
    # Elements near 1: the squares of a task vector in any unit are in range.
    wide_IO = wide_IO * math.ldexp(1.0, -math.frexp(largest)[1])
    moment_II = wide_IO @ wide_IO.T
    return moment_II.div_(moment_II.diagonal().sum())
