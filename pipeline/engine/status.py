"""How far a merge is, seen from its output folder alone, while it runs or after.

Owns what `geomerge status` reports. A few small objects are read, whatever the size of the merge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engine.output import KINDS, is_committed, written_markers
from pipeline.engine.run_folder import MEASURED, PLAN, SOLUTIONS, SUMMARY, WRITTEN, marked, read_json
from pipeline.engine.runs import Run, newest_run, seen_to_live
from pipeline.errors import OutputError, Problem, VerificationError
from pipeline.storage import MissingObject, Store

# A plan up to this size is read whole to see that it can be; of a larger one, which may have hundreds of megabytes, the
# ends are looked at: what was cut shows there.
_READ_PLAN_BYTES = 1_000_000
# Bytes of each end: the brace and the white space beside it.
_END_BYTES = 16
# Intervals that a run of another machine is watched for a sign of life: it gives one in each, and half is for the way.
_WATCHED_INTERVALS = 1.5
# What the run file says of its progress, and what is said when no run is there: texts and numbers.
_PROGRESS = {
    "phase": str,
    "iteration": int,
    "done_bytes": int,
    "total_bytes": int,
    "files_done": int,
    "files_total": int,
}
_COUNTS = ("done_bytes", "total_bytes", "files_done", "files_total")
_LIVE_PROGRESS = {"rate": float, "seconds_left": float, "waiting_for": str}


def status(output: Store, *, watch: bool = True) -> dict[str, Any]:
    """Return the state of a merge.

    Args:
        output: The folder.
        watch: Whether a run of another machine is watched for some seconds to see if it lives; clocks do not tell.

    Returns:
        state: "planned", "measuring", "solved", "writing", "committed" or "damaged" (committed and cut since, or its
            plan cannot be read); "interrupted" when its run is gone, "failed" when it ended by an error.
        error: The text of that error, or None.
        run: host, pid and started of the run that is or was last at work, and whether it is alive (None when that
            cannot be seen from here without watching); None when no run is there.
        last_sign_of_life: When that run last gave one, by its own clock (UTC); None without a run.
        phase, iteration, done_bytes, total_bytes, files_done, files_total: What the run does or did, as
            `Progress.snapshot` has it; None without a run.
        rate, seconds_left, waiting_for: Of a run that may live; else None.
        method, fingerprint, files, files_measured, files_written, bytes, bytes_written: Of the whole merge.

    Raises:
        OutputError: There is no merge of ours here.
    """
    paths = output.list()
    run = newest_run(output, paths)
    plan = _planned(output) if PLAN in paths else None
    if PLAN not in paths and run is None:
        raise OutputError(
            Problem(
                what="holds no merge",
                where=f"output {output.location()}",
                remedy="name the output folder of a merge that was started",
            )
        )
    sizes = plan.sizes if plan is not None else {}
    measured = marked(paths, MEASURED, ".parquet") & sizes.keys()
    marks = sorted(marked(paths, WRITTEN, ".json") & sizes.keys())
    written = written_markers(output, marks, plan.fingerprint) if plan is not None else {}
    if plan is None:
        state = "damaged" if PLAN in paths else "planned"
    else:
        state = _state(plan, paths, measured=bool(measured), written=len(written))
    return {
        "output": output.location(),
        "state": state,
        "method": plan.method if plan is not None else None,
        "fingerprint": plan.fingerprint if plan is not None else None,
        "files": len(sizes),
        "files_measured": len(measured),
        "files_written": len(written),
        "bytes": sum(sizes.values()),
        "bytes_written": sum(sizes[name] for name in written),
        **_run_facts(output, run, state, watch=watch),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """What is asked of a plan or its summary."""

    fingerprint: str
    method: str
    kind: str
    sizes: Mapping[str, int]


def _planned(output: Store) -> _Planned | None:
    """Return what the summary says of the plan, or else the plan; None when the plan is damaged: a merge needs it."""
    if not _plan_is_whole(output):
        return None
    for path in (SUMMARY, PLAN):
        try:
            found = _parsed(read_json(output, path) or {})
        except VerificationError:
            continue
        if found is not None:
            return found
    return None


def _plan_is_whole(output: Store) -> bool:
    """Return whether the plan looks like a JSON object; True when it is gone by now."""
    try:
        size_bytes = output.stat(PLAN).size_bytes
        if size_bytes > _READ_PLAN_BYTES:
            first, last = output.read(PLAN, 0, _END_BYTES), output.read(PLAN, size_bytes - _END_BYTES, size_bytes)
            return first.lstrip().startswith(b"{") and last.rstrip().endswith(b"}")
        return isinstance(json.loads(output.read(PLAN)), dict)
    except MissingObject:
        return True
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or brackets without end
        return False


def _parsed(plan: Mapping[str, Any]) -> _Planned | None:
    """Return what is asked of a JSON document, or None when it has not the shape of a plan."""
    try:
        settings = plan["settings"]
        found = _Planned(
            fingerprint=plan["fingerprint"],
            method=settings["method"],
            # Plans of earlier versions know models only.
            kind=settings.get("output", "model"),
            sizes={file["name"]: file["size_bytes"] for file in plan["files"]},
        )
    except (AttributeError, KeyError, TypeError):
        return None
    texts = (found.fingerprint, found.method, found.kind, *found.sizes)
    whole = all(isinstance(text, str) for text in texts) and all(isinstance(size, int) for size in found.sizes.values())
    return found if whole and found.kind in KINDS else None


def _state(plan: _Planned, paths: Sequence[str], *, measured: bool, written: int) -> str:
    """Return how far a merge is, whatever its run."""
    if is_committed(paths, {"settings": {"output": plan.kind}}):
        # A committed output that lost a file since: the same merge writes it anew.
        return "committed" if written == len(plan.sizes) else "damaged"
    if written:
        return "writing"
    if SOLUTIONS in paths:
        return "solved"
    return "measuring" if measured else "planned"


def _told(facts: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return what a run file says, or None when that is not of its kind: any hand may have written there."""
    value = facts.get(key)
    if kind is str:
        return value if isinstance(value, str) else None
    if not isinstance(value, int if kind is int else (int, float)) or isinstance(value, bool):
        return None
    # Not NaN either; and what is larger counts no bytes.
    return value if abs(value) < 2**63 else None


def _run_facts(output: Store, run: Run | None, state: str, *, watch: bool) -> dict[str, Any]:
    """Return what is known of the run; its end may be the state of a merge that is not committed."""
    if run is None:
        nothing = dict.fromkeys((*_PROGRESS, *_LIVE_PROGRESS))
        return {"error": None, "run": None, "last_sign_of_life": None, **nothing}
    alive = run.lives_here()
    if alive is None and watch:
        alive = seen_to_live(output, run, seconds=_WATCHED_INTERVALS * run.interval_s)
    facts = run.facts
    told = facts.get("progress")
    progress: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    # All or none: a number of many is of no use without the number of all.
    if any(_told(progress, key, int) is None for key in _COUNTS):
        progress = {}
    if alive is False and state not in ("committed", "damaged"):
        state = "failed" if facts.get("state") == "failed" else "interrupted"
    return {
        "state": state,
        "error": _told(facts, "error", str),
        "run": {
            "host": _told(facts, "host", str),
            "pid": _told(facts, "pid", int),
            "started": _told(facts, "started", str),
            "alive": alive,
        },
        "last_sign_of_life": _told(facts, "time", str),
        **{key: _told(progress, key, kind) for key, kind in _PROGRESS.items()},
        **{key: _told(progress, key, kind) if alive is not False else None for key, kind in _LIVE_PROGRESS.items()},
    }
