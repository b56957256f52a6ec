"""Whether an output folder can be used, and the commit that makes it a checkpoint.

Owns what may be overwritten, what is resumed, and the order in which the last files appear. The index file, or an
adapter's configuration, is the commit: before it exists no loader finds weights here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from pipeline.checkpoints.adapter import ADAPTER_CONFIG
from pipeline.checkpoints.dtypes import DTYPES
from pipeline.checkpoints.sidecars import MODEL_FILES, output_config, side_files, tokenizer_files
from pipeline.engine.refusals import check_room, occupied, refuse_inputs, refuse_other_plan, refuse_replaced
from pipeline.engine.run_folder import (
    FOLDER,
    INDEX,
    PLAN,
    REPORT,
    SIDE_FILES,
    SUMMARY,
    at_once,
    read_json,
    write_json,
    written_path,
)
from pipeline.engine.runs import RUNS
from pipeline.errors import BudgetError, OutputError, Problem, VerificationError
from pipeline.numerics.dtypes import config_name
from pipeline.planning.adapters import Member
from pipeline.planning.plan import Plan
from pipeline.storage import MissingObject, Store

# What is written last, by the kind of output: no loader finds weights in the folder before it exists.
_COMMITS = {"model": INDEX, "adapter": ADAPTER_CONFIG}
# What a merge may make.
KINDS = frozenset(_COMMITS)
# What makes a folder a checkpoint; removed by --overwrite, so that two models never lie in one folder.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


class State(Enum):
    """What an output folder holds of this merge."""

    FRESH = "fresh"
    PARTIAL = "partial"
    COMMITTED = "committed"


def examine(plan: Plan, output: Store, *, overwrite: bool, continues: bool = False) -> State:
    """Return what an output folder holds of a merge; reads only.

    Args:
        plan: The plan.
        output: The folder.
        overwrite: Whether what is in it may be removed: another merge or model, or this merge's own beginning.
        continues: Whether the run before was making the folder anew, by --overwrite, when it was killed or interrupted:
            what it has done of this very merge is kept, unless it is committed.

    Raises:
        OutputError: It is an input's folder, or holds another merge or model.
        VerificationError: The plan in it is damaged.
    """
    refuse_inputs(plan, output)
    paths = output.list()
    try:
        existing = read_json(output, PLAN) if PLAN in paths else None
    except VerificationError:
        if not overwrite:
            raise
        existing = None
    if existing is not None and existing.get("fingerprint") == plan.fingerprint:
        if overwrite:
            return State.PARTIAL if continues and commit_path(plan) not in paths else State.FRESH
        whole = {commit_path(plan), REPORT} <= set(paths) and not missing_side_files(output, paths)
        names = [file.name for file in plan.files]
        if whole and len(written_markers(output, names, plan.fingerprint)) == len(names):
            return State.COMMITTED
        return State.PARTIAL
    if paths and not overwrite and not _only_begun(paths):
        raise OutputError(occupied(plan, output, existing))
    return State.FRESH


def prepare(plan: Plan, output: Store, *, overwrite: bool, continues: bool = False) -> State:
    """Check an output folder, clear it if told to, and save the plan in it. The caller holds its claim.

    Args:
        plan: The plan.
        output: The folder.
        overwrite: As of `examine`.
        continues: As of `examine`.

    Raises:
        PipelineError: As of `examine`.
        StorageError: It cannot be written.
        BudgetError: The disk has no room.
    """
    state = examine(plan, output, overwrite=overwrite, continues=continues)
    if state is State.COMMITTED:
        return state
    output.probe_writable()
    output.sweep()
    paths = output.list()
    check_room(plan, output, paths)
    if state is State.PARTIAL:
        # A checkpoint that lost a file or a part of one is none: what is missing is written again.
        output.delete(commit_path(plan))
        # One that was killed while it took this merge's place may have left its own.
        write_json(output, SUMMARY, _summary(plan))
        return state
    _clear(output, paths)
    write_json(output, SUMMARY, _summary(plan))
    write_json(output, PLAN, plan.to_json())
    return state


def untried(plan: Plan, output: Store) -> Iterator[Problem]:
    """Yield what would end a merge into a folder when it begins to write there, as far as it shows without writing.

    Args:
        plan: The plan.
        output: The folder; it is only looked at.

    Raises:
        StorageError: It cannot be looked at.
    """
    paths, where = output.list(), f"output {output.location()}"
    try:
        check_room(plan, output, paths)
    except BudgetError as error:
        yield from error.problems
    if output.is_local:
        place = Path(output.location())
        above = next(folder for folder in (place, *place.parents) if folder.exists())
        if not above.is_dir():
            yield Problem(what=f"cannot be made: {above} is no folder", where=where, remedy="choose another folder")
        elif not os.access(above, os.W_OK | os.X_OK):
            yield Problem(what=f"may not be written, nor may {above}", where=where, remedy="check the permissions")
    elif not paths:
        # An empty prefix and a bucket that does not exist look the same.
        remedy = "a merge finds out when it begins; a plan writes nothing"
        yield Problem(what="nothing is there yet, so it may not exist or not be writable", where=where, remedy=remedy)


def missing_side_files(output: Store, paths: Sequence[str]) -> list[str]:
    """Return the configuration, tokenizer and report files that a commit wrote and that are gone.

    Args:
        output: The folder.
        paths: What lies in it.
    """
    recorded = (read_json(output, SIDE_FILES) or {}).get("paths", [])
    present = frozenset(paths)
    return [path for path in recorded if path not in present]


def written_markers(output: Store, names: Sequence[str], fingerprint: str) -> dict[str, dict[str, Any]]:
    """Return, by name, the markers of the output files that are there with the size that their marker states.

    Args:
        output: The folder.
        names: The output files.
        fingerprint: The plan's. The marker of another plan, left by a worker that nobody could stop, or of none, counts
            for nothing; nor does a damaged one.
    """

    def request(name: str) -> dict[str, Any] | None:
        try:
            marker = read_json(output, written_path(name))
        except VerificationError:
            return None
        if marker is None or marker.get("fingerprint") != fingerprint:
            return None
        try:
            whole = output.stat(name).size_bytes == marker.get("size_bytes")
        except MissingObject:
            return None
        return marker if whole else None

    found = zip(names, at_once(output, request, names), strict=True)
    return {name: marker for name, marker in found if marker is not None}


def _only_begun(paths: Sequence[str]) -> bool:
    """Return whether a run left nothing here but its plan, as one does that was refused in its first pass."""
    return all(path in (PLAN, SUMMARY) or path.startswith(f"{RUNS}/") for path in paths)


def _summary(plan: Plan) -> dict[str, object]:
    """Return what `geomerge status` needs of a plan."""
    return {
        "fingerprint": plan.fingerprint,
        "settings": {"method": plan.settings.method, "output": plan.settings.output},
        "files": [{"name": file.name, "size_bytes": file.size_bytes} for file in plan.files],
    }


def commit(
    plan: Plan,
    output: Store,
    donors: Sequence[Member],
    documents: Mapping[str, bytes],
    adapter_config: Mapping[str, object] | None = None,
    *,
    written: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write everything beside the weights and then the file that makes the folder a model or an adapter.

    Args:
        plan: The plan; all its files are written.
        output: The folder.
        donors: Whose configuration and tokenizer are taken; what a later one has replaces an earlier one's.
        documents: Report, model card and tables by path.
        adapter_config: Of a merged adapter.
        written: By name, the SHA-256 of the files' bytes as this run knows them.
        check: Raises when this run may no longer write; called at the beginning and before the last file.
    """

    def last_look() -> None:
        refuse_other_plan(plan, output)
        refuse_replaced(output, written, written_markers(output, list(written), plan.fingerprint))
        check()

    # Also before anything is written: what another merge may have made of the folder by now is left as it is.
    last_look()
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
    last_look()
    output.write(commit_path(plan), (json.dumps(last, indent=2) + "\n").encode())


def commit_path(plan: Plan) -> str:
    """Return the file that is written last: no loader finds weights in the folder before it exists."""
    return _COMMITS[plan.settings.output]


def is_committed(paths: Sequence[str], plan: Mapping[str, Any]) -> bool:
    """Return whether the file that is written last is there.

    Args:
        paths: What lies in the output folder.
        plan: The JSON form of the plan in it, or its summary.
    """
    # Plans of earlier versions know models only.
    return _COMMITS[plan["settings"].get("output", "model")] in paths


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


def _clear(output: Store, paths: tuple[str, ...]) -> None:
    """Remove an earlier checkpoint and merge, the commit first; what else lies there, and the claim, is left alone.

    Killed at any point it leaves a folder that is known as a merge of ours: the record of its side files goes after
    them, and its plan stays until the new one takes its place.
    """
    try:
        recorded = (read_json(output, SIDE_FILES) or {}).get("paths", [])
    except VerificationError:
        recorded = []
    for path in (INDEX, ADAPTER_CONFIG):
        output.delete(path)
    for path in paths:
        top = "/" not in path
        belongs = top and (path.endswith(_WEIGHTS) or path in MODEL_FILES or path == REPORT)
        ours = path.startswith(f"{FOLDER}/") and not path.startswith(f"{RUNS}/")
        if path not in (PLAN, SIDE_FILES) and (ours or belongs or path in recorded):
            output.delete(path)
    output.delete(SIDE_FILES)
