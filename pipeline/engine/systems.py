"""A worker's part in linear systems: which of its tensors are solved how, and the memory that they share.

Owns the sources and solvers of one worker's systems. Knows nothing of output files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.engine.chunk_math import MergedChunk
from pipeline.engine.chunk_tasks import ChunkTasks
from pipeline.engine.elementwise import ElementwiseSystems
from pipeline.engine.matrices import MatrixSystems
from pipeline.engine.moment_source import MomentSource
from pipeline.engine.source import ChunkSource
from pipeline.engine.system_chunks import SystemValues
from pipeline.engine.system_states import SystemStates
from pipeline.engine.updates import TensorCache
from pipeline.numerics.devices import kernels_of
from pipeline.planning.grid import Chunk
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan
from pipeline.planning.system_memory import matrix_bytes
from pipeline.storage import Store


class Systems:
    """The systems of one worker.

    Args:
        plan: The plan.
        memory: What the worker may hold.
        source: Where the models' chunks come from.
        moments: Where second moments come from.
        tasks: Reads updates of low rank, and counts what is done.
        output: Where states are kept.
        device: torch's name of the device.
        check: Raises when the work is to end.
    """

    def __init__(
        self,
        plan: Plan,
        memory: Memory,
        source: ChunkSource,
        moments: MomentSource,
        tasks: ChunkTasks,
        output: Store,
        device: str,
        check: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._tasks = tasks
        values = SystemValues(plan, kernels_of(device), device)
        self.states = SystemStates(output, plan.fingerprint, device, check)
        self.room = MatrixRoom(plan, memory.systems_bytes)
        self.chunks = ElementwiseSystems(plan, source, moments, values, device, tasks.advance)
        self.matrices = MatrixSystems(plan, source, moments, values, tasks, self.states, self.room, device)

    def merged(
        self, tensors: Sequence[int], norms_N: Sequence[float], run: Callable[..., Iterator[Any]]
    ) -> Iterator[MergedChunk]:
        """Yield the merged chunks of tensors that solve systems, in order.

        Args:
            tensors: Neighbours in an output file.
            norms_N: What the models' diagonals are divided by.
            run: Yields the results of a task in order, as `InOrder.run` does.
        """
        plan = self._plan
        if not all(_is_elementwise(plan, tensor) for tensor in tensors):
            for chunks in run(self.matrices.merge, tensors, lambda _: iter(()), self.room):
                yield from chunks
            return
        cache = TensorCache(lambda tensor: self._tasks.read_again(tensor, None, {}))

        def task(chunk: Chunk) -> MergedChunk:
            with cache.lease(chunk.tensor) as prepared:
                return self.chunks.merge(chunk, prepared.updates, norms_N)

        every = [chunk for tensor in tensors for chunk in plan.written_chunks(tensor)]
        yield from run(task, every, self._tasks.needs_to_merge)


def _is_elementwise(plan: Plan, tensor: int) -> bool:
    system = plan.tensors[tensor].system
    return system is not None and system.elementwise


class MatrixRoom:
    """The memory that matrices in flight share.

    Args:
        plan: The plan.
        room_bytes: How much there is: enough for the largest matrix that reads its moments anew every time.
    """

    def __init__(self, plan: Plan, room_bytes: int) -> None:
        self._plan = plan
        self._left = room_bytes
        self._lock = threading.Lock()
        self._taken: dict[int, int] = {}
        self._resident: set[int] = set()

    def admit(self, item: int, *, alone: bool) -> bool:
        """Take room for a tensor and return True; with its moments resident where that fits."""
        with self._lock:
            for resident in (True, False):
                size = matrix_bytes(self._plan, item, resident=resident)
                if size <= self._left or (alone and not resident):
                    self._left -= size
                    self._taken[item] = size
                    if resident:
                        self._resident.add(item)
                    return True
        return False

    def release(self, item: int) -> None:
        """Take back a tensor's room."""
        with self._lock:
            self._left += self._taken.pop(item)
            self._resident.discard(item)

    def is_resident(self, item: int) -> bool:
        """Return whether a tensor's moments may all be held."""
        with self._lock:
            return item in self._resident
