"""Rounds: every program once in each, with its floor beside it, so that a busy machine slows all of them alike.

Owns the order of a round, the time that a section may take, and what is kept of a run.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import caches
from tests.benchmarks.contest import Figures, take_merge
from tests.benchmarks.programs import Case, planned
from tests.benchmarks.tuning import Amounts, Settings, take_floor


@dataclass(slots=True, kw_only=True)
class Clock:
    """Hands out the time of a whole benchmark to its sections, by weight.

    Attributes:
        minutes: The whole.
        weights: By section, in the order in which they run; a section gives up its own when it begins.
        most: Rounds of a section, at most.
    """

    minutes: float
    weights: dict[str, float]
    most: int
    started: float = field(default_factory=time.monotonic)

    def rounds(self, section: str) -> Iterator[int]:
        """Yield numbers of rounds for as long as another one fits, and one in any case while there is time at all."""
        begun = time.monotonic()
        left = self.minutes * 60 - (begun - self.started)
        whole = sum(self.weights.values())
        share = left * self.weights.pop(section) / whole
        longest = 0.0
        for number in range(self.most):
            at = time.monotonic()
            if left <= 0 or (number and at - begun + longest > share):
                return
            yield number
            longest = max(longest, time.monotonic() - at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and how rounds are run.

    Attributes:
        inputs: Every file that any of the programs reads, the base last.
        folder: For outputs.
        cold: Drop the inputs from the page cache before every run, rather than see to it that they lie there.
        plans: Let every second round plan each program before it runs.
    """

    inputs: Sequence[Path]
    folder: Path
    floor: Settings
    cold: bool = False
    plans: bool = False

    def prepare(self) -> None:
        """Bring the page cache into the state that a run begins with."""
        if self.cold:
            caches.drop(self.inputs)
        else:
            caches.warm(self.inputs)


def run_rounds(cases: Sequence[Case], setting: Setting, numbers: Iterator[int]) -> list[dict[str, Any]]:
    """Return every program's runs."""
    runs: dict[str, list[dict[str, Any]]] = {case.program.name: [] for case in cases}
    for number in numbers:
        floors: dict[Amounts, Figures] = {}
        for case in cases:
            if number % case.every:
                continue
            run: dict[str, Any] = {"round": number}
            if case.floor is not None:
                if case.floor not in floors:
                    setting.prepare()
                    floors[case.floor] = take_floor(setting.floor, case.floor, setting.inputs, setting.folder / "floor")
                run["floor"] = dataclasses.asdict(floors[case.floor])
            if setting.plans and case.plan and number % 2 == 0:
                setting.prepare()
                run["plan"] = _projection(case.plan)
            setting.prepare()
            figures, report = take_merge(case.program, setting.folder / "out")
            run |= dataclasses.asdict(figures)
            if report is not None:
                run |= {key: report[key] for key in ("passes", "bytes_read", "seconds")}
            runs[case.program.name].append(run)
    return [_program(case, runs[case.program.name]) for case in cases]


def _program(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    floor = dataclasses.asdict(case.floor) if case.floor else None
    return {"name": case.program.name, "floor": floor, "fixed": case.fixed, "runs": runs}


def _projection(arguments: tuple[str, ...]) -> dict[str, Any]:
    plan = planned(arguments)
    return {key: plan[key] for key in ("seconds", "rates", "planning_seconds")} | {
        "memory_bytes": plan["memory_per_worker"]["total"]
    }
