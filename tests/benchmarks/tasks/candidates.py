"""The methods of the comparison and the settings that each may choose from on validation rows. Knows no models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.benchmarks.tasks.merging import Candidate

_SCALES = (0.3, 0.4, 0.5, 0.6, 0.8)
_MEDIAN_SCALES: tuple[float, ...] = (1.0, 2.0, 3.0)
_OFF_DIAGONALS = (0.1, 0.5, 0.9, 1.0)


def average(count: int) -> list[Candidate]:
    """Return the plain mean."""
    return [Candidate(setting="", words={"merge_method": "linear"}, weights=(1.0,) * count)]


def task_arithmetic(count: int) -> list[Candidate]:
    """Return base + λ · the sum of the updates, written as a sum of models whose weights add up to 1."""
    return [_arithmetic(count, scale) for scale in _SCALES]


def median(metric: str | None) -> list[Candidate]:
    """Return the geometric median, plain or in a metric, without and with a scale on its update."""
    found = []
    for scale in _MEDIAN_SCALES:
        words: dict[str, Any] = {"scale": scale}
        if metric is not None:
            words["metric"] = {"kind": "diagonal", "statistics": metric}
        found.append(Candidate(setting=f"λ = {scale:g}", words=_words("geometric_median", {}, words)))
    return found


def fisher() -> list[Candidate]:
    """Return the Fisher-weighted average, with the Fishers as they are and with each of length 1."""
    return [
        Candidate(setting=text, words=_words("fisher", {"normalize": normalize}, {}), statistics="fisher")
        for normalize, text in ((False, "as they are"), (True, "normalised"))
    ]


def regmean() -> list[Candidate]:
    """Return the closed form with off-diagonals of the Grams scaled."""
    return [
        Candidate(setting=f"off-diagonal {a:g}", words=_words("regmean", {"off_diagonal": a}, {}), statistics="gram")
        for a in _OFF_DIAGONALS
    ]


def mats(
    objective: str, scale: float, iterations: Sequence[int], weights: tuple[float, ...] | None = None
) -> list[Candidate]:
    """Return conjugate gradient from the average and from task arithmetic with the given scale."""
    starts: list[tuple[str, dict[str, Any]]] = [
        ("average", {"start": "average"}),
        (f"task arithmetic {scale:g}", {"start": "task_arithmetic", "start_scale": scale}),
    ]
    return [
        Candidate(
            setting=f"{text}, {most} iterations",
            words=_words("mats", {"objective": objective, "iterations": most}, words),
            statistics=objective,
            weights=weights,
        )
        for text, words in starts
        for most in iterations
    ]


def wudi() -> list[Candidate]:
    """Return the closed form whose moments are the updates' own: no data."""
    return [Candidate(setting="", words=_words("wudi", {}, {}))]


def scale_of(candidate: Candidate) -> float:
    """Return the scale of a task arithmetic."""
    assert candidate.weights is not None
    return candidate.weights[0]


def plan(
    count: int, metric: str, iterations: Sequence[int], weights: Callable[[], tuple[float, ...]]
) -> dict[str, Callable[[float], list[Candidate]]]:
    """Return every method's candidates, given the scale that task arithmetic has chosen, in order.

    Args:
        count: Of models.
        metric: The folder of the metric median's statistics.
        iterations: Of MaTS, to choose from.
        weights: Gives those that make the models' K-FAC pairs of one size.
    """
    return {
        "average": lambda _: average(count),
        "task arithmetic": lambda _: task_arithmetic(count),
        "geometric median": lambda _: median(None)[:1],
        "geometric median with a scale": lambda _: median(None),
        "metric median": lambda _: median(metric)[:1],
        "metric median with a scale": lambda _: median(metric),
        "Fisher": lambda _: fisher(),
        "WUDI": lambda _: wudi(),
        "RegMean": lambda _: regmean(),
        "MaTS gram": lambda scale: mats("gram", scale, iterations),
        "MaTS kfac": lambda scale: mats("kfac", scale, iterations),
        "MaTS kfac of one size": lambda scale: mats("kfac", scale, iterations, weights()),
    }


def _arithmetic(count: int, scale: float) -> Candidate:
    return Candidate(
        setting=f"λ = {scale:g}",
        words=_words("linear", {"normalize": False}, {}),
        weights=(scale,) * count,
        base_weight=1 - count * scale,
    )


def _words(method: str, parameters: dict[str, Any], pipeline: dict[str, Any]) -> dict[str, Any]:
    words: dict[str, Any] = {"merge_method": method}
    if parameters:
        words["parameters"] = parameters
    if pipeline:
        words["pipeline"] = pipeline
    return words
