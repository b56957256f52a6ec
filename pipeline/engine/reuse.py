"""Statistics of an earlier merge of the same models, taken over instead of measured again.

Owns when the distances that one merge saved are those of another plan: the same files, the same tensors, the same grid
and the same reading of values. Weights, scale, tolerance, method, scope and the layout of the output may differ, and
models may be left out or change places. What is taken over is saved as if it had been measured here; the hashes of the
first read come along, so that the second read still refuses what is not the same bytes.
Legend: P points, I inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.engine.run_folder import (
    MEASURED,
    PLAN,
    ChunkRow,
    RowsWriter,
    finished,
    is_measured,
    read_json,
    read_rows,
    square,
    triangle,
)
from pipeline.errors import OutputError, Problem
from pipeline.events import Listener, Note
from pipeline.planning.plan import PLAN_SCHEMA, Plan
from pipeline.storage import Store, place_of

# What of the settings has a say in the statistics.
_SETTINGS = ("cast", "non_finite", "measured")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Translation:
    """From an earlier plan's numbers to a plan's.

    Attributes:
        inputs: I indices: which of the earlier inputs each input is.
        points: P rows of an earlier distance table.
        width: Rows that such a table has.
        tensors: The index here, by the earlier index of the same tensor.
    """

    inputs: np.ndarray
    points: np.ndarray
    width: int
    tensors: Mapping[int, int]

    def row(self, row: ChunkRow) -> ChunkRow:
        """Return an earlier row in this plan's numbers."""
        whole_PP = square(row.distances, self.width)
        return ChunkRow(
            tensor=self.tensors[row.tensor],
            start=row.start,
            distances=triangle(whole_PP[np.ix_(self.points, self.points)]),
            unchanged=row.unchanged[self.points],
            checksums=row.checksums[self.inputs],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """An earlier merge.

    Attributes:
        store: Where it wrote, finished or not.
        exact: Whether to take its distances only where the models are the same in the same order: they are then the
            very bits that measuring would give. Of others they may differ by the rounding of a difference from
            another point.
        asked: Whether the user named it, and wants to know why nothing was taken.
    """

    store: Store
    exact: bool = False
    asked: bool = True


def refuse_useless(earlier: Store, output: Store) -> None:
    """Raise when a folder cannot have distances for a merge.

    Raises:
        OutputError: It has no plan, or it is where the merge will write.
    """
    if place_of(earlier.url) == place_of(output.url):
        remedy = "name another merge's folder; a merge that goes on has its own distances anyway"
        raise OutputError(Problem(what="is the output itself", where=earlier.location(), remedy=remedy))
    if read_json(earlier, PLAN) is None:
        remedy = "name the output folder of a merge of the same models, finished or not"
        raise OutputError(
            Problem(what="holds no merge to take distances from", where=earlier.location(), remedy=remedy)
        )


def reuse_statistics(plan: Plan, output: Store, merges: Iterable[Earlier], listener: Listener) -> list[str]:
    """Save what earlier merges have measured as this plan's own; tell, and return in words what was taken.

    Args:
        plan: The plan, saved in the output already.
        output: The output folder.
        merges: Asked in this order.
        listener: Told what was taken, and why not.

    Raises:
        VerificationError: What an earlier merge left is damaged.
    """
    taken = []
    for merge in merges if plan.settings.measured else ():
        where = merge.store.location()
        count, reason = _take(plan, output, merge.store, exact=merge.exact)
        if count:
            files = "1 file" if count == 1 else f"{count} files"
            taken.append(f"the distances of {files} were taken from {where}, and not measured again")
            listener(Note(text=taken[-1]))
        elif merge.asked:
            listener(Note(text=f"{where}: {reason}; what it lacks is measured here"))
    return taken


def _take(plan: Plan, output: Store, earlier: Store, *, exact: bool) -> tuple[int, str]:
    """Return of how many output files the statistics were taken, and, if of none, why."""
    document = read_json(earlier, PLAN)
    if document is None:
        return 0, "no merge has left a plan there"
    found = _translation(plan, document)
    if isinstance(found, str):
        return 0, found
    if exact and (found.width != len(plan.points) or (found.points != np.arange(found.width)).any()):
        return 0, "the models are others, or in another order"
    fingerprint = str(document["fingerprint"])
    marked = finished(earlier, MEASURED, ".parquet")
    names = [entry["name"] for entry in document["files"] if entry["name"] in marked]
    whole = {name for name in names if is_measured(earlier, name, fingerprint)}
    lies_in = {
        found.tensors[tensor]: entry["name"]
        for entry in document["files"]
        for tensor in entry["tensors"]
        if tensor in found.tensors and entry["name"] in whole
    }
    done = finished(output, MEASURED, ".parquet")
    count = 0
    for layout in plan.files:
        if layout.name in done:
            continue
        holders = [lies_in.get(tensor) for tensor in layout.tensors if plan.measured_chunks(tensor)]
        if None in holders:
            continue
        sources = [name for name in dict.fromkeys(holders) if name is not None]
        rows = _rows(earlier, sources, fingerprint, found, frozenset(layout.tensors))
        count += _save(plan, layout.tensors, rows, RowsWriter(output, layout.name, plan.fingerprint))
    return count, "" if count else "none of its files was measured to the end, or all are laid out in another way"


def _save(plan: Plan, tensors: Sequence[int], rows: Iterable[ChunkRow], saved: RowsWriter) -> bool:
    """Save rows as an output file's statistics; return whether they are all of them, in order, or nothing is saved."""
    expected = iter([chunk for tensor in tensors for chunk in plan.measured_chunks(tensor)])
    with saved:
        for row in rows:
            chunk = next(expected, None)
            if chunk is None or (chunk.tensor, chunk.start) != (row.tensor, row.start):
                return False
            saved.add(row)
        if next(expected, None) is not None:
            return False
        saved.finish()
    return True


def _rows(
    earlier: Store, names: Iterable[str], fingerprint: str, found: _Translation, tensors: frozenset[int]
) -> Iterator[ChunkRow]:
    """Yield, in this plan's numbers, the earlier rows of some tensors."""
    for name in names:
        for row in read_rows(earlier, name, fingerprint):
            if found.tensors.get(row.tensor) in tensors:
                yield found.row(row)


def _translation(plan: Plan, document: Mapping[str, Any]) -> _Translation | str:
    """Return how an earlier plan's numbers become this plan's, or why its statistics are of no use."""
    if document.get("schema") != PLAN_SCHEMA:
        return "another version has made it"
    settings = asdict(plan.settings)
    if any(document["settings"][name] != settings[name] for name in _SETTINGS):
        return "it measured nothing, or read values otherwise (dtype, non_finite)"
    mine = {"settings": settings, "statistics": [asdict(item) for item in plan.statistics]}
    if _metric(document) != _metric(mine):
        return "it measured distances in another metric"
    if document["chunk_elements"] != plan.chunk_elements:
        return "its chunks have another length, because it had many more or fewer models"
    places = _input_places(plan, document["inputs"])
    if places is None:
        return "it has not read all of these models, or a file has changed since"
    order = ([document["base"]] if document["base"] is not None else []) + list(document["models"])
    points = [places[index] for index in plan.points]
    if (plan.base is None) != (document["base"] is None) or not set(points) <= set(order) or points[0] != order[0]:
        return "its base is another, or it had none and began with another model"
    known = {entry["name"]: number for number, entry in enumerate(document["tensors"])}
    # Input numbers of the earlier plan in this plan's: one that is left out has no number.
    here = {place: index for index, place in reversed(list(enumerate(places)))}
    tensors = {}
    for index, tensor in enumerate(plan.tensors):
        number = known.get(tensor.name)
        if number is not None and _essence(asdict(tensor)) == _essence(_renumbered(document["tensors"][number], here)):
            tensors[number] = index
    return _Translation(
        inputs=np.array(places, dtype=np.intp),
        points=np.array([order.index(point) for point in points], dtype=np.intp),
        width=len(order),
        tensors=tensors,
    )


def _input_places(plan: Plan, earlier: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Return, by input, its index in an earlier plan; None unless all are there with the same files."""
    known = {_identity(entry, earlier): index for index, entry in reversed(list(enumerate(earlier)))}
    mine = [asdict(item) for item in plan.inputs]
    places = [known.get(_identity(entry, mine)) for entry in mine]
    return [place for place in places if place is not None] if None not in places else None


def _identity(entry: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> str:
    """Return what makes an input the same: where it lies, its files' sizes and versions, and what it stands on."""
    over = entry["over"]
    below = None if over is None else _identity(inputs[over], inputs)
    return json.dumps([entry["url"], entry["files"], below], sort_keys=True)


def _metric(document: Mapping[str, Any]) -> str | None:
    """Return what a plan measures distances in, as text: a kind of metric and files of statistics; None without one."""
    kind = document["settings"].get("metric")
    return None if kind is None else json.dumps([kind, document["statistics"]], sort_keys=True)


def _renumbered(tensor: Mapping[str, Any], here: Mapping[int, int]) -> dict[str, Any]:
    """Return an earlier plan's tensor with inputs as they are numbered here; what is left out here is left out."""
    kept = sorted((index, number) for number, index in here.items())
    shared = tensor["shared"]
    return {
        **tensor,
        "sources": [tensor["sources"][number] for _, number in kept],
        "updates": sorted(
            ({**update, "input": here[update["input"]]} for update in tensor["updates"] if update["input"] in here),
            key=lambda update: update["input"],
        ),
        "shared": None if shared is None else here.get(shared, -1),
    }


def _essence(tensor: Mapping[str, Any]) -> str:
    """Return what of a tensor has a say in its statistics, as text that does not tell tuples from lists."""
    body = {name: tensor.get(name) for name in ("name", "shape", "elements", "sources", "updates", "shared", "metric")}
    return json.dumps([body, tensor["group"] < 0, tensor["merged_rank"] is not None], sort_keys=True)
