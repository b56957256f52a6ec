"""The run files of an output folder as others see them.

Owns ``_geomerge/runs/0001.json``, …: their names, which one counts, and whether its run lives. Reads only.

A run lives whose process does, on the same machine. Elsewhere its counter tells: one that stands still for some
intervals, measured by the clock of whoever looks, belongs to a dead run. Clocks of two machines are never compared.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engine.process_identity import machine_name, process_lives, process_start
from pipeline.engine.run_folder import FOLDER
from pipeline.storage import MissingObject, Store

RUNS = f"{FOLDER}/runs"
# Seconds between two signs of life: a request to an object store now and then, and news for whoever asks.
INTERVAL_S = 5.0
# Intervals without a sign of life after which a run is dead: a write that is retried for a while is not the end.
MISSED_INTERVALS = 4
# Times that a damaged run file is read, and seconds between: one that is being replaced is whole the next time, and
# nobody must wait long for one that stays damaged.
_READS = 3
_READ_AGAIN_S = 0.05
# An interval beyond this is no interval of ours; a damaged file must not make anybody wait for ever.
_LONGEST_INTERVAL_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run file as it was read.

    Attributes:
        data: Its bytes.
        facts: What they say; nothing when they are damaged.
    """

    number: int
    data: bytes
    facts: Mapping[str, Any]

    @property
    def ended(self) -> bool:
        """Whether the run said itself that it is over."""
        return bool(self.facts.get("state", "running") != "running")

    @property
    def interval_s(self) -> float:
        """Seconds between its signs of life."""
        interval = self.facts.get("interval_s")
        # No interval: NaN, too.
        if not isinstance(interval, (int, float)) or not interval > 0:
            return INTERVAL_S
        return float(min(interval, _LONGEST_INTERVAL_S))

    @property
    def overwrites(self) -> bool:
        """Whether it was making the folder anew, by --overwrite, when it ended otherwise than by an error."""
        return self.facts.get("overwrite") is True and self.facts.get("state") != "failed"

    @property
    def who(self) -> str:
        """The run in words."""
        facts = self.facts
        return (
            f"process {facts.get('pid', '?')} on {facts.get('host', '?')}, since {facts.get('started', '?')},"
            f" last sign of life {facts.get('time', '?')}"
        )

    def lives_here(self) -> bool | None:
        """Return whether its process lives; None when that cannot be seen from this machine."""
        if self.ended:
            return False
        if self.facts.get("machine") != machine_name():
            return None
        if self.facts.get("pid") == os.getpid() and self.facts.get("process_start") == process_start(os.getpid()):
            return str(self.facts.get("token")) in OWN_TOKENS
        return process_lives(self.facts.get("pid"), self.facts.get("process_start"))


# Tokens of the claims that this process holds.
OWN_TOKENS: set[str] = set()


def newest_run(output: Store, paths: Sequence[str] | None = None) -> Run | None:
    """Return the run that counts, or None.

    Args:
        output: The folder.
        paths: What lies in it, where that is known.
    """
    numbers = run_numbers(output.list(RUNS) if paths is None else paths)
    return read_run(output, numbers[-1]) if numbers else None


def moves(output: Store, run: Run, *, seconds: float) -> bool:
    """Watch a run file and return whether it changes, or goes, within some seconds."""
    deadline = time.monotonic() + seconds
    while (now := time.monotonic()) < deadline:
        time.sleep(min(run.interval_s / 5, deadline - now))
        found = read_run(output, run.number)
        if found is None or found.data != run.data:
            return True
    return False


def seen_to_live(output: Store, run: Run, *, seconds: float) -> bool:
    """Return whether a run lives; that of another machine is watched for up to some seconds."""
    here = run.lives_here()
    if here is not None or not moves(output, run, seconds=seconds):
        return bool(here)
    later = read_run(output, run.number)
    return later is not None and not later.ended


def run_path(number: int) -> str:
    """Return where the run file of a number lies."""
    return f"{RUNS}/{number:04d}.json"


def run_numbers(paths: Sequence[str]) -> list[int]:
    """Return the numbers of the run files among the paths of a listing, in order."""
    names = [path.removeprefix(f"{RUNS}/").removesuffix(".json") for path in paths if path.startswith(f"{RUNS}/")]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def read_run(output: Store, number: int) -> Run | None:
    """Return a run file, or None when it is gone; one that cannot be parsed is read again, for it may be changing."""
    for left in reversed(range(_READS)):
        try:
            data = output.read(run_path(number))
        except MissingObject:
            return None
        facts = _parsed(data)
        if facts:
            break
        if left:
            time.sleep(_READ_AGAIN_S)
    return Run(number=number, data=data, facts=facts)


def _parsed(data: bytes) -> dict[str, Any]:
    """Return the facts of a run file; none when it is damaged."""
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def read_runs(output: Store) -> dict[int, Run]:
    """Return all run files by number."""
    found = ((number, read_run(output, number)) for number in run_numbers(output.list(RUNS)))
    return {number: run for number, run in found if run is not None}
