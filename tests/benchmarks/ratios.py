"""From runs to ratios: what is divided by what, and how far it should come.

Owns the names of the ratios, which are compared from run to run, and their goals. Every ratio is taken within a round;
measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

_Run = Mapping[str, Any]

# What merges may take beside their floors.
_FLOOR_GOALS = {"linear": 1.3, "median, two reads": 1.5, "median, kept": 1.5}
# How many times faster than mergekit an average is, and what part of its memory any merge takes.
_FASTER, _MEMORY_PART = 5.0, 0.25
# How far a projection may be off.
_PROJECTION = (0.7, 1.3)
# Seconds until the first tensor is read.
_START_S = 1.0
# Two workers beside two threads.
_RAY = 1.2
# Models at which the cost of the median has grown to twice the models' number.
_SLOPE = 32
# What noise may add to a growth that should be none.
_NOISE = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One figure of a benchmark, over its rounds.

    Attributes:
        key: What it says; the same from run to run.
        values: By round.
        low: The least that it should be, or None.
        high: The most.
    """

    key: str
    values: Sequence[float]
    low: float | None = None
    high: float | None = None

    @property
    def middle(self) -> float:
        """The median over the rounds."""
        return median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median is where it should be; None without a goal."""
        if self.low is None and self.high is None:
            return None
        return (self.low is None or self.middle >= self.low) and (self.high is None or self.middle <= self.high)

    def to_json(self) -> dict[str, Any]:
        """Return it with its median."""
        fields = {"key": self.key, "values": list(self.values), "low": self.low, "high": self.high}
        return {**fields, "median": self.middle, "met": self.met}


def ratios(sections: Sequence[Mapping[str, Any]]) -> list[Ratio]:
    """Return the ratios of all sections that were run."""
    makers: dict[str, Callable[[Mapping[str, Any]], Iterator[Ratio]]] = {
        "start": _start,
        "warm": _whole,
        "cold": _whole,
        "ray": _ray,
        "growth": _growth,
    }
    found = [ratio for section in sections for ratio in makers[section["kind"]](section)]
    return [ratio for ratio in (*found, *_memory(sections)) if ratio.values]


def _start(section: Mapping[str, Any]) -> Iterator[Ratio]:
    for name, values in section["first_byte_s"].items():
        yield Ratio(key=f"start: seconds to the first byte of a tensor, {name}", values=values, high=_START_S)


def _whole(section: Mapping[str, Any]) -> Iterator[Ratio]:
    """Yield what whole merges of one family take beside the floor, mergekit and the plan."""
    title = f"{section['family']}{', cold' if section['kind'] == 'cold' else ''}"
    runs = _runs(section)
    for ratio in _all_of(title, runs):
        # Goals are for families whose merge takes longer than its start.
        yield ratio if section["large"] else replace(ratio, low=None, high=None)


def _all_of(title: str, runs: Mapping[str, Mapping[int, _Run]]) -> Iterator[Ratio]:
    peer = runs.get("mergekit linear", {})
    for name, of in runs.items():
        walls = [run["wall_s"] / run["floor"]["wall_s"] for run in of.values() if "floor" in run]
        yield Ratio(key=f"{title}: {name} / floor", values=walls, high=_FLOOR_GOALS.get(name))
    yield Ratio(
        key=f"{title}: mergekit linear / linear", values=_by(peer, runs.get("linear", {}), "wall_s"), low=_FASTER
    )
    ours = {name: of for name, of in runs.items() if name in _FLOOR_GOALS}
    for name, of in ours.items():
        if name != "linear":
            yield Ratio(key=f"{title}: {name} / mergekit linear", values=_by(of, peer, "wall_s"), high=1.0)
    for name, of in ours.items():
        # What was allowed for keeping is not what the merge needs.
        high = None if name == "median, kept" else _MEMORY_PART
        yield Ratio(key=f"{title}: peak of {name} / mergekit's", values=_by(of, peer, "peak_bytes"), high=high)
        own = _by(of, peer, "anonymous_bytes")
        yield Ratio(key=f"{title}: peak of {name} / mergekit's, without mapped files", values=own)
    for name, of in ours.items():
        plans = [(run["plan"], run) for run in of.values() if "plan" in run]
        low, high = _PROJECTION
        # A plan's phases are those of the whole command, its start included.
        values = [sum(plan["seconds"].values()) / run["wall_s"] for plan, run in plans]
        yield Ratio(key=f"{title}: {name}, projected / measured seconds", values=values, low=low, high=high)
        bytes_ = [run["peak_bytes"] / plan["memory_bytes"] for plan, run in plans]
        yield Ratio(key=f"{title}: {name}, measured / projected memory", values=bytes_, high=1.0)


def _ray(section: Mapping[str, Any]) -> Iterator[Ratio]:
    runs = _runs(section)
    ours, theirs, tiny, tiny_theirs = (
        {number: run["wall_s"] for number, run in runs.get(name, {}).items()}
        for name in ("local", "Ray", "local, tiny", "Ray, tiny")
    )
    rounds = [number for number in theirs if number in ours and number in tiny and number in tiny_theirs]
    start = {number: tiny_theirs[number] - tiny[number] for number in rounds}
    title = section["family"]
    values = [(theirs[number] - start[number]) / ours[number] for number in rounds]
    high = _RAY if section["large"] else None
    yield Ratio(key=f"{title}: two Ray workers / two threads, beyond Ray's start", values=values, high=high)
    yield Ratio(key="Ray's start, seconds", values=list(start.values()))


def _growth(section: Mapping[str, Any]) -> Iterator[Ratio]:
    """Yield the processor time of n models beyond a start, by what it may have grown to since fewer models."""
    runs, counts = _runs(section), section["counts"]
    tiny = runs.get("median, tiny", {})
    # A merge of the fewest is so short that the start's noise shows.
    origin = counts[min(1, len(counts) - 1)]

    def shape(method: str, count: int) -> float:
        return count * (1 + count / _SLOPE) if method == "median" else count

    for method, words in (("linear", "n"), ("median", f"n(1 + n/{_SLOPE})")):
        before = runs.get(f"{method}, {origin}", {})
        for count in counts:
            of = runs.get(f"{method}, {count}", {})
            rounds = [number for number in of if number in before and number in tiny]
            values = [
                (of[number]["cpu_s"] - tiny[number]["cpu_s"])
                / (before[number]["cpu_s"] - tiny[number]["cpu_s"])
                / (shape(method, count) / shape(method, origin))
                for number in rounds
            ]
            if count != origin:
                key = f"growth: CPU of {method}, {count} models / {origin} models, by {words}"
                yield Ratio(key=key, values=values, high=_NOISE if count > origin else None)


def _memory(sections: Sequence[Mapping[str, Any]]) -> Iterator[Ratio]:
    """Yield what a family of larger models takes beside one of as many smaller models."""
    peaks: dict[tuple[str, str], float] = {}
    for section in sections:
        size, _, models = section["family"].partition(" x ")
        for name, runs in _runs(section).items():
            # Of a growing family, a program's name tells how many models.
            of = name.removeprefix("median, ") if section["kind"] == "growth" else models
            if section["kind"] in ("warm", "growth") and name in ("median, two reads", f"median, {of}"):
                peaks[size, of] = max((run["peak_bytes"] for run in runs.values()), default=0)
    small = next((s["family"].partition(" x ")[0] for s in sections if s["kind"] == "growth"), None)
    for (size, models), peak in peaks.items():
        if size != small and peak and (other := peaks.get((str(small), models))):
            key = f"memory: median of {size} x {models} / {small} x {models}"
            yield Ratio(key=key, values=[peak / other], high=_NOISE)


def _runs(section: Mapping[str, Any]) -> dict[str, dict[int, _Run]]:
    """Return a section's runs by program and round."""
    return {program["name"]: {run["round"]: run for run in program["runs"]} for program in section["programs"]}


def _by(of: Mapping[int, _Run], other: Mapping[int, _Run], key: str) -> list[float]:
    """Return one program's figures by another's, where a round has both."""
    return [of[number][key] / other[number][key] for number in of if number in other]
