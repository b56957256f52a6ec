"""Ranges of local inputs that are looked at where the operating system holds them, instead of being read.

Owns a worker's maps of its inputs' files, and the error of what was looked at when a page of it was lost meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np

from pipeline.errors import CheckpointError, Problem
from pipeline.planning.places import ByteRange
from pipeline.planning.plan import Plan
from pipeline.storage import Store
from pipeline.storage.mapped import MappedFile, faults


class InPlace:
    """The maps of a worker's inputs. Thread-safe.

    Args:
        plan: The plan.
        stores: By input.
        room_bytes: How much may stay in this process of what it has looked at; without room nothing is looked at.
    """

    def __init__(self, plan: Plan, stores: Sequence[Store], room_bytes: int) -> None:
        self._plan = plan
        self._stores = stores
        self._step_bytes = room_bytes // len(stores)
        self._lock = threading.Lock()
        self._files: dict[tuple[int, str], MappedFile | None] = {}
        # By input, the file that was looked at last.
        self._latest: dict[int, MappedFile] = {}
        self._faults_before = faults() if room_bytes else 0

    def look_at(self, index: int, place: ByteRange) -> np.ndarray | None:
        """Return the bytes of a range of an input; None where they have to be read."""
        file = self._file(index, place.path)
        return file.view(place.start, place.start + place.size_bytes) if file is not None else None

    def let_go(self, index: int, place: ByteRange) -> None:
        """End the look at a range."""
        file = self._file(index, place.path)
        if file is not None:
            file.let_go(place.start, place.start + place.size_bytes)

    def lost(self) -> bool:
        """Return whether a page of any input could not be had so far: zeros were seen in its place."""
        return self._step_bytes > 0 and faults() != self._faults_before

    def refusal(self, places: Mapping[int, ByteRange]) -> CheckpointError:
        """Return the error for a page that was lost where no file has changed.

        Args:
            places: By input, what was being looked at.
        """
        return CheckpointError(
            *(
                Problem(
                    what="could not be read, or another of these files: its disk failed, or it was cut short meanwhile",
                    where=f"model {self._plan.inputs[index].name}, file {place.path}",
                    remedy="check the disk, and let nothing write to the inputs during a merge; start again",
                )
                for index, place in places.items()
            )
        )

    def close(self) -> None:
        """Let all files go."""
        for file in self._files.values():
            if file is not None:
                file.close()
        self._files.clear()

    def _file(self, index: int, path: str) -> MappedFile | None:
        """Return the map of a file; None where there is none."""
        key = (index, path)
        with self._lock:
            if key not in self._files:
                self._files[key] = self._mapped(self._stores[index], path)
            file = self._files[key]
            if file is not None and self._latest.get(index) is not file:
                if index in self._latest:
                    self._latest[index].rest()
                self._latest[index] = file
            return file

    def _mapped(self, store: Store, path: str) -> MappedFile | None:
        if not store.is_local or not self._step_bytes:
            return None
        with suppress(OSError):
            return MappedFile(store.location(path), step_bytes=self._step_bytes)
        return None
