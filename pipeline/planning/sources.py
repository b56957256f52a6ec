"""The models of a recipe, opened: full checkpoints, and adapters with the checkpoint that each stands on.

Owns who plays which part: base, models, what adapters stand on. Legend: I inputs, N models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from pipeline.checkpoints.adapter import is_adapter, open_adapter
from pipeline.checkpoints.checkpoint import open_checkpoint
from pipeline.checkpoints.statistics import Statistics, open_statistics
from pipeline.errors import CheckpointError, PipelineError, Problem, RecipeError, StorageError
from pipeline.planning.adapters import Member
from pipeline.recipe import Recipe
from pipeline.recipe.content import STARTS
from pipeline.recipe.references import join_model, model_key, split_model, without_credentials
from pipeline.storage import MissingObject, UrlError, checked_url

S = TypeVar("S")
T = TypeVar("T")

# A model taken apart: its checkpoint's folder, and its adapter's where it has one.
_Parts = tuple[str, str | None]

# Folders opened at a time: enough to hide the latency of an object store, few for a disk.
_OPENED_AT_ONCE = 8
_ADDRESS = re.compile(r"https?://[^\s\"']+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The open inputs of a recipe and who plays which part.

    Attributes:
        members: I open checkpoints and adapters; the first is a checkpoint, the base's or else the first model's.
        names: I names as the recipe has them.
        overs: Of each adapter, the index of the checkpoint it stands on; None for checkpoints.
        base: Index of the base, or None.
        models: N indices.
        start: Index of the checkpoint that systems start from, or None.
        statistics: The open folders of statistics, each once.
        moments: By model, the index of its statistics, or None.
        base_moments: Index of the base's statistics, or None.
        metric: Index of the statistics that distances are measured in, or None.
    """

    members: tuple[Member, ...]
    names: tuple[str, ...]
    overs: tuple[int | None, ...]
    base: int | None
    models: tuple[int, ...]
    start: int | None = None
    statistics: tuple[Statistics, ...] = ()
    moments: tuple[int | None, ...] = ()
    base_moments: int | None = None
    metric: int | None = None

    def donors(self, donor: int) -> tuple[Member, ...]:
        """Return whose configuration and tokenizer are taken: a checkpoint, and the adapter over it if named."""
        over = self.overs[donor]
        return (self.members[donor],) if over is None else (self.members[over], self.members[donor])


def open_sources(recipe: Recipe) -> Sources:
    """Open every checkpoint and adapter that a recipe names, headers only, each once.

    Raises:
        RecipeError: A model's URL cannot mean a place, or an adapter has no base model to stand on.
        CheckpointError: What is wrong with any of them, all together.
        StorageError: None of the errors was about the content.
    """
    names = [recipe.base_model] if recipe.base_model is not None else []
    names += [entry.model for entry in recipe.models if entry.model not in names]
    start = recipe.pipeline.start if recipe.pipeline.start not in (None, *STARTS) else None
    if start is not None and start not in names:
        names.append(start)
    folders = _statistics_folders(recipe)
    _refuse_urls(names, folders)
    references = _references(recipe, names)
    # Checkpoints first found first, adapters after them: the first input is always a checkpoint.
    order: list[_Parts] = list(dict.fromkeys((path, None) for path, _ in references.values()))
    order += dict.fromkeys(parts for parts in references.values() if parts[1] is not None)
    opened = _all(order, lambda parts: _open(parts, recipe))
    index = {parts: number for number, parts in enumerate(order)}
    spelled = {parts: name for name, parts in references.items()}
    place = {name: index[parts] for name, parts in references.items()}
    base = place[recipe.base_model] if recipe.base_model is not None else None
    models = [place[entry.model] for entry in recipe.models]
    over = {order[number][0] for number in models if order[number][1] is not None}
    if base is None and len(over) == 1 and all(order[number][1] is not None for number in models):
        # All are adapters over one checkpoint, which is their base whether the recipe says so or not.
        base = index[over.pop(), None]
    if recipe.base_is_input and base is not None:
        models.append(base)
    if start is not None and order[place[start]][1] is not None:
        raise RecipeError(
            Problem(
                what="is an adapter, which systems cannot start from",
                where=f"pipeline.start {without_credentials(start)}",
                remedy="name a full model",
            )
        )
    distinct = list(dict.fromkeys(folder for folder in folders if folder is not None))
    number: dict[str | None, int | None] = {folder: index for index, folder in enumerate(distinct)}
    *own, of_base, metric = [number.get(folder) for folder in folders]
    return Sources(
        members=tuple(opened),
        names=tuple(spelled.get(key, join_model(key[0])) for key in order),
        overs=tuple(None if adapter is None else index[path, None] for path, adapter in order),
        base=base,
        models=tuple(models),
        start=place[start] if start is not None else None,
        statistics=tuple(_all(distinct, lambda folder: open_statistics(*_with_options(folder, recipe)))),
        moments=tuple(own),
        base_moments=of_base,
        metric=metric,
    )


def _statistics_folders(recipe: Recipe) -> list[str | None]:
    """Return the folders of statistics of all models, of the base and of the metric; None where there is none."""
    pipeline = recipe.pipeline
    metric = pipeline.metric.statistics if pipeline.metric is not None else None
    return [*(entry.pipeline.statistics for entry in recipe.models), pipeline.base_statistics, metric]


def _refuse_urls(names: Sequence[str], folders: Sequence[str | None]) -> None:
    """Raise for URLs that cannot mean a place, all together, before any is asked."""
    problems = []
    for folder in folders:
        try:
            if folder is not None:
                checked_url(folder, user=False)
        except UrlError as error:
            problems += [replace(problem, where=f"statistics {problem.where}") for problem in error.problems]
    for name in names:
        for url in split_model(name):
            try:
                if url is not None:
                    checked_url(url, user=False)
            except UrlError as error:
                problems += [replace(problem, where=f"model {problem.where}") for problem in error.problems]
    if problems:
        # A base that every adapter names is one mistake.
        raise RecipeError(*dict.fromkeys(problems))


def _references(recipe: Recipe, names: list[str]) -> dict[str, _Parts]:
    """Return the recipe's models by name, each taken apart; a plain adapter stands on the base model."""
    plain = [name for name in names if split_model(name)[1] is None]
    found = dict(zip(plain, _all(plain, lambda name: _is_adapter(split_model(name)[0], recipe)), strict=True))
    problems = [problem for name in plain if found[name] and (problem := _unsupported(recipe, name))]
    lefts = {split_model(name)[0]: name for name in names if split_model(name)[1] is not None}
    stacked = zip(lefts.items(), _all(list(lefts), lambda path: _is_adapter(path, recipe)), strict=True)
    problems += [
        Problem(
            what="puts an adapter on an adapter; the left side must be a full model",
            where=f"model {without_credentials(name)}",
            remedy="list each adapter as a model of its own, or write BASE+ADAPTER",
        )
        for (_, name), adapter in stacked
        if adapter
    ]
    if problems:
        raise RecipeError(*problems)
    spelling: dict[str, str] = {}
    references: dict[str, _Parts] = {}
    for name in names:
        path, adapter = split_model(name)
        if found.get(name):
            path, adapter = split_model(str(recipe.base_model))[0], path
        # Equal folders are one input, however they are spelled.
        path = spelling.setdefault(model_key(join_model(path)), path)
        adapter = None if adapter is None else spelling.setdefault(model_key(join_model(adapter)), adapter)
        references[name] = (path, adapter)
    return references


def _unsupported(recipe: Recipe, name: str) -> Problem | None:
    """Return what is wrong with a plain adapter in this recipe: it needs a full base model."""
    where = f"model {without_credentials(name)}"
    if name == recipe.base_model:
        return Problem(
            what="is an adapter, which cannot be the base model by itself",
            where=where,
            remedy="write base_model: BASE+ADAPTER to start from the base with the adapter in it",
        )
    if recipe.base_model is None:
        stated = open_adapter(*_with_options(split_model(name)[0], recipe)).base_name
        trained = f" (the adapter was trained on {stated})" if stated else ""
        return Problem(
            what="is an adapter, and the recipe says nowhere what it stands on",
            where=where,
            remedy=f"add base_model{trained}, or write BASE+{without_credentials(name)}",
        )
    if split_model(recipe.base_model)[1] is not None:
        return Problem(
            what="is an adapter, and so is a part of the base model: it is not clear what it stands on",
            where=where,
            remedy=f"write BASE+{without_credentials(name)}",
        )
    return None


def _open(parts: _Parts, recipe: Recipe) -> Member:
    path, adapter = parts
    if adapter is None:
        return open_checkpoint(*_with_options(path, recipe))
    return open_adapter(*_with_options(adapter, recipe))


def _is_adapter(path: str, recipe: Recipe) -> bool:
    return is_adapter(*_with_options(path, recipe))


def _with_options(path: str, recipe: Recipe) -> tuple[str, dict[str, object]]:
    """Return a path or URL with the options of the store that it lies in."""
    return path, recipe.pipeline.storage.of(path)


def _all(items: Sequence[S], task: Callable[[S], T]) -> list[T]:
    """Return a task's results in order; what goes wrong with any item is raised together.

    Raises:
        CheckpointError: Problems of several kinds, or of one that is about content.
        StorageError: All problems are about reading.
    """

    def attempt(item: S) -> T | PipelineError:
        try:
            return task(item)
        except PipelineError as error:
            return error

    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        results = list(pool.map(attempt, items))
    errors = [result for result in results if isinstance(result, PipelineError)]
    if errors:
        problems = _joined(errors)
        raise (type(errors[0]) if len({type(error) for error in errors}) == 1 else CheckpointError)(*problems)
    return [result for result in results if not isinstance(result, PipelineError)]


def _joined(errors: Sequence[PipelineError]) -> list[Problem]:
    """Return all problems in order; what is wrong with a store, and not with one model in it, once for all models."""
    found: dict[object, list[Problem]] = {}
    for error in errors:
        common = isinstance(error, StorageError) and not isinstance(error, MissingObject)
        for problem in error.problems:
            # The address of a request is in some texts.
            cause = (type(error), _ADDRESS.sub("", problem.what), problem.remedy)
            found.setdefault(cause if common else (cause, problem.where, len(found)), []).append(problem)
    return [_for_all(problems) for problems in found.values()]


def _for_all(problems: Sequence[Problem]) -> Problem:
    """Return the first of equal problems, which says how many others there are."""
    others = len({problem.where for problem in problems}) - 1
    first = problems[0]
    return replace(first, where=f"{first.where} and {others} more") if others else first
