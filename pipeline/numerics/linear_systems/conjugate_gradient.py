"""Conjugate gradients for C X = B, interruptible at every iteration without a changed bit.

Owns the recurrence, its stopping rule and its state; must not know what C is. Vectors have the dtype of the right-hand
side, float32 as a rule; all numbers made of them are float64, summed in an order that the shape alone fixes. Start and
number of iterations are part of the result: it minimises the energy over start + Krylov space, and what C does not see
stays as it was. Legend: I inputs, O outputs, R rows, K elements of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Elements of one partial sum; torch adds so few in one thread whatever the number of threads.
_BLOCK = 1 << 14
# Partial sums made in one step: their float64 copies of 16 MiB stay small beside any large matrix.
_BLOCKS_AT_ONCE = 128
# The true residual must fall by this much between two restarts, or rounding is all that is left.
_PROGRESS = 0.5
# Where the recurrence's residual is farther from the true one than this share of itself, it tells nothing any more.
_LOST = 0.5
# A curvature below zero by more than this share of the largest seen is no rounding: C is indefinite.
_LARGEST_NEGATIVE = 1e-3

CONVERGED = "converged"
ITERATIONS = "iterations"
NULL_DIRECTION = "null direction"
ROUNDING = "rounding"


@dataclass(frozen=True, slots=True, kw_only=True)
class CgState:
    """All that the next iteration depends on. Numbers are to be stored to the last bit.

    Attributes:
        x_IO: The iterate.
        r_IO: Its residual by the recurrence.
        p_IO: The direction of the next step.
        iterations: Steps made.
        rho: ‖r‖².
        size: max(‖b‖, ‖r₀‖), what residuals are relative to.
        largest: The largest pᵀCp / pᵀp seen.
        claimed: The true residual norm at the last restart; infinite before the first.
    """

    x_IO: torch.Tensor
    r_IO: torch.Tensor
    p_IO: torch.Tensor
    iterations: int
    rho: float
    size: float
    largest: float
    claimed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CgSolution:
    """Where the iteration ended.

    Attributes:
        x_IO: The last iterate.
        iterations: Steps made, those before a resume included.
        converged: Whether the true residual met the tolerance.
        relative_residual: ‖b − Cx‖ / max(‖b‖, ‖r₀‖), from x itself; 0 of 0 is 0.
        stopped: "converged", "iterations" (all were made), "null direction" (C does not see the rest of the
            residual) or "rounding" (the tolerance is below what the dtype resolves).
    """

    x_IO: torch.Tensor
    iterations: int
    converged: bool
    relative_residual: float
    stopped: str


def conjugate_gradient(
    apply: Callable[[torch.Tensor], torch.Tensor],
    rhs_IO: torch.Tensor,
    start_IO: torch.Tensor,
    *,
    iterations: int,
    tolerance: float,
    refresh: int = 20,
    state: CgState | None = None,
    save: Callable[[CgState], None] | None = None,
) -> CgSolution:
    """Solve C X = B by conjugate gradients.

    It ends when ‖b − Cx‖ ≤ tolerance · max(‖b‖, ‖r₀‖): nothing absolute, so that a common factor of C changes nothing.

    Args:
        apply: X ↦ C X, C symmetric and positive semidefinite; a new tensor each time.
        rhs_IO: B, float32 or float64; not changed.
        start_IO: The first iterate, of the same dtype; not changed.
        iterations: Most steps.
        tolerance: Largest relative residual, positive.
        refresh: Steps after which the residual is compared with that of x, and the iteration begun anew if it is lost.
        state: Where an earlier solve of this system was; the start is not looked at then.
        save: Called after every step with the state, whose tensors the next step overwrites: copy or write them.

    Returns:
        The last iterate; the same bits whether the solve was interrupted or not.

    Raises:
        ValueError: Shapes or dtypes differ, a product is not finite, or C turns out to be indefinite beyond rounding.

    Source:
        Hestenes & Stiefel 1952; Tam, Bansal & Raffel 2024 (MaTS).
    """
    _require_system(rhs_IO, start_IO if state is None else state.x_IO)
    run = _Run(apply, rhs_IO, tolerance)
    current = run.begin(start_IO) if state is None else _copied(state)
    stopped = ""
    while not stopped:
        current, stopped = run.settled(current)
        if not stopped and current.iterations >= iterations:
            stopped = ITERATIONS
        if stopped:
            break
        following = run.step(current, refresh)
        if isinstance(following, str):
            stopped = following
            break
        current = following
        if save is not None:
            save(current)
    residual = run.residual(current.x_IO)
    norm = math.sqrt(dot(residual, residual))
    return CgSolution(
        x_IO=current.x_IO,
        iterations=current.iterations,
        converged=norm <= tolerance * current.size,
        relative_residual=norm / current.size if current.size else 0.0,
        stopped=CONVERGED if norm <= tolerance * current.size else stopped,
    )


def dot(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return Σ first · second in float64, in blocks of a fixed size, added up exactly.

    Args:
        first: Any shape and float dtype.
        second: As many elements.
    """
    left, right = first.reshape(-1), second.reshape(-1)
    whole = left.numel() // _BLOCK * _BLOCK
    sums: list[float] = []
    for begin in range(0, whole, _BLOCK * _BLOCKS_AT_ONCE):
        end = min(whole, begin + _BLOCK * _BLOCKS_AT_ONCE)
        products_RK = left[begin:end].to(torch.float64) * right[begin:end].to(torch.float64)
        sums += products_RK.view(-1, _BLOCK).sum(dim=1).tolist()
    sums.append(float((left[whole:].to(torch.float64) * right[whole:].to(torch.float64)).sum()))
    return math.fsum(sums) if all(map(math.isfinite, sums)) else math.nan


class _Run:
    """The system of one solve."""

    __slots__ = ("_apply", "_rhs_IO", "_tolerance")

    def __init__(self, apply: Callable[[torch.Tensor], torch.Tensor], rhs_IO: torch.Tensor, tolerance: float) -> None:
        self._apply, self._rhs_IO, self._tolerance = apply, rhs_IO, tolerance

    def residual(self, x_IO: torch.Tensor) -> torch.Tensor:
        """Return b − Cx."""
        return self._apply(x_IO).neg_().add_(self._rhs_IO)

    def begin(self, start_IO: torch.Tensor) -> CgState:
        """Return the state before the first step."""
        # Memory of torch's own making is aligned; the bits of a product may depend on that.
        x_IO = start_IO.clone(memory_format=torch.contiguous_format)
        r_IO = self.residual(x_IO) if bool(x_IO.any()) else self._rhs_IO.clone(memory_format=torch.contiguous_format)
        rho = _finite(dot(r_IO, r_IO))
        size = math.sqrt(max(rho, _finite(dot(self._rhs_IO, self._rhs_IO))))
        return CgState(
            x_IO=x_IO, r_IO=r_IO, p_IO=r_IO.clone(), iterations=0, rho=rho, size=size, largest=0.0, claimed=math.inf
        )

    def settled(self, state: CgState) -> tuple[CgState, str]:
        """Return why to stop, if so; a claim of convergence is checked on x itself, and the step restarted if false."""
        limit = self._tolerance * state.size
        if math.sqrt(state.rho) > limit:
            return state, ""
        if state.rho == 0.0 and state.iterations == 0:
            return state, CONVERGED
        r_IO = self.residual(state.x_IO)
        rho = _finite(dot(r_IO, r_IO))
        if math.sqrt(rho) <= limit:
            return state, CONVERGED
        again = self._restarted(state, r_IO, rho, iterations=state.iterations, largest=state.largest)
        return (state, again) if isinstance(again, str) else (again, "")

    def _restarted(
        self, state: CgState, r_IO: torch.Tensor, rho: float, *, iterations: int, largest: float
    ) -> CgState | str:
        """Return the state that begins anew at the true residual, or why to stop: it no longer falls."""
        norm = math.sqrt(rho)
        if norm > _PROGRESS * state.claimed:
            return ROUNDING
        state.r_IO.copy_(r_IO)
        state.p_IO.copy_(r_IO)
        return _with(state, iterations=iterations, rho=rho, largest=largest, claimed=norm)

    def step(self, state: CgState, refresh: int) -> CgState | str:
        """Return the state after one more step, its tensors overwritten, or why there is none."""
        x_IO, r_IO, p_IO = state.x_IO, state.r_IO, state.p_IO
        product_IO = self._apply(p_IO)
        curvature, length = _finite(dot(p_IO, product_IO)), dot(p_IO, p_IO)
        if state.largest and curvature < -_LARGEST_NEGATIVE * state.largest * length:
            share = curvature / length / state.largest
            raise ValueError(f"a direction has {share:.2g} times the largest curvature; moments have none below zero")
        # Below this the products of the dtype cannot tell the curvature from zero.
        if curvature <= torch.finfo(p_IO.dtype).eps * state.largest * length or curvature <= 0.0:
            return NULL_DIRECTION
        largest = max(state.largest, curvature / length)
        x_IO.add_(p_IO, alpha=state.rho / curvature)
        r_IO.sub_(product_IO, alpha=state.rho / curvature)
        del product_IO
        rho = _finite(dot(r_IO, r_IO))
        if (state.iterations + 1) % refresh == 0:
            true_IO = self.residual(x_IO)
            true = _finite(dot(true_IO, true_IO))
            # Directions are conjugate by the recurrence: another residual beside them lets the iterate grow without
            # bound. Where it has lost the true one, both begin anew.
            if true - 2.0 * dot(true_IO, r_IO) + rho > _LOST**2 * rho:
                return self._restarted(state, true_IO, true, iterations=state.iterations + 1, largest=largest)
        p_IO.mul_(rho / state.rho).add_(r_IO)
        return _with(state, iterations=state.iterations + 1, rho=rho, largest=largest, claimed=state.claimed)


def _with(state: CgState, *, iterations: int, rho: float, largest: float, claimed: float) -> CgState:
    return CgState(
        x_IO=state.x_IO,
        r_IO=state.r_IO,
        p_IO=state.p_IO,
        iterations=iterations,
        rho=rho,
        size=state.size,
        largest=largest,
        claimed=claimed,
    )


def _copied(state: CgState) -> CgState:
    """Return a state with tensors of its own, in memory that is aligned as if it had never been stored."""
    return CgState(
        x_IO=state.x_IO.clone(memory_format=torch.contiguous_format),
        r_IO=state.r_IO.clone(memory_format=torch.contiguous_format),
        p_IO=state.p_IO.clone(memory_format=torch.contiguous_format),
        iterations=state.iterations,
        rho=state.rho,
        size=state.size,
        largest=state.largest,
        claimed=state.claimed,
    )


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("a product of the system is not finite")
    return value


def _require_system(rhs_IO: torch.Tensor, start_IO: torch.Tensor) -> None:
    if rhs_IO.shape != start_IO.shape or rhs_IO.dtype != start_IO.dtype:
        found = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in (rhs_IO, start_IO)]
        raise ValueError(f"right-hand side and start must be alike, not {found}")
    if rhs_IO.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the iteration is made in float32 or float64, not in {rhs_IO.dtype}")
