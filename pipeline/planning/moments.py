"""Which tensors a method solves for, and with which statistics of which model.

Owns the treatment of every parameter: solved, averaged or copied; and what is wrong with the statistics' names and
shapes. Knows headers, never a statistic's value. Legend: N models.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.checkpoints.statistics import StatisticEntry, Statistics
from pipeline.checkpoints.statistics_facts import Kind
from pipeline.errors import CheckpointError, Problem, RecipeError
from pipeline.planning.family import Aligned
from pipeline.planning.plan import Input, SourceFile
from pipeline.planning.sources import Sources
from pipeline.planning.system import Statistic, System, Term
from pipeline.recipe.references import shown, without_credentials

# What each objective asks for, in the order of a term's statistics.
KINDS: Mapping[str, tuple[Kind, ...]] = {
    "diagonal": ("diagonal",),
    "gram": ("input_gram",),
    "kfac": ("input_gram", "output_gram"),
    "block": ("block",),
    "weights": (),
}
# Objectives that solve matrices: vectors are averaged without a word.
_OF_MATRICES = frozenset({"gram", "kfac", "weights"})
# Problems of one kind before the rest is counted: one cause makes hundreds.
_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a method asks of a family.

    Attributes:
        objective: One of `KINDS`.
        weights: N factors.
        data_sizes: N numbers of examples; None for those that the statistics name.
        base_size: The same of the base.
        anchored: Whether the base has a term of its own.
        average: Patterns of tensors that are averaged whatever there is of them.
    """

    objective: str
    weights: tuple[float, ...]
    data_sizes: tuple[float | None, ...]
    base_size: float | None = None
    anchored: bool = False
    average: tuple[str, ...] = ()


@dataclass(slots=True)
class _Faults:
    """What is wrong, and how much of it was left out."""

    problems: list[Problem] = field(default_factory=list)
    more: int = 0

    def add(self, problem: Problem) -> None:
        if len(self.problems) < _SHOWN:
            self.problems.append(problem)
        else:
            self.more += 1

    def raise_any(self) -> None:
        if self.more:
            self.problems.append(Problem(what=f"{self.more} more statistics are missing or do not fit"))
        if self.problems:
            raise CheckpointError(*self.problems)


def plan_moments(
    request: Request, tensors: Sequence[Aligned], shared: Sequence[int | None], sources: Sources
) -> tuple[System | None, ...]:
    """Return every tensor's system; None where it is averaged or copied.

    Args:
        request: What the method asks for.
        tensors: The family's.
        shared: By tensor, the input whose values all models have before their updates, or None.
        sources: The open inputs and statistics.

    Raises:
        CheckpointError: Statistics are missing, of another shape, or not there for all models alike.
        RecipeError: A pattern of `average` matches no tensor.
    """
    merged = [aligned.name for aligned in tensors if aligned.merged]
    averaged = matched(request.average, merged)
    if strangers := tuple(_strangers(request, merged, sources)):
        raise CheckpointError(*strangers)
    faults = _Faults()
    systems = []
    for aligned, stands in zip(tensors, shared, strict=True):
        # What no adapter touches is the same in all models: any weights give it back.
        idle = not aligned.merged or not aligned.reference.elements or (stands is not None and not aligned.updates)
        system = None if idle or aligned.name in averaged else _system(request, aligned, sources, faults)
        systems.append(system)
    faults.raise_any()
    if not any(systems):
        raise CheckpointError(
            Problem(
                what=f"no parameter has {_words(request.objective)}: all would be averaged",
                remedy="take statistics of the objective's kind, or another merge_method",
            )
        )
    return tuple(systems)


def matched(patterns: Iterable[str], names: Sequence[str]) -> frozenset[str]:
    """Return the names that any pattern of `pipeline.average` matches.

    Raises:
        RecipeError: A pattern matches none.
    """
    found: set[str] = set()
    problems = []
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        found.update(hits)
        if not hits:
            problems.append(
                Problem(
                    what=f"pattern {pattern!r} matches no tensor",
                    where="pipeline.average",
                    remedy="correct or remove it; patterns are globs over whole tensor names, such as *.embed_tokens.*",
                )
            )
    if problems:
        raise RecipeError(*problems)
    return frozenset(found)


def statistics_inputs(sources: Sources) -> tuple[Input, ...]:
    """Return the folders of statistics as a plan keeps them."""
    return tuple(
        Input(
            url=opened.store.url,
            name=shown(opened.url),
            files=tuple(SourceFile(path=f.path, size_bytes=f.size_bytes, version=f.version) for f in opened.files),
        )
        for opened in sources.statistics
    )


def place_of_entry(entry: StatisticEntry, number: int, opened: Statistics) -> Statistic:
    """Return where a statistic lies, in the words of a plan.

    Args:
        entry: What the reader found.
        number: Index of its folder in the plan.
        opened: That folder.
    """
    files = [file.path for file in opened.files]
    return Statistic(
        statistics=number,
        kind=entry.kind,
        file=files.index(entry.file),
        start=entry.start,
        dtype=entry.dtype,
        size=entry.size,
    )


def _system(request: Request, aligned: Aligned, sources: Sources, faults: _Faults) -> System | None:
    """Return a tensor's system; None where it is averaged, or where that is not possible and was noted."""
    shape = aligned.reference.shape
    if request.objective in _OF_MATRICES and len(shape) < 2:
        return None
    kinds = KINDS[request.objective]
    if not kinds:
        return (
            System(objective=request.objective, terms=tuple(_terms(request, sources, ()))) if len(shape) == 2 else None
        )
    owners = list(_owners(request, sources))
    entries = [_entries(owner, kinds, aligned.name) for owner in owners]
    if not all(entries):
        for problem in _absent(request, aligned, owners, entries):
            faults.add(problem)
        return None
    problems = [
        problem
        for owner, found in zip(owners, entries, strict=True)
        for problem in _misfits(owner, found, shape, aligned.name)
    ]
    for problem in problems:
        faults.add(problem)
    if problems:
        return None
    places = [
        tuple(place_of_entry(entry, owner.number, owner.opened) for entry in found)
        for owner, found in zip(owners, entries, strict=True)
    ]
    anchor = None
    if request.anchored and sources.base is not None:
        statistics = places.pop() if sources.base_moments is not None else ()
        size = _size(request.base_size, owners[-1].opened if sources.base_moments is not None else None)
        anchor = Term(input=sources.base, weight=1.0, statistics=statistics, data_size=size)
    return System(objective=request.objective, terms=tuple(_terms(request, sources, places)), anchor=anchor)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owner:
    """A model, or the base, and its statistics."""

    name: str
    number: int
    opened: Statistics


def _owners(request: Request, sources: Sources) -> Iterator[_Owner]:
    """Yield all models with their statistics, and the base where it has some and a say."""
    wanted = list(zip(sources.models, sources.moments, strict=True))
    if request.anchored and sources.base is not None:
        wanted.append((sources.base, sources.base_moments))
    for index, number in wanted:
        if number is not None:
            name = without_credentials(sources.names[index])
            yield _Owner(name=name, number=number, opened=sources.statistics[number])


def _strangers(request: Request, names: Sequence[str], sources: Sources) -> Iterator[Problem]:
    """Yield statistics that hold nothing that is asked for of any tensor: of another kind, or of another family."""
    kinds = KINDS[request.objective]
    for owner in _owners(request, sources):
        if not kinds or any(_entries(owner, kinds, name) for name in names):
            continue
        held = {entry.kind for entry in owner.opened.entries.values()}
        what = f"hold nothing of this model's parameters: they say that they are of {owner.opened.facts.model}"
        if not held.issuperset(kinds):
            only = " and ".join(sorted(kind.replace("_", " ") for kind in held))
            what = f"hold no {_words(request.objective)}" + (f", only {only}" if only else "")
        yield Problem(
            what=what,
            where=f"model {owner.name}, statistics {shown(owner.opened.url)}",
            remedy="take this model's own, of the objective's kind; `geomerge calibrate` collects them",
        )


def _entries(owner: _Owner, kinds: Sequence[Kind], name: str) -> list[StatisticEntry]:
    """Return a parameter's statistics of all kinds; nothing if one is missing."""
    found = [owner.opened.find(kind, name) for kind in kinds]
    entries = [entry for entry in found if entry is not None]
    return entries if len(entries) == len(kinds) else []


def _terms(request: Request, sources: Sources, places: Sequence[tuple[Statistic, ...]]) -> Iterator[Term]:
    for row, index in enumerate(sources.models):
        number = sources.moments[row] if sources.moments else None
        opened = None if number is None else sources.statistics[number]
        yield Term(
            input=index,
            weight=request.weights[row],
            statistics=places[row] if places else (),
            data_size=_size(request.data_sizes[row], opened),
        )


def _size(given: float | None, opened: Statistics | None) -> float:
    """Return how many examples a model was trained on: as the recipe says, or as many as its statistics saw."""
    if given is not None:
        return given
    return float(opened.facts.examples) if opened is not None else 1.0


def _absent(
    request: Request, aligned: Aligned, owners: Sequence[_Owner], entries: Sequence[Sequence[StatisticEntry]]
) -> Iterator[Problem]:
    """Yield why a tensor without all statistics cannot be averaged in silence; nothing where it can."""
    reasons = [owner.opened.outside(aligned.name) for owner in owners]
    if not any(entries) and all(reason is not None for reason in reasons):
        return
    remedy = f"to average it, add pipeline: {{average: [{aligned.name}]}}; or collect the statistics again"
    for owner, found, reason in zip(owners, entries, reasons, strict=True):
        if not found:
            other = next((other.name for other, its in zip(owners, entries, strict=True) if its), None)
            why = f" ({reason})" if reason is not None else ""
            beside = f", although {other} has" if other is not None else ""
            yield Problem(
                what=f"has no {_words(request.objective)} of this tensor{why}{beside}",
                where=f"model {owner.name}, statistics {shown(owner.opened.url)}, tensor {aligned.name}",
                remedy=remedy,
            )


def _misfits(owner: _Owner, found: Sequence[StatisticEntry], shape: tuple[int, ...], name: str) -> Iterator[Problem]:
    """Yield statistics that are of another shape than their parameter."""
    wanted: dict[str, tuple[int, ...]] = {"diagonal": shape, "block": (math.prod(shape),) * 2}
    if len(shape) == 2:
        wanted |= {"output_gram": (shape[0],) * 2, "input_gram": (shape[1],) * 2}
    for entry in found:
        fitting = wanted.get(entry.kind)
        if entry.shape != fitting:
            needs = "is no matrix" if fitting is None else f"needs {list(fitting)}"
            yield Problem(
                what=f"its {entry.kind.replace('_', ' ')} has the shape {list(entry.shape)},"
                f" but a tensor of shape {list(shape)} {needs}",
                where=f"model {owner.name}, statistics {shown(owner.opened.url)}, tensor {name}",
                remedy=f"take statistics of this model, or add pipeline: {{average: [{name}]}}",
            )


def _words(objective: str) -> str:
    """Return an objective's statistics as people call them."""
    return " and ".join(kind.replace("_", " ") for kind in KINDS[objective]) or "matrix"
