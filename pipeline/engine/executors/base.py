"""What an executor is to the driver.

Owns the protocol. An executor starts one worker a shard, runs verbs of `ShardWorker` on them, and adds up what they
return; it knows nothing of merging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.engine.worker import Job

# Called now and then from the driver's thread with the input bytes that all workers have done since they started.
Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What workers used since they started; of one that was lost, what it was last heard to have used.

    Attributes:
        peak_memory_bytes: The largest resident set of every process that ran workers, by name.
        read_bytes: Input bytes fetched.
        reused_bytes: Input bytes taken from memory instead of a second fetch.
    """

    peak_memory_bytes: dict[str, int]
    read_bytes: int
    reused_bytes: int


class Executor(Protocol):
    """Runs workers."""

    name: str

    def reach(self, *, workers: int, memory_bytes: int) -> None:
        """Make sure that there is a place for workers, within seconds; called before an output is claimed.

        Args:
            workers: How many there will be.
            memory_bytes: What each of them may take.

        Raises:
            WorkerError: There is none.
        """
        ...

    def start(self, job: Job, shards: Sequence[Sequence[int]]) -> None:
        """Start one worker a shard; on a started executor, give its workers another job.

        Workers that are there already are kept as far as they are needed, ended or added to as the shards ask; usage
        and progress begin at zero. After a verb has failed, this is what makes an executor usable again.

        Args:
            job: Handed to every worker.
            shards: File indices by worker; one may be empty.

        Raises:
            WorkerError: They could not be started.
        """
        ...

    def map(self, verb: str, items: Mapping[int, tuple[Any, ...]], tick: Tick) -> Iterator[tuple[int, Any]]:
        """Run a verb on files and yield (file, result) in order of completion.

        Args:
            verb: A method of `ShardWorker` that takes a file index first.
            items: By file index, the further arguments; a file is run by the worker that owns it.
            tick: Told of progress.

        Raises:
            PipelineError: What a worker raised, unchanged; the others stop.
            WorkerError: No worker is left, or a file lost its worker too often.
        """
        ...

    def all_reduce(self, requests: Mapping[int, np.ndarray], tick: Tick) -> dict[int, np.ndarray]:
        """Run `ShardWorker.probe` on all files of the shards and return the sums of their limbs.

        Args:
            requests: By group, coefficients of the combinations to measure.
            tick: Told of progress.

        Returns:
            By group, the limbs with all carries moved on: the same bits whichever worker summed which files.

        Raises:
            PipelineError: What a worker raised, unchanged; the others stop.
            WorkerError: No worker is left, or a file lost its worker too often.
        """
        ...

    def usage(self) -> Usage:
        """Return what the workers have used so far."""
        ...

    def waiting(self) -> str:
        """Return in words what it waits for beyond workers that run, "" when nothing; callable from any thread."""
        ...

    def halt(self) -> None:
        """Make the workers end what they run, uploads included, and wait for it, though not for ever.

        For a driver that gives up: what it leaves behind then writes nothing more. `start` makes workers usable again.
        """
        ...

    def close(self) -> None:
        """End all workers; callable twice, and after a failure."""
        ...
