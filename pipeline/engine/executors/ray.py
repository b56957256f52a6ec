"""The Ray executor: one actor a worker, on CPUs or one GPU each, wherever the cluster has room.

Owns the order of things: who runs which file, what happens to files when a worker is lost, and reductions that cover
all of them. The modules beside it that begin with ``ray`` are the only others that know Ray.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from pipeline.engine.executors import ray_nodes
from pipeline.engine.executors.base import Tick, Usage
from pipeline.engine.executors.limbs import pack, unpack
from pipeline.engine.executors.ray_crew import Change, Crew
from pipeline.engine.executors.ray_life import Member, Patience
from pipeline.engine.executors.ray_meeting import Meeting
from pipeline.engine.executors.ray_nodes import Ask
from pipeline.engine.executors.ray_watch import Watch
from pipeline.engine.executors.schedule import ATTEMPTS, Schedule
from pipeline.engine.process import peak_memory_bytes
from pipeline.engine.worker import Job
from pipeline.errors import Problem, WorkerError
from pipeline.events import Listener, Note, ignore

# Seconds for workers to end their chunk and to abort their upload, when the merge is given up: longer than both take,
# shorter than what stops a job waits before it kills.
_HALT_S = 3.0
# By worker, the files whose results it keeps in memory until they are reduced.
_Held = dict[int, list[int]]


class RayExecutor:
    """Runs every worker as an actor.

    Args:
        address: The cluster's; None takes the one a job runs in, or starts one here.
        listener: Told of workers that were lost, replaced, moved or retired.
        patience: How long to wait for what.
    """

    name = "ray"

    def __init__(
        self, *, address: str | None = None, listener: Listener = ignore, patience: Patience | None = None
    ) -> None:
        patience = patience or Patience()
        self._address = address
        self._listen = listener
        # What a Ray started here has room for: workers, and bytes each; None when it is not ours.
        self._own: tuple[int, int] | None = None
        self._patience = patience
        self._crew = Crew(patience, listener)
        self._watch = Watch(self._crew, patience)
        self._meeting = Meeting(patience)
        self._schedule = Schedule([])
        self._names: tuple[str, ...] = ()
        self._passes = 0
        self._told_bytes = 0

    def reach(self, *, workers: int, memory_bytes: int) -> None:
        """Connect to the cluster, if it is one that was there before; what is started here is started with a job."""
        if ray_nodes.cluster_address(self._address) not in (None, "local"):
            self._connect(workers, memory_bytes)

    def start(self, job: Job, shards: Sequence[Sequence[int]]) -> None:
        """Connect, and start or keep one actor a shard, spread over nodes; begin with those that are up in time."""
        self._connect(len(shards), job.memory.total_bytes)
        gpus = 0 if job.device == "cpu" else ray.cluster_resources().get("GPU", 0)
        if job.device == "cuda" and not gpus:
            raise WorkerError(Problem(what="the Ray cluster has no GPU", remedy="use --device cpu"))
        self._schedule = Schedule(shards)
        self._names = tuple(layout.name for layout in job.plan.files)
        self._told_bytes = 0
        ask = Ask(memory_bytes=job.memory.total_bytes, gpus=1 if gpus else 0)
        self._crew.engage(dataclasses.replace(job, device="cuda" if gpus else "cpu"), len(shards), ask)
        for member in self._crew.members:
            if member.retired:
                self._schedule.retire(member.number)
        told = False
        begun_s = time.monotonic()
        while any(not member.ready and not member.retired for member in self._crew.members):
            late = time.monotonic() - begun_s > self._patience.begin_s
            if late and any(member.ready for member in self._crew.members):
                # Their files may be done by others until they come up.
                self._listen(Note(text=f"begun without {self._crew.text}"))
                break
            for _ in self._crew.wait():
                pass
            self._look({})
            if self._crew.text and not told:
                told = True
                self._listen(Note(text=f"waiting for workers: {self._crew.text}; the cluster: {ray_nodes.room()}"))

    def map(self, verb: str, items: Mapping[int, tuple[Any, ...]], tick: Tick) -> Iterator[tuple[int, Any]]:
        """Run a verb on files; a lost actor is replaced or its files go to others, and its file is run again."""
        self._schedule.begin(items)
        self._crew.begin_pass()

        def call(member: Member, file: int) -> Any:
            return member.life.actor.run.remote(verb, file, items[file])

        for member, file, result in self._serve(call, tick, {}):
            member.life.settled_bytes = member.life.facts.done_bytes if member.life.facts else 0
            yield file, result

    def all_reduce(self, requests: Mapping[int, np.ndarray], tick: Tick) -> dict[int, np.ndarray]:
        """Probe all files; the actors add up their exact sums among themselves.

        What a worker has probed stays with it, so a reduction that fails is repeated from there: only the files of
        those that were lost are probed again, by whoever owns them then.
        """
        files = self._schedule.files
        self._schedule.begin(files)
        self._crew.begin_pass()
        self._crew.settle()
        self._passes += 1
        number, reference = self._passes, ray.put(dict(requests))
        held: _Held = {}

        def call(member: Member, file: int) -> Any:
            return member.life.actor.probe.remote(number, reference, file)

        for _ in range(ATTEMPTS):
            for member, file, _result in self._serve(call, tick, held):
                held.setdefault(member.number, []).append(file)
            ranks = [member for member in self._crew.members if held.get(member.number)]
            if not ranks:
                return unpack(requests, pack(requests, {}))
            total = self._meeting.total(self._crew, ranks, held, number, reference, lambda: self._look(held))
            if total is not None:
                return total
            # Changes that came with the failure.
            self._look(held)
        raise WorkerError(
            Problem(
                what=f"the workers' reduction failed {ATTEMPTS} times, at last by {self._meeting.trouble}",
                where=f"{len(self._crew.members)} workers",
                remedy="look at the nodes' logs and the network between them; the same command resumes",
            )
        )

    def usage(self) -> Usage:
        """Return what every actor has used, and the driver's memory."""
        peaks, read, reused = self._crew.used()
        workers = {f"worker {number}": peak for number, peak in peaks.items()}
        return Usage(peak_memory_bytes={"driver": peak_memory_bytes(), **workers}, read_bytes=read, reused_bytes=reused)

    def waiting(self) -> str:
        """Return in words what it waits for beyond workers that run."""
        return self._crew.text

    def processes(self) -> dict[int, tuple[str, int]]:
        """Return node address and process id of every worker that is up, for whoever must find it there."""
        found = {member.number: member.life.facts for member in self._crew.members}
        return {number: (facts.address, facts.process) for number, facts in found.items() if facts is not None}

    def halt(self) -> None:
        """Make the actors end what they run."""
        if ray.is_initialized():
            self._crew.stop(wait_s=_HALT_S)

    def close(self) -> None:
        """End actors and, if it was started here, Ray."""
        self._crew.close()
        self._meeting.close()
        if self._own is not None:
            self._own = None
            ray.shutdown()

    def _connect(self, workers: int, memory_bytes: int) -> None:
        """Reach the cluster; a Ray started here that is too small for the job is started again."""
        if self._own is not None and (workers > self._own[0] or memory_bytes > self._own[1]):
            self.close()
        if ray_nodes.connect(self._address, workers=workers, memory_bytes=memory_bytes):
            self._own = (workers, memory_bytes)

    def _serve(self, call: Callable[[Member, int], Any], tick: Tick, held: _Held) -> Iterator[tuple[Member, int, Any]]:
        """Run the pass's files on whoever is free, until all are done; yield worker, file and result."""
        complete = False
        try:
            while self._schedule.left:
                self._look(held)
                for member in self._crew.free():
                    file = self._schedule.take(member.number)
                    if file is None:
                        break
                    self._crew.assign(member, file, call(member, file))
                for member, file, result in self._crew.wait():
                    self._schedule.done(file)
                    yield member, file, result
                self._tell(tick)
            complete = True
        finally:
            if not complete:
                self.halt()

    def _look(self, held: _Held) -> None:
        """Look after the workers, and put back the files of those that were lost."""
        for change in self._watch.look(lambda member: bool(held.get(member.number))):
            self._apply(change, held)
        self._watch.require_hope()

    def _apply(self, change: Change, held: _Held) -> None:
        number = change.member.number
        if change.kind == "back":
            self._schedule.restore(number)
            return
        self._schedule.put_back(held.pop(number, []))
        if change.kind == "retired":
            self._schedule.retire(number)
        elif change.file is not None and change.counted:
            self._schedule.lost(change.file, self._names[change.file], change.place)
        elif change.file is not None:
            self._schedule.put_back([change.file])

    def _tell(self, tick: Tick) -> None:
        """Tell the progress, which never falls: a lost worker's file begins anew."""
        self._told_bytes = max(self._told_bytes, self._crew.progress())
        tick(self._told_bytes)
