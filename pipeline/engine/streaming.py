"""The card's loop: every iteration measures the parameters again, and all groups iterate together.

Owns the lockstep of the groups' solvers; one reduction serves all of them. Legend: Q combinations, N models.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.methods import registry
from pipeline.numerics.geometric_median import MedianSolution
from pipeline.numerics.streamed_median import Measured, Probe
from pipeline.planning.plan import Plan

Reduce = Callable[[Mapping[int, np.ndarray]], dict[int, np.ndarray]]


def stream_groups(plan: Plan, groups: Sequence[int], reduce: Reduce) -> dict[int, MedianSolution]:
    """Return the medians of groups, found by iterations over the parameters.

    Args:
        plan: The plan.
        groups: Group indices.
        reduce: One pass: by group, coefficients (Q × N) in, the Q·N squared distances and then Q·Q products out, each
            the correctly rounded sum over all parameters.

    Raises:
        ConvergenceError: A group has no certificate within the allowed iterations.
    """
    method: Any = registry()[plan.settings.method]
    solvers: dict[int, Generator[Probe, Measured, MedianSolution]] = {}
    requests: dict[int, np.ndarray] = {}
    found: dict[int, MedianSolution] = {}
    for group in groups:
        solvers[group] = method.stream(plan.weights, tolerance=plan.settings.tolerance)
        _step(group, solvers, requests, found, None)
    while requests:
        totals = reduce(dict(requests))
        for group, coefficients in list(requests.items()):
            _step(group, solvers, requests, found, _measured(coefficients, totals.get(group)))
    return {group: found[group] for group in groups}


def _step(
    group: int,
    solvers: Mapping[int, Generator[Probe, Measured, MedianSolution]],
    requests: dict[int, np.ndarray],
    found: dict[int, MedianSolution],
    measured: Measured | None,
) -> None:
    """Advance one group's solver: its next request, or its result."""
    try:
        probe = next(solvers[group]) if measured is None else solvers[group].send(measured)
        requests[group] = np.asarray(probe.coefficients_PN)
    except StopIteration as stop:
        requests.pop(group, None)
        found[group] = stop.value


def _measured(coefficients_QN: np.ndarray, totals: np.ndarray | None) -> Measured:
    rows, models = coefficients_QN.shape
    # A group without elements leaves no sums: all its distances are 0.
    values = np.zeros(rows * models + rows * rows) if totals is None else totals
    return Measured(
        squared_distances_PN=values[: rows * models].reshape(rows, models),
        products_PP=values[rows * models :].reshape(rows, rows),
    )
