"""Whether an output folder can be used, and the commit that makes it a checkpoint.

Owns what may be overwritten, what is resumed, and the order in which the last files appear. The index file, or an
adapter's configuration, is the commit: before it exists no loader finds weights here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from pipeline.checkpoints.adapter import ADAPTER_CONFIG
from pipeline.checkpoints.dtypes import DTYPES
from pipeline.checkpoints.sidecars import MODEL_FILES, output_config, side_files, tokenizer_files
from pipeline.engine.run_folder import FOLDER, INDEX, PLAN, REPORT, SIDE_FILES, read_json, write_json, written_path
from pipeline.errors import BudgetError, OutputError, Problem, VerificationError
from pipeline.numerics.dtypes import config_name
from pipeline.planning.adapters import Member
from pipeline.planning.plan import Plan
from pipeline.storage import Store
from pipeline.units import format_bytes

# What is written last, by the kind of output: no loader finds weights in the folder before it exists.
_COMMITS = {"model": INDEX, "adapter": ADAPTER_CONFIG}
# Room beside the weights for statistics, tokenizer and reports.
_EXTRA_BYTES = 64_000_000
# What makes a folder a checkpoint; removed by --overwrite, so that two models never lie in one folder.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


class State(Enum):
    """What an output folder holds of this merge."""

    FRESH = "fresh"
    PARTIAL = "partial"
    COMMITTED = "committed"


def prepare(plan: Plan, output: Store, *, overwrite: bool) -> State:
    """Check an output folder, clear it if told to, and save the plan in it.

    Args:
        plan: The plan.
        output: The folder.
        overwrite: Whether what is in it may be removed: another merge or model, or this merge's own beginning.

    Raises:
        OutputError: It is an input's folder, or holds another merge or model.
        StorageError: It cannot be written.
        BudgetError: The disk has no room.
        VerificationError: The plan in it is damaged.
    """
    refuse_inputs(plan, output)
    output.probe_writable()
    output.sweep()
    paths = output.list()
    try:
        existing = read_json(output, PLAN)
    except VerificationError:
        if not overwrite:
            raise
        existing = None
    if not overwrite and existing is not None and existing.get("fingerprint") == plan.fingerprint:
        whole = all(is_written(output, file.name) for file in plan.files)
        if commit_path(plan) in paths and whole and not missing_side_files(output):
            return State.COMMITTED
        # A checkpoint that lost a file or a part of one is none: what is missing is written again.
        output.delete(commit_path(plan))
        _check_room(plan, output)
        return State.PARTIAL
    if paths and not overwrite and not _only_planned(paths):
        raise OutputError(_occupied(plan, output, existing))
    _check_room(plan, output)
    _clear(output, paths)
    write_json(output, PLAN, plan.to_json())
    return State.FRESH


def missing_side_files(output: Store) -> list[str]:
    """Return the configuration, tokenizer and report files that a commit wrote and that are gone."""
    recorded = (read_json(output, SIDE_FILES) or {}).get("paths", [])
    return [path for path in recorded if not output.exists(path)]


def _only_planned(paths: tuple[str, ...]) -> bool:
    """Return whether a run left nothing here but its plan, as one does that was refused in its first pass."""
    return all(path == PLAN for path in paths)


def is_written(output: Store, name: str) -> bool:
    """Return whether an output file is there with the size that its marker states."""
    marker = read_json(output, written_path(name))
    return marker is not None and output.exists(name) and output.stat(name).size_bytes == marker.get("size_bytes")


def refuse_inputs(plan: Plan, output: Store) -> None:
    """Raise when the output folder is the folder of an input, holds one, or lies in one.

    Raises:
        OutputError: Names the input.
    """
    place = _place(output.url)
    for item in plan.inputs:
        source = _place(item.url)
        if place.startswith(source) or source.startswith(place):
            raise OutputError(
                Problem(
                    what=f"overlaps with the folder of model {item.name}, {item.url}",
                    where=f"output {output.location()}",
                    remedy="choose another output folder",
                )
            )


def _place(url: str) -> str:
    """Return a folder with one slash at its end; of a local one its real path, so that no link hides an input."""
    real = url if "://" in url else os.path.realpath(url)
    return real.rstrip("/") + "/"


def commit(
    plan: Plan,
    output: Store,
    donors: Sequence[Member],
    documents: Mapping[str, bytes],
    adapter_config: Mapping[str, object] | None = None,
) -> None:
    """Write everything beside the weights and then the file that makes the folder a model or an adapter.

    Args:
        plan: The plan; all its files are written.
        output: The folder.
        donors: Whose configuration and tokenizer are taken; what a later one has replaces an earlier one's.
        documents: Report, model card and tables by path.
        adapter_config: Of a merged adapter.
    """
    output.sweep()
    # Of a base an adapter needs nothing; a tokenizer only where the recipe names one.
    as_model = plan.settings.output == "model"
    files = side_files if as_model else tokenizer_files
    wanted = donors if as_model or plan.recipe.get("tokenizer_source") is not None else ()
    stores = {path: donor.store for donor in wanted for path in files(donor.store)}
    # Recorded first, so that --overwrite can remove them whenever this run ends.
    write_json(output, SIDE_FILES, {"paths": [*stores, *documents]})
    for path, store in stores.items():
        if path != "config.json":
            output.write(path, store.read(path))
    for donor in donors:
        donor.store.close()
    if donors[0].config and as_model:
        config = output_config(dict(donors[0].config), config_name(main_dtype(plan)))
        output.write("config.json", (json.dumps(config, indent=2) + "\n").encode())
    for path, data in documents.items():
        output.write(path, data)
    last = index(plan) if as_model else adapter_config
    output.write(commit_path(plan), (json.dumps(last, indent=2) + "\n").encode())


def commit_path(plan: Plan) -> str:
    """Return the file that is written last: no loader finds weights in the folder before it exists."""
    return _COMMITS[plan.settings.output]


def is_committed(output: Store, plan: Mapping[str, Any]) -> bool:
    """Return whether the file that is written last is there.

    Args:
        output: The folder.
        plan: The JSON form of the plan in it.
    """
    # Plans of earlier versions know models only.
    return output.exists(_COMMITS[plan["settings"].get("output", "model")])


def index(plan: Plan) -> dict[str, object]:
    """Return the index of the output in Hugging Face's form."""
    weight_map = {plan.tensors[tensor].name: file.name for file in plan.files for tensor in file.tensors}
    total = sum(file.size_bytes for file in plan.files)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def main_dtype(plan: Plan) -> str:
    """Return the header dtype in which most bytes of the merged tensors are written."""
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.group >= 0:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.elements * DTYPES[tensor.dtype].bits
    return max(sizes, key=lambda name: sizes[name])


def _occupied(plan: Plan, output: Store, existing: Mapping[str, object] | None) -> Problem:
    if existing is None:
        return Problem(
            what="is not empty and holds no merge of ours",
            where=f"output {output.location()}",
            remedy="choose an empty folder, or give --overwrite to remove the weights in it",
        )
    parts = existing.get("parts")
    old = parts if isinstance(parts, dict) else {}
    changed = [name for name, digest in plan.parts.items() if old.get(name) != digest]
    words = {"recipe": "the recipe", "sources": "the models' files", "layout": "the layout"}
    return Problem(
        what=f"holds a merge that differs in {' and '.join(words[name] for name in changed) or 'its version'}",
        where=f"output {output.location()}",
        remedy="choose another folder, or give --overwrite to start again",
    )


def _check_room(plan: Plan, output: Store) -> None:
    free = output.free_bytes()
    # Weights that lie there now are replaced or removed before the new ones are written.
    present = [path for path in output.list() if "/" not in path and path.endswith(".safetensors")]
    freed_bytes = sum(output.stat(path).size_bytes for path in present)
    needed = sum(file.size_bytes for file in plan.files) + _EXTRA_BYTES - freed_bytes
    if free is not None and needed > free:
        raise BudgetError(
            Problem(
                what=f"the disk has {format_bytes(free)} free, but the merge writes {format_bytes(needed)}",
                where=f"output {output.location()}",
                remedy=f"free {format_bytes(needed - free)}, or choose another place",
            )
        )


def _clear(output: Store, paths: tuple[str, ...]) -> None:
    """Remove an earlier checkpoint and run, the commit first; what else lies there is left alone."""
    try:
        recorded = (read_json(output, SIDE_FILES) or {}).get("paths", [])
    except VerificationError:
        recorded = []
    for path in (INDEX, ADAPTER_CONFIG, PLAN):
        output.delete(path)
    for path in paths:
        top = "/" not in path
        belongs = top and (path.endswith(_WEIGHTS) or path in MODEL_FILES or path == REPORT)
        if path.startswith(f"{FOLDER}/") or belongs or path in recorded:
            output.delete(path)
