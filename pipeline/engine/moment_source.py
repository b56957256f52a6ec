"""Where second moments come from: ranges of the files of statistics, checked before anything is made of them.

Owns reading them and the errors about their numbers. Knows nothing of the models' values or of systems. Thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.engine.fetch import Fetcher, Want
from pipeline.errors import CheckpointError, Problem
from pipeline.numerics.triangles import statistic_fault, unpack_triangle
from pipeline.planning.plan import Plan
from pipeline.planning.system import Statistic
from pipeline.storage import MissingObject, open_store

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F64": np.dtype(np.float64)}


class MomentSource:
    """Reads the statistics of a plan.

    Args:
        plan: The plan.
        requests: Requests that may be in flight for one statistic; 0 to read by the thread that asks.
    """

    def __init__(self, plan: Plan, requests: int = 0) -> None:
        self._plan = plan
        self._stores = [open_store(item.url, plan.storage.of(item.url)) for item in plan.statistics]
        self._fetcher = Fetcher(requests) if requests and plan.statistics else None
        self._lock = threading.Lock()
        self._sound: set[Statistic] = set()
        self.read_bytes = 0

    def check_versions(self, tensors: Sequence[int]) -> None:
        """Raise when a file that holds statistics of these tensors is not the one that was planned for.

        Raises:
            CheckpointError: Names every changed file.
        """
        planned = (self._plan.tensors[tensor] for tensor in tensors)
        used = {(statistic.statistics, statistic.file) for tensor in planned for statistic in tensor.moments}
        problems = []
        for number, file in sorted(used):
            wanted = self._plan.statistics[number].files[file]
            try:
                stat = self._stores[number].stat(wanted.path)
                same = (stat.size_bytes, stat.version) == (wanted.size_bytes, wanted.version)
            except MissingObject:
                same = False
            if not same:
                problems.append(
                    Problem(
                        what="changed since the merge was planned",
                        where=f"statistics {self._plan.statistics[number].name}, file {wanted.path}",
                        remedy="let nothing write to the inputs during a merge; start again with --overwrite",
                    )
                )
        if problems:
            raise CheckpointError(*problems)

    def diagonal(self, statistic: Statistic, tensor: int, start: int, stop: int) -> np.ndarray:
        """Return the elements [start, stop) of a diagonal, in its own dtype.

        Raises:
            CheckpointError: One is not finite, or negative.
        """
        values_E = self._read(statistic, start, stop)
        self._check(statistic, tensor, values_E, matrix=False)
        return values_E

    def matrix(
        self, statistic: Statistic, tensor: int, dtype: np.dtype[Any], out_DD: np.ndarray | None = None
    ) -> np.ndarray:
        """Return a symmetric matrix, whole.

        Args:
            statistic: Which.
            tensor: Whose, for messages.
            dtype: Of the matrix.
            out_DD: Filled and returned when given, of that dtype.

        Raises:
            CheckpointError: An element is not finite, or one of the diagonal negative.
        """
        packed_T = self._read(statistic, 0, statistic.elements)
        with self._lock:
            known = statistic in self._sound
        if not known:
            self._check(statistic, tensor, packed_T, matrix=True)
            with self._lock:
                self._sound.add(statistic)
        size = statistic.size
        return unpack_triangle(packed_T, np.empty((size, size), dtype=dtype) if out_DD is None else out_DD)

    def close(self) -> None:
        """Release files."""
        if self._fetcher is not None:
            self._fetcher.close()
        for store in self._stores:
            store.close()

    def _read(self, statistic: Statistic, start: int, stop: int) -> np.ndarray:
        """Return stored elements [start, stop)."""
        dtype = _DTYPES[statistic.dtype]
        values_E = np.empty(stop - start, dtype=dtype)
        path = self._plan.statistics[statistic.statistics].files[statistic.file].path
        store, begin = self._stores[statistic.statistics], statistic.start + start * dtype.itemsize
        if values_E.size:
            if self._fetcher is not None:
                self._fetcher.fetch([Want(store=store, path=path, start=begin, buffer=values_E.view(np.uint8))])
            else:
                store.read_into(path, begin, values_E.view(np.uint8).data)
        with self._lock:
            self.read_bytes += values_E.nbytes
        return values_E

    def _check(self, statistic: Statistic, tensor: int, values: np.ndarray, *, matrix: bool) -> None:
        fault = statistic_fault(values, matrix=matrix)
        if fault is not None:
            item = self._plan.statistics[statistic.statistics]
            name = self._plan.tensors[tensor].name
            raise CheckpointError(
                Problem(
                    what=f"its {statistic.kind.replace('_', ' ')} is unusable: {fault}",
                    where=f"statistics {item.name}, file {item.files[statistic.file].path}, tensor {name}",
                    remedy=f"collect the statistics again, or average the tensor: add pipeline: {{average: [{name}]}}",
                )
            )
