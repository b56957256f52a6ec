"""The Parquet tables a finished merge leaves: distances by tensor, and the solvers' iterations.

Owns their columns. Legend: P points.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.checkpoints.tables import write_table
from pipeline.engine.driver import Outcome
from pipeline.engine.run_folder import DISTANCES, ITERATIONS, ChunkRow, load_rows
from pipeline.numerics.exact_sum import exact_column_sums
from pipeline.planning.plan import Plan
from pipeline.storage import Store


def save_tables(plan: Plan, outcome: Outcome, output: Store) -> list[float] | None:
    """Write `distances.parquet` and `iterations.parquet` into the run folder.

    ``distances`` holds a row a tensor: the upper triangle of its squared distances between the points (the base first,
    where there is one) and the share of elements of each point that equal the first point's.

    Returns:
        By model, the share of all merged elements that equal the base's; None without a base or a measuring pass.
    """
    if not plan.settings.measured:
        return None
    metadata = {"points": "\n".join(plan.inputs[index].name for index in plan.points), "fingerprint": plan.fingerprint}
    columns: dict[str, list[object]] = {
        "tensor": [], "group": [], "elements": [], "squared_distances": [], "unchanged": []
    }  # fmt: skip
    unchanged_P = np.zeros(len(plan.points), dtype=np.int64)
    # One file at a time: a large model's rows need not be in memory together.
    for layout in plan.files:
        unchanged_P += _add_file(plan, load_rows(output, layout.name), columns)
    write_table(output, DISTANCES, columns, metadata)
    write_table(output, ITERATIONS, _iteration_columns(plan, outcome), metadata)
    elements = sum(group.elements for group in plan.groups)
    return [int(count) / max(1, elements) for count in unchanged_P[plan.offset :]] if plan.offset else None


def _add_file(plan: Plan, rows: Sequence[ChunkRow], columns: dict[str, list[object]]) -> np.ndarray:
    """Append one file's tensors to the columns and return how many elements of each point equal the first's."""
    by_tensor: dict[int, list[ChunkRow]] = {}
    for row in rows:
        if plan.tensors[row.tensor].group >= 0:
            by_tensor.setdefault(row.tensor, []).append(row)
    unchanged_P = np.zeros(len(plan.points), dtype=np.int64)
    for index, members in by_tensor.items():
        tensor = plan.tensors[index]
        counts_P = np.array([row.unchanged for row in members], dtype=np.int64).sum(axis=0)
        unchanged_P += counts_P
        columns["tensor"].append(tensor.name)
        columns["group"].append(plan.groups[tensor.group].name)
        columns["elements"].append(tensor.elements)
        columns["squared_distances"].append(exact_column_sums(np.array([row.distances for row in members])).tolist())
        columns["unchanged"].append((counts_P / tensor.elements).tolist())
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
