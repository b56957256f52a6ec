"""What an output folder is refused for.

Owns the reasons and their words: an input's folder, another merge or model, too little room, files replaced meanwhile.
Reads only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.engine.run_folder import SUMMARY, read_json
from pipeline.errors import BudgetError, ClaimedError, OutputError, Problem, VerificationError
from pipeline.planning.plan import Plan
from pipeline.storage import Store, is_writable, place_of
from pipeline.units import format_bytes

# Room beside the weights for statistics, tokenizer and reports.
_EXTRA_BYTES = 64_000_000


def refuse_inputs(plan: Plan, output: Store) -> None:
    """Raise when the output cannot be written at all, is the folder of an input, holds one, or lies in one.

    Raises:
        OutputError: Names the input, or the scheme.
    """
    if not is_writable(output.url):
        raise OutputError(
            Problem(
                what="http cannot be written",
                where=f"output {output.location()}",
                remedy="choose a folder or an object store",
            )
        )
    for item in plan.inputs:
        if _overlap(output.url, item.url):
            raise OutputError(
                Problem(
                    what=f"overlaps with the folder of model {item.name}, {item.url}",
                    where=f"output {output.location()}",
                    remedy="choose another output folder",
                )
            )


def _overlap(output: str, source: str) -> bool:
    """Return whether two folders are one, or one holds the other, however they are spelled.

    Args:
        output: A URL.
        source: A URL.
    """
    written, read = place_of(output), place_of(source)
    if written.startswith(read) or read.startswith(written):
        return True
    # One folder mounted at two places has two paths.
    return "://" not in written + read and (_holds(read, written) or _holds(written, read))


def _holds(folder: str, inner: str) -> bool:
    """Return whether an existing folder of this machine is another or above it, by the disk's own numbers."""
    for above in (Path(inner), *Path(inner).parents):
        # What is not there, or may not be looked at, is no folder that could be written.
        with suppress(OSError):
            if above.samefile(folder):
                return True
    return False


def occupied(plan: Plan, output: Store, existing: Mapping[str, object] | None) -> Problem:
    """Return what is wrong with a folder that holds something else.

    Args:
        plan: The plan.
        output: The folder.
        existing: The JSON form of the plan in it, or None.
    """
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


def check_room(plan: Plan, output: Store, paths: Sequence[str]) -> None:
    """Raise when the disk has no room for what is written; object stores have no bound.

    Args:
        plan: The plan.
        output: The folder.
        paths: What lies in it.

    Raises:
        BudgetError: Says how much is missing.
    """
    free = output.free_bytes()
    if free is None:
        return
    # Weights that lie there now are replaced or removed before the new ones are written.
    present = [path for path in paths if "/" not in path and path.endswith(".safetensors")]
    freed_bytes = sum(output.stat(path).size_bytes for path in present)
    needed = sum(file.size_bytes for file in plan.files) + _EXTRA_BYTES - freed_bytes
    if needed > free:
        raise BudgetError(
            Problem(
                what=f"the disk has {format_bytes(free)} free, but the merge needs {format_bytes(needed)}",
                where=f"output {output.location()}",
                remedy=f"free {format_bytes(needed - free)}, or choose another place",
            )
        )


def refuse_other_plan(plan: Plan, output: Store) -> None:
    """Raise when a merge by another plan began in the folder since, whether it is there still or over already.

    Raises:
        ClaimedError: It did.
    """
    try:
        saved = read_json(output, SUMMARY)
    except VerificationError:
        # It says nothing of another plan.
        return
    if saved is not None and saved.get("fingerprint") != plan.fingerprint:
        raise ClaimedError(
            Problem(
                what="was taken over by a merge of another recipe or of other files",
                where=f"output {output.location()}",
                remedy="nothing was committed here; choose another folder",
            )
        )


def refuse_replaced(output: Store, written: Mapping[str, str], markers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise when files are not those that were written: a run that was taken for dead, of another plan, wrote on.

    Args:
        output: The folder.
        written: By name, the SHA-256 of what was written.
        markers: By name, the markers of this plan in the folder now, of the files that have their size.

    Raises:
        VerificationError: Names the files.
    """
    changed = [name for name, digest in written.items() if markers.get(name, {}).get("sha256") != digest]
    if changed:
        raise VerificationError(
            *(
                Problem(
                    what="was replaced or lost since it was written",
                    where=f"file {output.location(name)}",
                    remedy="end whatever else writes there, and start again with --overwrite",
                )
                for name in changed
            )
        )
