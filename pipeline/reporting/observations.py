"""What a finished merge shows about its inputs that its user should read: copies, and medians that are not unique.

Owns the sentences. Knows the solutions, never a parameter. Legend: P points.
"""

from __future__ import annotations

import numpy as np

from pipeline.engine.driver import Outcome
from pipeline.planning.plan import Plan

# Names in one sentence before the rest is counted.
_SHOWN = 4
# A mean norm this many times the median norm is made by one model or a few, not by the family.
_STRETCHED = 1.5


def observations(plan: Plan, outcome: Outcome) -> list[str]:
    """Return what is legal but worth saying, in the order of the points and groups; [] when nothing was measured."""
    return [
        *_replaced(plan, outcome),
        *_copies(plan, outcome),
        *_not_unique(plan, outcome),
        *_long_vectors(plan, outcome),
    ]


def _copies(plan: Plan, outcome: Outcome) -> list[str]:
    """Return a sentence for every model that holds the values of an earlier one, or of the base."""
    tables = [solution.distances for solution in outcome.solutions if solution.distances]
    if not tables or sum(group.elements for group in plan.groups) == 0:
        return []
    total_PP = np.add.reduce([np.array(table) for table in tables])
    names = [plan.inputs[index].name for index in plan.points]
    notes = []
    for row in range(1, len(names)):
        first = next((other for other in range(row) if total_PP[row, other] == 0.0), None)
        if first is not None and first < plan.offset:
            notes.append(f"{names[row]} has the same values as the base model, {names[first]}")
        elif first is not None:
            notes.append(f"{names[row]} has the same values as {names[first]}: a copy counts like a larger weight")
    return notes


def _replaced(plan: Plan, outcome: Outcome) -> list[str]:
    """Return a sentence for every model of which values were not finite and taken from the base."""
    names = [plan.inputs[index].name for index in plan.points]
    counts = [sum(record.replaced[row] for record in outcome.written) for row in range(len(names))]
    return [
        f"{name}: {count} values were NaN or infinite and taken from the base"
        for name, count in zip(names, counts, strict=True)
        if count
    ]


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
        norms = np.sqrt(np.array(solution.distances)[0, plan.offset :])
        if len(norms) > 2 and norms.mean() > _STRETCHED * np.median(norms):
            longest = plan.model_names()[int(norms.argmax())]
            times = norms.max() / np.median(norms)
            return [
                f"scale: norm follows the task vector of {longest}, {times:.3g} times as long as the median one;"
                " scale: median_norm does not"
            ]
    return []
