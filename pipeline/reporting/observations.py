"""What a finished merge shows about its inputs that its user should read: copies, and medians that are not unique.

Owns the sentences. Knows the solutions, never a parameter. Legend: P points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.engine.driver import Outcome
from pipeline.engine.run_folder import DISTANCES
from pipeline.engine.solutions import TABLE_MODELS
from pipeline.planning.plan import Plan
from pipeline.reporting.treatments import system_notes

# Names in one sentence before the rest is counted.
_SHOWN = 4
# Sentences of one kind, one a model, before the rest is counted.
_SENTENCES = 20
# A mean norm this many times the median norm is made by one model or a few, not by the family.
_STRETCHED = 1.5


def observations(plan: Plan, outcome: Outcome) -> list[str]:
    """Return what is legal but worth saying, in the order of the points and groups; [] when nothing was measured."""
    return [
        *_replaced(plan, outcome),
        *_copies(plan, outcome),
        *_not_unique(plan, outcome),
        *_long_vectors(plan, outcome),
        *_left_out(plan, outcome),
        *_cut_off(plan, outcome),
        *system_notes(plan, [record for written in outcome.written for record in written.systems]),
    ]


def discarded_share(squares: Sequence[float]) -> float:
    """Return the share of a squared norm that truncation cut off, from that part and the whole."""
    cut, whole = squares
    return cut / whole if whole > 0.0 else 0.0


def _cut_off(plan: Plan, outcome: Outcome) -> list[str]:
    """Return a sentence on what the truncation of a merged adapter's factors has cost."""
    squares = {index: pair for record in outcome.written for index, pair in record.discarded.items()}
    shares = {index: discarded_share(pair) for index, pair in squares.items()}
    if plan.settings.rank is None or not shares:
        return []
    worst = max(shares, key=lambda index: shares[index])
    return [
        f"rank {plan.settings.rank} cuts off at most {shares[worst]:.2%} of the squared norm of a module's update,"
        f" in {plan.tensors[worst].name}; the exact rank is {max(sum(u.rank for u in t.updates) for t in plan.tensors)}"
    ]


def _first(sentences: list[str], rest: str) -> list[str]:
    """Return the first of the sentences and one that counts the others."""
    more = len(sentences) - _SENTENCES
    return [*sentences[:_SENTENCES], f"{more} more {rest}"] if more > 0 else sentences


def _copies(plan: Plan, outcome: Outcome) -> list[str]:
    """Return a sentence for every model that holds the values of an earlier one, or of the base."""
    tables = [solution.distances for solution in outcome.solutions if solution.distances.size]
    if not tables or sum(group.elements for group in plan.groups) == 0:
        return []
    total_PP = np.zeros_like(tables[0])
    for table in tables:
        total_PP += table
    names = [plan.inputs[index].name for index in plan.points]
    same_PP = np.tril(total_PP == 0.0, k=-1)
    notes = []
    if plan.settings.metric is not None and len(names) > 1 and not total_PP.any():
        return ["in the metric all models lie in one place: the result is their weighted mean"]
    same = "has the same values as" if plan.settings.metric is None else "lies, in the metric, where"
    there = "" if plan.settings.metric is None else " does"
    for row in np.flatnonzero(same_PP.any(axis=1)).tolist():
        first = int(np.argmax(same_PP[row]))
        if first < plan.offset:
            base = f"the base model, {names[first]}" if not there else f"the base model {names[first]}"
            notes.append(f"{names[row]} {same} {base}{there}")
        else:
            notes.append(f"{names[row]} {same} {names[first]}{there}: a copy counts like a larger weight")
    return _first(notes, "models have the same values as the base or as an earlier model")


def _replaced(plan: Plan, outcome: Outcome) -> list[str]:
    """Return a sentence for every model of which values were not finite and taken from the base."""
    names = [plan.inputs[index].name for index in plan.points]
    counts = [sum(record.replaced[row] for record in outcome.written) for row in range(len(names))]
    notes = [
        f"{name}: {count} values were NaN or infinite and taken from the base"
        for name, count in zip(names, counts, strict=True)
        if count
    ]
    return _first(notes, "models had values that were NaN or infinite and taken from the base")


def _not_unique(plan: Plan, outcome: Outcome) -> list[str]:
    solutions = [
        solution for solution in outcome.solutions if solution.median is not None and not solution.median.unique
    ]
    if not solutions:
        return []
    names = [plan.groups[solution.group].name for solution in solutions]
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [
        f"the geometric median is not unique in {', '.join(names[:_SHOWN])}{more}: every point between two models is as"
        " good; the middle was taken"
    ]


def _long_vectors(plan: Plan, outcome: Outcome) -> list[str]:
    """Return a warning when `scale: norm` follows a few task vectors that are much longer than the others."""
    if plan.settings.scale != "norm":
        return []
    for solution in outcome.solutions:
        if not solution.distances.size:
            continue
        norms = np.sqrt(solution.distances[0, plan.offset :])
        if len(norms) > 2 and norms.mean() > _STRETCHED * np.median(norms):
            longest = plan.model_names()[int(norms.argmax())]
            times = norms.max() / np.median(norms)
            return [
                f"scale: norm follows the task vector of {longest}, {times:.3g} times as long as the median one;"
                " scale: median_norm does not"
            ]
    return []


def _left_out(plan: Plan, outcome: Outcome) -> list[str]:
    """Return where the pairs of a large family are to be found."""
    measured = any(solution.distances.size for solution in outcome.solutions)
    if not (plan.offset and measured and len(plan.models) > TABLE_MODELS):
        return []
    return [
        f"the cosines of more than {TABLE_MODELS} models are left out of the report: {DISTANCES} has the distances of"
        " all pairs"
    ]
