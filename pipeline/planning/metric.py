"""Which tensors distances are measured in, and by which statistics.

Owns the choice, what is wrong with it, and what the user is told. Knows headers, never a statistic's value.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.checkpoints.statistics import StatisticEntry, Statistics
from pipeline.checkpoints.statistics_facts import Kind
from pipeline.errors import CheckpointError, Problem, RecipeError
from pipeline.planning.family import Aligned
from pipeline.planning.moments import matched, place_of_entry
from pipeline.planning.sources import Sources
from pipeline.planning.system import Statistic
from pipeline.recipe import Recipe
from pipeline.recipe.references import shown

# Names or problems of one kind before the rest is counted: one cause makes hundreds.
_SHOWN = 8


def plan_metric(recipe: Recipe, tensors: Sequence[Aligned], sources: Sources) -> tuple[Statistic | None, ...]:
    """Return every tensor's statistic; None where it takes part in no distance. All None without a metric.

    Args:
        recipe: The validated recipe.
        tensors: The family's.
        sources: The open inputs and statistics.

    Raises:
        CheckpointError: A statistic is missing or of another shape.
        RecipeError: A pattern of `average` matches no tensor, or an adapter is asked for.
    """
    metric = recipe.pipeline.metric
    if metric is None or sources.metric is None:
        return (None,) * len(tensors)
    if recipe.pipeline.output == "adapter":
        what = "`pipeline.output: adapter` is not possible with `metric`, which measures whole matrices"
        raise RecipeError(Problem(what=what, remedy="leave one of the two out"))
    opened = sources.statistics[sources.metric]
    left_out = matched(recipe.pipeline.average or (), [aligned.name for aligned in tensors if aligned.merged])
    kind: Kind = "diagonal" if metric.kind == "diagonal" else "input_gram"
    if not opened.parameters(kind):
        raise CheckpointError(_none_of(kind, opened))
    found: list[Statistic | None] = []
    problems = []
    for aligned in tensors:
        entry = None
        if aligned.merged and aligned.name not in left_out:
            entry = opened.find(kind, aligned.name)
            if problem := _problem(entry, kind, aligned, opened):
                problems.append(problem)
        found.append(None if entry is None else place_of_entry(entry, sources.metric, opened))
    if len(problems) > _SHOWN:
        problems = [*problems[:_SHOWN], Problem(what=f"and {len(problems) - _SHOWN} more of this kind")]
    if not problems and not any(found):
        problems.append(
            Problem(
                what=f"has a {_words(kind)} of no tensor that is merged",
                where=f"statistics {shown(opened.url)}",
                remedy="take statistics of these models, or leave the metric out",
            )
        )
    if problems:
        raise CheckpointError(*problems)
    return tuple(found)


def metric_note(recipe: Recipe, tensors: Sequence[Aligned], places: Sequence[Statistic | None]) -> tuple[str, ...]:
    """Return what to say of a metric: whose it is, and which tensors it does not see; nothing without one."""
    metric = recipe.pipeline.metric
    if metric is None:
        return ()
    kind = _words("diagonal" if metric.kind == "diagonal" else "input_gram")
    text = f"distances, norms and the certificate are in the {kind} metric of {shown(metric.statistics)}"
    unseen = [a.name for a, place in zip(tensors, places, strict=True) if a.merged and place is None]
    if unseen:
        names = ", ".join(unseen[:_SHOWN]) + (f" and {len(unseen) - _SHOWN} more" if len(unseen) > _SHOWN else "")
        elements = sum(a.reference.elements for a in tensors if a.name in set(unseen))
        text += (
            f"; {len(unseen)} tensors of {elements} parameters have no say in them"
            f" and take the coefficients of their group: {names}"
        )
    return (text,)


def _none_of(kind: Kind, opened: Statistics) -> Problem:
    """Return what to say of statistics of other kinds only."""
    kinds = " and ".join(dict.fromkeys(_words(entry.kind) for entry in opened.entries.values())) or "nothing"
    return Problem(
        what=f"holds no {_words(kind)}, only {kinds}",
        where=f"statistics {shown(opened.url)}",
        remedy="take the other metric.kind, or collect statistics of this kind by `geomerge calibrate`",
    )


def _problem(entry: StatisticEntry | None, kind: Kind, aligned: Aligned, opened: Statistics) -> Problem | None:
    """Return what is wrong with a tensor's statistic, if anything."""
    shape = aligned.reference.shape
    where = f"statistics {shown(opened.url)}, tensor {aligned.name}"
    remedy = f"to leave it out of all distances, add pipeline: {{average: [{aligned.name}]}}"
    if entry is None:
        if opened.outside(aligned.name) is not None or (kind != "diagonal" and len(shape) < 2):
            return None
        return Problem(what=f"there is no {_words(kind)}", where=where, remedy=remedy)
    wanted = shape if kind == "diagonal" else (shape[1],) * 2 if len(shape) == 2 else None
    if entry.shape == wanted:
        return None
    what = f"the {_words(kind)} has the shape {list(entry.shape)}, which does not fit a tensor of shape {list(shape)}"
    return Problem(what=what, where=where, remedy=f"take statistics of this model; {remedy}")


def _words(kind: Kind) -> str:
    """Return a kind of statistics as people call it."""
    return {"diagonal": "diagonal", "input_gram": "input Gram", "output_gram": "output Gram", "block": "block"}[kind]
