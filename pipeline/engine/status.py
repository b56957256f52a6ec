"""How far a merge is, seen from its output folder alone.

Owns what `geomerge status` reports.
"""

from __future__ import annotations

from typing import Any

from pipeline.engine.output import is_committed, is_written
from pipeline.engine.run_folder import MEASURED, PLAN, SOLUTIONS, WRITTEN, finished, read_json
from pipeline.errors import OutputError, Problem
from pipeline.storage import Store


def status(output: Store) -> dict[str, Any]:
    """Return the state of a merge.

    Returns:
        state: "planned", "measuring", "solved", "writing", "committed" or "damaged"; counts of files and bytes.

    Raises:
        OutputError: There is no merge of ours here.
    """
    plan = read_json(output, PLAN)
    if plan is None:
        raise OutputError(
            Problem(
                what="holds no merge",
                where=f"output {output.location()}",
                remedy="name the output folder of a merge that was started",
            )
        )
    sizes = {file["name"]: file["size_bytes"] for file in plan["files"]}
    measured = finished(output, MEASURED, ".parquet")
    written = frozenset(name for name in finished(output, WRITTEN, ".json") if is_written(output, name))
    solved = output.exists(SOLUTIONS)
    if is_committed(output, plan):
        # A committed output that lost a file since: the same merge writes it anew.
        state = "committed" if written >= sizes.keys() else "damaged"
    elif written:
        state = "writing"
    elif solved:
        state = "solved"
    else:
        state = "measuring" if measured else "planned"
    return {
        "output": output.location(),
        "state": state,
        "method": plan["settings"]["method"],
        "fingerprint": plan["fingerprint"],
        "files": len(sizes),
        "files_measured": len(measured & sizes.keys()),
        "files_written": len(written & sizes.keys()),
        "bytes": sum(sizes.values()),
        "bytes_written": sum(size for name, size in sizes.items() if name in written),
    }
