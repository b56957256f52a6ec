"""What a recipe says of linear systems, as the plan's numbers.

Owns the translation of the method's rule, the start and the data sizes, and what is odd about statistics; which tensors
are solved is moments.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pipeline.errors import Problem, RecipeError
from pipeline.methods.base import LinearSystemMethod
from pipeline.planning.family import Aligned
from pipeline.planning.moments import Request, plan_moments
from pipeline.planning.plan import GroupPlan
from pipeline.planning.sources import Sources
from pipeline.planning.system import Solver, System
from pipeline.recipe import Recipe
from pipeline.recipe.content import STARTS
from pipeline.recipe.references import shown, split_model, without_credentials

# What the two groups are called: they only part the tensors by their treatment.
SOLVED, AVERAGED = "solved", "averaged"


def plan_solver(recipe: Recipe, method: LinearSystemMethod, sources: Sources) -> Solver:
    """Return how a recipe's systems are solved.

    Raises:
        RecipeError: A parameter is out of range, or an adapter is asked for.
    """
    if recipe.pipeline.output == "adapter":
        what = f"`pipeline.output: adapter` is not possible with {recipe.merge_method}: its result has full rank"
        raise RecipeError(Problem(what=what, remedy="leave it out to write a full model"))
    rule = method.rule(recipe)
    start = recipe.pipeline.start or "average"
    scale = recipe.pipeline.start_scale
    return Solver(
        rule=rule.rule,
        start=start if start in STARTS else "checkpoint",
        start_scale=1.0 if scale is None else scale,
        start_input=sources.start,
        iterations=rule.iterations,
        tolerance=rule.tolerance,
        off_diagonal=rule.off_diagonal,
        normalize=rule.normalize,
        prior=rule.prior,
    )


def plan_systems(
    recipe: Recipe,
    method: LinearSystemMethod,
    tensors: Sequence[Aligned],
    shared: Sequence[int | None],
    sources: Sources,
) -> tuple[System | None, ...]:
    """Return every tensor's system; None where it is averaged or copied.

    Raises:
        CheckpointError: Statistics are missing or do not fit.
        RecipeError: A pattern matches no tensor.
    """
    anchored = method.rule(recipe).rule == "gradient_matching"
    base_size = _number(recipe.parameters.get("data_size"))
    request = Request(
        objective=method.rule(recipe).objective,
        weights=method.weights(recipe),
        data_sizes=tuple(_number(entry.parameters.get("data_size", base_size)) for entry in recipe.models),
        base_size=base_size,
        anchored=anchored,
        average=recipe.pipeline.average or (),
    )
    return plan_moments(request, tensors, shared, sources)


def treatment_groups(
    tensors: Sequence[Aligned], systems: Sequence[System | None], weights: Sequence[float]
) -> tuple[tuple[GroupPlan, ...], tuple[int, ...]]:
    """Return the groups of solved and of averaged tensors, and each tensor's group (-1: copied).

    The coefficients of both are those of the weighted average.
    """
    labels = [
        (SOLVED if system is not None else AVERAGED) if aligned.merged else None
        for aligned, system in zip(tensors, systems, strict=True)
    ]
    order = {label: index for index, label in enumerate(dict.fromkeys(label for label in labels if label is not None))}
    shares = tuple(weight / math.fsum(weights) for weight in weights)
    groups = tuple(
        GroupPlan(
            name=label,
            elements=sum(a.reference.elements for a, own in zip(tensors, labels, strict=True) if own == label),
            coefficients=shares,
        )
        for label in order
    )
    return groups, tuple(-1 if label is None else order[label] for label in labels)


def statistics_notes(sources: Sources) -> Iterator[str]:
    """Yield what is legal but odd: statistics that name another model, or that were not all made alike."""
    used = [
        (sources.names[index], sources.statistics[number])
        for index, number in zip(sources.models, sources.moments, strict=False)
        if number is not None
    ]
    for name, opened in used:
        stated = opened.facts.model
        if _last(stated) != _last(split_model(name)[1] or split_model(name)[0]):
            of = without_credentials(name)
            yield f"the statistics {shown(opened.url)} say that they are of {shown(stated)}; they are used for {of}"
    for fact in ("labels", "reduction", "normalisation"):
        found = dict.fromkeys(str(getattr(opened.facts, fact)) for _, opened in used)
        if len(found) > 1:
            yield f"the models' statistics differ in {fact} ({', '.join(found)}): a hidden weight between the models"


def _last(path: str) -> str:
    """Return the last part of a path or URL."""
    return path.rstrip("/").rpartition("/")[2]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
