"""From a group's distances to its coefficients, certificate and geometry.

Owns what is kept of a solved group and the scale λ. Pure; runs in the driver, or in a worker for a fused file. Legend:
P points (base first where there is one), N models.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.engine.run_folder import square, triangle
from pipeline.errors import CheckpointError, Problem
from pipeline.methods.base import GramMethod
from pipeline.numerics.geometric_median import Iteration, MedianSolution
from pipeline.planning.plan import Plan

# At this ratio the near models' distances keep eight digits of the far one's pull.
_FAR = 1e8
# Tables of pairs for people to read: a thousand models have half a million pairs, which only programs read.
TABLE_MODELS = 64
# The name of packed distances says how to unpack them.
_PACKED = "upper_triangle_float64_little_endian_base64"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """A solved group; equal to another of the same numbers.

    Attributes:
        factors: P factors of the points in what is written: λcᵢ, and 1 − λ for the base.
        scale: λ.
        median: Coefficients and certificate; None for a method that measures nothing.
        distances: (P, P) float64 squared distances, symmetric; of no elements when nothing was measured.
    """

    group: int
    factors: tuple[float, ...]
    coefficients: tuple[float, ...]
    scale: float
    median: MedianSolution | None
    distances: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Solution):
            return NotImplemented
        mine, theirs = ((one.group, one.factors, one.coefficients, one.scale, one.median) for one in (self, other))
        return mine == theirs and np.array_equal(self.distances, other.distances)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "group": self.group,
            "factors": self.factors,
            "coefficients": self.coefficients,
            "scale": self.scale,
            "median": None if self.median is None else dataclasses.asdict(self.median),
            "distances": _distances_to_json(self.distances),
        }


def fixed_solution(plan: Plan, group: int) -> Solution:
    """Return the solution of a group whose coefficients the recipe decides."""
    coefficients = plan.groups[group].coefficients or ()
    return Solution(
        group=group,
        factors=(0.0,) * plan.offset + coefficients,
        coefficients=coefficients,
        scale=1.0,
        median=None,
    )


def solve_group(plan: Plan, method: GramMethod, group: int, distances_PP: np.ndarray) -> Solution:
    """Solve one group on its table of squared distances.

    Raises:
        ConvergenceError: No certificate within the recipe's tolerance.
    """
    refuse_far(plan, group, distances_PP)
    models_NN = distances_PP[plan.offset :, plan.offset :]
    median = method.solve(models_NN, plan.weights, tolerance=plan.settings.tolerance)
    return with_median(plan, group, distances_PP, median)


def refuse_far(plan: Plan, group: int, distances_PP: np.ndarray) -> None:
    """Raise when a model lies so far from the others that the distances no longer tell the others apart.

    Squared distances to it share their first sixteen digits, and what distinguishes the near models is lost. The near
    ones are the smallest ball around a model that holds more than half of the weight; copies of its centre count.

    Raises:
        CheckpointError: Names the model. It is broken: no fine-tune is a hundred million times the others' spread away.
    """
    models_NN = distances_PP[plan.offset :, plan.offset :]
    weights_N = np.asarray(plan.weights)
    radii = []
    for row in models_NN:
        order = np.argsort(row, kind="stable")
        reached = int(np.searchsorted(np.cumsum(weights_N[order]), 0.5 * weights_N.sum(), side="right"))
        radii.append(float(row[order[min(reached, len(row) - 1)]]))
    centre = int(np.argmin(radii))
    spread = radii[centre]
    far = np.flatnonzero(models_NN[centre] > _FAR**2 * spread).tolist() if spread > 0 else []
    if far:
        raise CheckpointError(
            *(
                Problem(
                    what=f"lies {math.sqrt(models_NN[centre, index] / spread):.2g} times farther away"
                    " than most other models from one another: more than distances can resolve",
                    where=f"model {plan.inputs[plan.models[index]].name}, group {plan.groups[group].name}",
                    remedy="its values are damaged; leave it out",
                )
                for index in far
            )
        )


def with_median(plan: Plan, group: int, distances_PP: np.ndarray, median: MedianSolution) -> Solution:
    """Return the solution that a median found elsewhere gives: its factors under the recipe's scale."""
    scale = plan.settings.scale
    if isinstance(scale, str):
        scale = _norm_scale(scale, distances_PP, median.coefficients, plan.weights)
    factors = tuple(scale * coefficient for coefficient in median.coefficients)
    return Solution(
        group=group,
        factors=((1.0 - scale,) if plan.offset else ()) + factors,
        coefficients=median.coefficients,
        scale=scale,
        median=median,
        distances=distances_PP,
    )


def geometry(plan: Plan, solution: Solution) -> tuple[list[float] | None, list[list[float | None]] | None]:
    """Return the task vectors' norms (N) and cosines (N × N), None without a base.

    A cosine with a vector of length 0 is None. There are no cosines of more than `TABLE_MODELS` models.
    """
    if not plan.offset or not solution.distances.size:
        return None, None
    distances_PP = solution.distances
    squared_N = distances_PP[0, 1:]
    norms_N = np.sqrt(squared_N)
    if len(norms_N) > TABLE_MODELS:
        return norms_N.tolist(), None
    gram_NN = 0.5 * (squared_N[:, None] + squared_N[None, :] - distances_PP[1:, 1:])
    products_NN = np.outer(norms_N, norms_N)
    # One length of zero, or two that are so small that their product is.
    directed_NN = products_NN > 0
    cosines_NN = np.clip(np.divide(gram_NN, products_NN, out=np.zeros_like(gram_NN), where=directed_NN), -1.0, 1.0)
    np.fill_diagonal(cosines_NN, 1.0)
    return norms_N.tolist(), [
        [cosine if directed else None for cosine, directed in zip(*row, strict=True)]
        for row in zip(cosines_NN.tolist(), directed_NN.tolist(), strict=True)
    ]


def predicted_distances(solution: Solution) -> np.ndarray:
    """Return the P distances from Σ aᵢxᵢ to the points, from the table alone: r² = Da − ½aᵀDa for Σa = 1."""
    distances_PP = solution.distances
    factors_P = np.array(solution.factors)
    products_P = distances_PP @ factors_P
    distances_P: np.ndarray = np.sqrt(np.maximum(products_P - 0.5 * factors_P @ products_P, 0.0))
    return distances_P


def solution_from_json(data: Mapping[str, Any]) -> Solution:
    """Return a solution saved by `Solution.to_json`."""
    median = data["median"]
    if median is not None:
        fields = {**median, "history": tuple(Iteration(**entry) for entry in median["history"])}
        for name in ("coefficients", "distances"):
            fields[name] = tuple(fields[name])
        median = MedianSolution(**fields)
    return Solution(
        group=data["group"],
        factors=tuple(data["factors"]),
        coefficients=tuple(data["coefficients"]),
        scale=data["scale"],
        median=median,
        distances=_distances_from_json(data["distances"]),
    )


def _distances_to_json(distances_PP: np.ndarray) -> list[list[float]] | dict[str, Any]:
    """Return squared distances as nested lists, or for many points as the upper triangle's bytes."""
    points = len(distances_PP)
    if points <= TABLE_MODELS:
        rows: list[list[float]] = distances_PP.tolist()
        return rows
    return {"points": points, _PACKED: base64.b64encode(triangle(distances_PP).astype("<f8").tobytes()).decode("ascii")}


def _distances_from_json(data: Sequence[Sequence[float]] | Mapping[str, Any]) -> np.ndarray:
    """Return what `_distances_to_json` was given."""
    if isinstance(data, Mapping):
        return square(np.frombuffer(base64.b64decode(data[_PACKED]), dtype="<f8"), data["points"])
    return np.array(data, dtype=np.float64).reshape(len(data), len(data))


def _norm_scale(
    rule: str, distances_PP: np.ndarray, coefficients_N: Sequence[float], weights_N: Sequence[float]
) -> float:
    """Return λ such that ‖λ·median‖ is the weighted mean ("norm") or median ("median_norm") of the norms.

    1 when the median is the base: no λ lengthens it then.
    """
    squared_N = distances_PP[0, 1:]
    # Inner products around the base: a far model of small coefficient costs no digits.
    gram_NN = 0.5 * (squared_N[:, None] + squared_N[None, :] - distances_PP[1:, 1:])
    coefficients = np.asarray(coefficients_N)
    length = math.sqrt(max(0.0, float(coefficients @ gram_NN @ coefficients)))
    wanted = (_weighted_mean if rule == "norm" else _weighted_median)(np.sqrt(squared_N).tolist(), weights_N)
    # Below this the length is rounding.
    return wanted / length if length > 1e-7 * wanted else 1.0


def _weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


def _weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the value with at most half of the weight on either side; the middle of two where they tie."""
    half = 0.5 * math.fsum(weights)
    below = 0.0
    ordered = sorted(zip(values, weights, strict=True))
    for (value, weight), following in zip(ordered, [*ordered[1:], ordered[-1]], strict=True):
        below += weight
        if math.isclose(below, half, rel_tol=1e-12):
            return 0.5 * (value + following[0])
        if below > half:
            return value
    return ordered[-1][0]
