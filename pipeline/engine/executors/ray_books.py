"""What the workers of a job have done and used, those that are gone included; and who is far behind the others.

Owns the sums. Knows lives only by what they said last.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from pipeline.engine.executors.ray_actor import Facts
from pipeline.engine.executors.ray_life import Member

# A file that takes so many times the median of those done is a straggler's, but not below the seconds.
_STRAGGLER, _STRAGGLER_S = 3, 5.0
# Files that must be done before a median says anything.
_ENOUGH_FILES = 3


class Books:
    """Sums over one job."""

    def __init__(self) -> None:
        self._done_bytes = self._read_bytes = self._reused_bytes = 0
        self._peaks: dict[int, int] = {}
        self._durations_s: list[float] = []

    def begin_pass(self) -> None:
        """Forget how long files took."""
        self._durations_s.clear()

    def took(self, seconds: float) -> None:
        """Take note of how long a file took."""
        self._durations_s.append(seconds)

    def leave(self, member: Member) -> None:
        """Keep what a worker's actor has done and used before it goes."""
        facts = member.life.facts
        if facts is not None:
            self._done_bytes += member.life.settled_bytes
            self._read_bytes += facts.read_bytes
            self._reused_bytes += facts.reused_bytes
            self._peaks[member.number] = max(self._peaks.get(member.number, 0), facts.peak_bytes)

    def progress(self, members: Sequence[Member]) -> int:
        """Return the input bytes done, by what was heard last."""
        return self._done_bytes + sum(facts.done_bytes for _, facts in _last(members))

    def used(self, members: Sequence[Member]) -> tuple[dict[int, int], int, int]:
        """Return peak memory by worker, bytes read and bytes reused, by what was heard last."""
        peaks = dict(self._peaks)
        read, reused = self._read_bytes, self._reused_bytes
        for member, facts in _last(members):
            peaks[member.number] = max(peaks.get(member.number, 0), facts.peak_bytes)
            read, reused = read + facts.read_bytes, reused + facts.reused_bytes
        return dict(sorted(peaks.items())), read, reused

    def stragglers(self, members: Sequence[Member], now_s: float) -> list[tuple[Member, float, float]]:
        """Return who is far behind: worker, seconds for its file so far, and the seconds that are usual."""
        if len(self._durations_s) < _ENOUGH_FILES:
            return []
        usual_s = statistics.median(self._durations_s)
        limit_s = max(_STRAGGLER * usual_s, _STRAGGLER_S)
        running = [(member, now_s - member.task.since_s) for member in members if member.task is not None]
        return [(member, took_s, usual_s) for member, took_s in running if took_s > limit_s]


def _last(members: Sequence[Member]) -> Iterator[tuple[Member, Facts]]:
    """Yield the workers that are up, and what they said last."""
    for member in members:
        if member.life.facts is not None:
            yield member, member.life.facts
