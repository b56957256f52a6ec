"""The Parquet tables a finished merge leaves: distances by tensor, and the solvers' iterations.

Owns their columns. Legend: P points.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from pipeline.checkpoints.tables import TableWriter, write_table
from pipeline.engine.driver import Outcome
from pipeline.engine.run_folder import DISTANCES, ITERATIONS, ChunkRow, read_rows
from pipeline.numerics.exact_sum import exact_column_sums
from pipeline.planning.plan import Plan
from pipeline.storage import Store


def save_tables(plan: Plan, outcome: Outcome, output: Store) -> list[float] | None:
    """Write `distances.parquet` and `iterations.parquet` into the run folder.

    ``distances`` holds a row a tensor: the upper triangle of its squared distances between the points (the base first,
    where there is one) and the share of elements of each point that equal the first point's.

    Returns:
        By model, the share of all measured elements that equal the base's; None without a base or a measuring pass.
    """
    if not plan.settings.measured:
        return None
    metadata = {"points": "\n".join(plan.inputs[index].name for index in plan.points), "fingerprint": plan.fingerprint}
    # What no adapter touches was not measured: it is the base's in all points.
    untouched = sum(tensor.elements for tensor in plan.tensors if tensor.group >= 0 and tensor.unchanged)
    unchanged_P = np.full(len(plan.points), untouched, dtype=np.int64)
    names = ("tensor", "group", "elements", "squared_distances", "unchanged")
    with TableWriter(output, DISTANCES, names, metadata) as table:
        for layout in plan.files:
            unchanged_P += _add_file(plan, read_rows(output, layout.name, plan.fingerprint), table)
        table.finish()
    write_table(output, ITERATIONS, _iteration_columns(plan, outcome), metadata)
    # What a metric does not see was not measured either, and nobody knows how much of it is the base's.
    seen = (tensor for index, tensor in enumerate(plan.tensors) if tensor.group >= 0 and plan.is_weighed(index))
    elements = sum(tensor.elements for tensor in seen)
    return [int(count) / max(1, elements) for count in unchanged_P[plan.offset :]] if plan.offset else None


def _add_file(plan: Plan, rows: Iterable[ChunkRow], table: TableWriter) -> np.ndarray:
    """Append one file's tensors to the table and return how many elements of each point equal the first's."""
    unchanged_P = np.zeros(len(plan.points), dtype=np.int64)
    merged = (row for row in rows if plan.tensors[row.tensor].group >= 0)
    # A tensor's chunks are neighbours; with a thousand models those of all tensors need not be in memory together.
    for index, chunks in itertools.groupby(merged, key=lambda row: row.tensor):
        members = list(chunks)
        tensor = plan.tensors[index]
        counts_P = np.array([row.unchanged for row in members]).sum(axis=0)
        unchanged_P += counts_P
        sums = exact_column_sums([row.distances for row in members])
        table.append(tensor.name, plan.groups[tensor.group].name, tensor.elements, sums, counts_P / tensor.elements)
    return unchanged_P


def _iteration_columns(plan: Plan, outcome: Outcome) -> dict[str, list[object]]:
    columns: dict[str, list[object]] = {
        "group": [], "iteration": [], "step": [], "objective": [], "relative_gap": [], "step_length": []
    }  # fmt: skip
    for solution in outcome.solutions:
        for entry in solution.median.history if solution.median is not None else ():
            columns["group"].append(plan.groups[solution.group].name)
            columns["iteration"].append(entry.index)
            columns["step"].append(entry.step)
            columns["objective"].append(entry.objective)
            columns["relative_gap"].append(entry.relative_gap)
            columns["step_length"].append(entry.step_length)
    return columns
