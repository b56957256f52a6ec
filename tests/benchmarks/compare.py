"""Two runs of the benchmark beside each other: `python -m tests.benchmarks.compare [OLD [NEW]]`.

Without arguments the last two of build/bench, with one argument that and the last. Knows only what a run's JSON says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RUNS = Path("build/bench")


def main() -> None:
    """Parse the arguments, print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.compare", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    given: list[Path] = parser.parse_args().runs
    known = [path for path in sorted(RUNS.glob("*.json")) if path not in given]
    chosen = [*given, *known[-(2 - len(given)) :]] if len(given) < 2 else given
    if len(chosen) != 2:
        parser.error(f"two runs are compared; {RUNS} holds {len(known)}")
    old, new = (json.loads(path.read_text()) for path in chosen)
    console = Console(width=150)
    for path, run in zip(chosen, (old, new), strict=True):
        console.print(f"{path}: {json.dumps(run['machine'])}")
    console.print(table(old["ratios"], new["ratios"]))


def table(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> Table:
    """Return every ratio of either run: both medians, the new by the old, and whether rounds overlap.

    Args:
        old: Ratios as `tests.benchmarks.ratios` makes them.
        new: The same of the other run.
    """
    shown = Table(title="old and new")
    for heading in ("", "old", "new", "new / old", "beyond the noise", "goal"):
        shown.add_column(heading, justify="right" if heading else "left")
    before, after = ({ratio["key"]: ratio for ratio in ratios} for ratios in (old, new))
    for key in [*before, *(key for key in after if key not in before)]:
        one, other = before.get(key), after.get(key)
        cells = [f"{ratio['median']:.2f}" if ratio else "" for ratio in (one, other)]
        change, apart = "", ""
        if one and other and one["median"]:
            change = f"{other['median'] / one['median']:.2f}"
            apart = "yes" if _apart(one["values"], other["values"]) else ""
        shown.add_row(key, *cells, change, apart, goal(other or one or {}))
    return shown


def goal(ratio: Mapping[str, Any]) -> str:
    """Return a ratio's goal and whether it is met, in words."""
    bounds = [f"{sign} {ratio[key]:g}" for key, sign in (("low", "≥"), ("high", "≤")) if ratio.get(key) is not None]
    return f"{' '.join(bounds)} {'met' if ratio['met'] else 'NOT MET'}" if bounds else ""


def _apart(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether no round of one lies among the other's."""
    return min(one) > max(other) or max(one) < min(other)


if __name__ == "__main__":
    main()
