"""What runs in a worker's process on a Ray cluster: a `ShardWorker`, its counters, and its rank in a reduction.

Owns the actor's class. Knows nothing of other actors' files, of placement or of replacement. Calls to `facts` and
`stop` go to the concurrency group `CONTROL`, so they are answered while a verb runs.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from pipeline.engine.executors.limbs import Requests, add_limbs, pack, unpack
from pipeline.engine.process import peak_memory_bytes, pick_device, raise_descriptor_limit, single_threaded_products
from pipeline.engine.worker import Job, ShardWorker
from pipeline.storage import Counters, counters

# The concurrency group of calls that must be answered while a verb runs.
CONTROL = "control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A sign of life: what an actor has done so far, and where it is.

    Attributes:
        done_bytes: Input bytes done of the job in hand, for progress.
        peak_bytes: The process's largest resident set.
        read_bytes: Input bytes of this job that were fetched.
        reused_bytes: Input bytes of this job that were taken from memory.
        stored: What the process asked of storage since it began.
        node: Ray's id of the node.
        address: The node's.
        process: The process's id there.
    """

    done_bytes: int
    peak_bytes: int
    read_bytes: int
    reused_bytes: int
    stored: Counters
    node: str
    address: str
    process: int


class WorkerActor:
    """A `ShardWorker` in a process of its own; one verb at a time, with a second thread for questions meanwhile."""

    def __init__(self) -> None:
        # The process is the actor's for life, so the setting is not put back; forgetting it would.
        self._products = single_threaded_products()
        self._products.__enter__()
        raise_descriptor_limit()
        self._node = ray.get_runtime_context().get_node_id()
        self._address = ray.util.get_node_ip_address()
        self._worker: ShardWorker | None = None
        self._job_number = 0
        self._pass = 0
        self._covered: set[int] = set()
        self._sums: dict[int, np.ndarray] = {}
        self._group: Any = None
        self._generation = 0
        self._ranks = (0, 1)

    def begin(self, number: int, job: Job) -> Facts:
        """Take a job instead of the one before; jobs are numbered by the executor."""
        if self._worker is not None:
            self._worker.close()
        if job.plan.settings.measured and job.plan.settings.distances == "stream":
            # Imports torch, which nobody should have to wait for in a reduction.
            from pipeline.engine.executors import ray_group  # noqa: F401
        self._job_number = number
        self._covered, self._sums = set(), {}
        self._worker = ShardWorker(dataclasses.replace(job, device=pick_device(job.device, 0)))
        return self.facts()

    def run(self, verb: str, file: int, arguments: tuple[Any, ...]) -> tuple[Any, Facts]:
        """Run a verb on one file."""
        return getattr(self._worker, verb)(file, *arguments), self.facts()

    def probe(self, number: int, requests: Requests, file: int) -> tuple[None, Facts]:
        """Add one file to the sums of a pass, which stay here for `reduce`; a file that is in them counts once."""
        if number != self._pass:
            self._pass, self._covered, self._sums = number, set(), {}
        if file not in self._covered and self._worker is not None:
            add_limbs(self._sums, self._worker.probe(requests, [file]))
            self._covered.add(file)
        return None, self.facts()

    def join(self, place: tuple[str, int, int], rank: int, world: int, limits_s: tuple[float, float]) -> None:
        """Become a rank of a new group; what is left of an older one is dropped.

        Args:
            place: The store's host and port, and the group's generation.
            rank: Of this actor.
            world: How many ranks there are.
            limits_s: Seconds for all to join, and for an exchange.

        Raises:
            RuntimeError: Not all ranks came in time.
        """
        self._group = None
        host, port, generation = place
        if world > 1:
            from pipeline.engine.executors.ray_group import Rank

            self._group = Rank(host, port, generation, (rank, world), address=self._address, limits_s=limits_s)
        self._generation, self._ranks = generation, (rank, world)

    def reduce(
        self, generation: int, number: int, requests: Requests, files: tuple[int, ...]
    ) -> dict[int, np.ndarray] | None:
        """Return the sums of all ranks' probes of a pass, at rank 0 only.

        Args:
            generation: The group's; a late call of an older one is refused.
            number: The pass.
            requests: What was probed.
            files: Those that must be in this rank's sums, no more and no less.

        Raises:
            RuntimeError: Another rank was lost, or a call came late.
        """
        if generation != self._generation or number != self._pass or set(files) != self._covered:
            raise RuntimeError(
                f"reduction {number} of generation {generation} over files {files}, but here is"
                f" {self._pass} of {self._generation} over {sorted(self._covered)}"
            )
        rank, world = self._ranks
        flat = pack(requests, self._sums)
        if world > 1:
            try:
                self._group.add_up(flat)
            except RuntimeError:
                # Dropped at once: the closed connections wake the other ranks, which would wait for the timeout.
                self._group = None
                raise
        return unpack(requests, flat) if rank == 0 else None

    def facts(self) -> Facts:
        """Return progress and memory."""
        worker = self._worker
        read, reused = worker.traffic() if worker is not None else (0, 0)
        return Facts(
            done_bytes=worker.done_bytes if worker is not None else 0,
            peak_bytes=peak_memory_bytes(),
            read_bytes=read,
            reused_bytes=reused,
            stored=counters(),
            node=self._node,
            address=self._address,
            process=os.getpid(),
        )

    def stop(self, number: int) -> None:
        """Make the verb in progress end at its next chunk, unless another job has begun."""
        worker = self._worker
        if worker is not None and number == self._job_number:
            worker.stop()
