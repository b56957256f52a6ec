"""Ranges of local inputs that are looked at where the operating system holds them, instead of being read.

Owns a worker's maps of its inputs' files, and the error of what was looked at when a page of it was lost meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress

from pipeline.errors import CheckpointError, Problem
from pipeline.planning.places import ByteRange
from pipeline.planning.plan import Plan
from pipeline.storage import Store
from pipeline.storage.mapped import Look, MappedFile, faults

# Each mapped file takes a descriptor, of which a process has 1024 on common systems.
_MOST_FILES = 128


class InPlace:
    """The maps of a worker's inputs: of each the file that it is at. Thread-safe.

    Args:
        plan: The plan.
        stores: By input.
        room_bytes: How much may stay in this process of what it has looked at; without room nothing is looked at.
    """

    def __init__(self, plan: Plan, stores: Sequence[Store], room_bytes: int) -> None:
        self._plan = plan
        self._stores = stores
        self._step_bytes = room_bytes // len(stores) if len(stores) <= _MOST_FILES else 0
        self._lock = threading.Lock()
        # By input, a path and its file.
        self._files: dict[int, tuple[str, MappedFile | None]] = {}
        self._faults_before = faults() if self._step_bytes else 0

    def look_at(self, index: int, place: ByteRange) -> Look | None:
        """Return the bytes of a range of an input; None where they have to be read."""
        if not self._step_bytes or not self._stores[index].is_local:
            return None
        with self._lock:
            path, file = self._files.get(index, ("", None))
            if path != place.path:
                if file is not None:
                    file.close()
                file = self._mapped(index, place.path)
                self._files[index] = place.path, file
        return file.look(place.start, place.start + place.size_bytes) if file is not None else None

    def lost(self) -> bool:
        """Return whether a page of any input could not be had so far: zeros were seen in its place."""
        return self._step_bytes > 0 and faults() != self._faults_before

    def refusal(self, inputs: Iterable[int]) -> CheckpointError:
        """Return the error for a page that was lost where no file has changed.

        Args:
            inputs: What was being looked at.
        """
        return CheckpointError(
            *(
                Problem(
                    what="could not be read, or another of these files: its disk failed, or it was cut short meanwhile",
                    where=f"model {self._plan.inputs[index].name}, file {self._files[index][0]}",
                    remedy="check the disk, and let nothing write to the inputs during a merge; start again",
                )
                for index in inputs
            )
        )

    def close(self) -> None:
        """Let all files go."""
        for _, file in self._files.values():
            if file is not None:
                file.close()
        self._files.clear()

    def _mapped(self, index: int, path: str) -> MappedFile | None:
        with suppress(OSError):
            return MappedFile(self._stores[index].location(path), step_bytes=self._step_bytes)
        return None
