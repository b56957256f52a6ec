"""The parts of the benchmark: what is run on which family, and what is left out and why.

Owns the choice of programs. Each part returns programs with their runs; ratios are made of them elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import caches, programs, startup
from tests.benchmarks.programs import Case, Family
from tests.benchmarks.rounds import Setting, run_rounds
from tests.benchmarks.tuning import Settings

# Resident beside the inputs and what is kept: both processes, the output, what else runs.
_SPARE_BYTES = 1_500_000_000
# mergekit takes longest and varies least.
_PEER_EVERY = 2
# Each of the files that two workers share.
_RAY_FILE_SIZE = "128MB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all parts share.

    Attributes:
        tiny: A family of next to nothing: what a program takes for it is what it takes for any.
        left_out: What was not run, with the reason.
    """

    folder: Path
    floor: Settings
    mergekit: str | None
    tiny: Family
    left_out: list[str] = field(default_factory=list)

    def setting(self, family: Family, **changes: Any) -> Setting:
        """Return where a family's rounds run."""
        return Setting(**{"inputs": family.inputs, "folder": self.folder, "floor": self.floor, **changes})

    def peer(self, family: Family, every: int = _PEER_EVERY) -> list[Case]:
        """Return mergekit's average, if there is one to compare with."""
        return [dataclasses.replace(programs.peer_linear(family, self.mergekit), every=every)] if self.mergekit else []


def start(bench: Bench, family: Family, numbers: Iterator[int]) -> dict[str, Any]:
    """Return what programs take for next to nothing, and how long until they read the first byte of a tensor."""
    cases = [
        programs.renamed(programs.linear(bench.tiny), "linear, tiny"),
        programs.renamed(programs.two_reads(bench.tiny), "median, tiny"),
        *(programs.renamed(case, "mergekit linear, tiny") for case in bench.peer(bench.tiny)),
    ]
    timed = {case.program.name: case.program.command for case in (programs.linear(family), programs.two_reads(family))}
    first: dict[str, list[float]] = {name: [] for name in timed}

    def with_first_bytes() -> Iterator[int]:
        for number in numbers:
            for name, command in timed.items():
                seconds = startup.first_byte_s(command, family.inputs, bench.folder / "out")
                if seconds is not None:
                    first[name].append(seconds)
            yield number

    # What floors are compared with is of no interest here.
    cases = [dataclasses.replace(case, floor=None) for case in cases]
    found = run_rounds(cases, bench.setting(bench.tiny), with_first_bytes())
    imports = startup.imports_s(cases[1].program.command, bench.folder / "out")
    return {"programs": found, "first_byte_s": first, "imports_s": imports}


def warm(bench: Bench, family: Family, numbers: Iterator[int], *, peer_every: int = _PEER_EVERY) -> dict[str, Any]:
    """Return whole merges of a family that lies in the page cache."""
    cases = [programs.linear(family), *bench.peer(family, peer_every), programs.two_reads(family)]
    # Pages of the inputs that make room for what is kept would be read from the disk again.
    needed = programs.kept_bytes(family) + sum(path.stat().st_size for path in family.inputs) + _SPARE_BYTES
    if needed > _available_bytes():
        bench.left_out.append(f"median, kept, of {family.name}: needs {needed / 1e9:.1f} GB of memory")
    else:
        cases.append(programs.kept(family))
    if bench.mergekit and (karcher := programs.peer_karcher(family, bench.mergekit)):
        # Once: it takes a minute.
        cases.append(dataclasses.replace(karcher, every=1 << 30))
    return {"programs": run_rounds(cases, bench.setting(family, plans=True), numbers)}


def cold(bench: Bench, family: Family, floor: Settings, numbers: Iterator[int]) -> dict[str, Any]:
    """Return whole merges of a family that lies on the disk only."""
    caches.drop(family.inputs)
    share = caches.resident_share(family.inputs)
    if share:
        bench.left_out.append(f"cold cache: {share:.0%} of the inputs cannot be dropped from it")
        return {"programs": []}
    cases = [programs.linear(family), programs.two_reads(family), *bench.peer(family, every=4)]
    return {"programs": run_rounds(cases, bench.setting(family, cold=True, floor=floor, plans=True), numbers)}


def ray(bench: Bench, family: Family, numbers: Iterator[int]) -> dict[str, Any]:
    """Return the same merge in this process with two threads, and by two workers of a Ray that is started for it."""
    keys = {"file_size": _RAY_FILE_SIZE}
    pairs = ((bench.tiny, ", tiny"), (family, ""))
    cases = [
        programs.renamed(case, name + suffix)
        for of, suffix in pairs
        for case, name in ((programs.two_reads(of, **keys), "local"), (programs.on_ray(of, 2, **keys), "Ray"))
    ]
    cases = [dataclasses.replace(case, floor=None, plan=None, fixed=None) for case in cases]
    return {"programs": run_rounds(cases, bench.setting(family), numbers)}


def growth(bench: Bench, family: Family, counts: Sequence[int], numbers: Iterator[int]) -> dict[str, Any]:
    """Return merges of more and more models, with what a merge of next to nothing takes in the same round."""
    cases = [programs.renamed(programs.two_reads(bench.tiny), "median, tiny")]
    for count in counts:
        some = family.of(count)
        cases += [
            programs.renamed(programs.linear(some), f"linear, {count}"),
            programs.renamed(programs.two_reads(some), f"median, {count}"),
        ]
    cases = [dataclasses.replace(case, floor=None, plan=None) for case in cases]
    return {"programs": run_rounds(cases, bench.setting(family), numbers), "counts": list(counts)}


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
