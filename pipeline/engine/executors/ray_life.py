"""One worker of the cluster and the actors that are or will be it, one after the other.

Owns a worker's state as the driver sees it, and its words; decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.engine.executors.ray_actor import CONTROL, Facts, WorkerActor
from pipeline.engine.executors.ray_nodes import Ask
from pipeline.storage import Counters
from pipeline.units import format_seconds

# Workers that a text names before it only counts: a few lines of a terminal.
_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How many seconds the driver waits for what; tests wait less.

    Attributes:
        start_s: For room in the cluster and a fresh process, at the start of a job.
        begin_s: The part of it that workers which are up wait for the others before they begin.
        replace_s: The same for one that takes a lost worker's place while the others go on.
        silence_s: For a sign of life of a worker.
        tell_s: Until what is waited for is told.
        join_s: For all ranks to join a group.
        reduce_s: For the exchange of their sums.
        grace_s: Beyond the last two, for ranks that give up by their own clocks, before those that do not are replaced.
        look_s: Between two looks at the nodes that are drained.
    """

    # An autoscaler's new machine takes two to four minutes; importing torch on a busy one up to half a minute.
    start_s: float = 300
    # Processes that have room are up some ten seconds after each other on a busy machine.
    begin_s: float = 20
    # The others have its files meanwhile, so this only bounds how long nobody is told that the merge is smaller now.
    replace_s: float = 120
    # Questions have a thread of their own; a compiler or a machine that swaps may keep even that from running a while.
    silence_s: float = 60
    tell_s: float = 10
    # Two seconds at most were measured; but a rank that dies while it joins holds up the others for all of this.
    join_s: float = 30
    # All have their sums when they meet, so this is for the exchange alone. A rank that dies is seen by its closed
    # connection; only one that hangs, or a network that is cut, costs this time.
    reduce_s: float = 60
    # Ranks that only wait for another answer by then, or when that one is ended, which takes Ray some five seconds.
    grace_s: float = 10
    # A pre-empted machine has 30 seconds or more; one question serves all nodes.
    look_s: float = 2


@dataclass(slots=True, kw_only=True)
class Life:
    """One actor.

    Attributes:
        actor: Its handle.
        begun: The reference of its first answer to the job in hand; None once that is here.
        began_s: When it was asked to begin; a monotonic time.
        limit_s: How long that may take.
        facts: Its last answer about the job in hand; None before the first.
        settled_bytes: Its progress when it last completed a file: what stays done if it is lost now.
        asked: The reference of a question about facts, if one is open.
        asked_s: When it was last asked.
        silent_s: How long that question has been open, by the driver's own looks at it.
        stored: What its last answer said of storage, be it about an earlier job.
    """

    actor: Any
    begun: Any = None
    began_s: float = 0.0
    limit_s: float = 0.0
    facts: Facts | None = None
    settled_bytes: int = 0
    asked: Any = None
    asked_s: float = 0.0
    silent_s: float = 0.0
    stored: Counters = field(default_factory=Counters)

    def begin(self, number: int, job: Any, limit_s: float) -> None:
        """Give the actor a job, which makes it answer when it is there."""
        self.begun = self.actor.begin.remote(number, job)
        self.began_s, self.limit_s = time.monotonic(), limit_s
        # A question that is open is about the job before.
        self.asked, self.facts, self.settled_bytes, self.silent_s = None, None, 0, 0.0


@dataclass(slots=True, kw_only=True)
class Task:
    """A file in a worker's hand."""

    reference: Any
    file: int
    since_s: float


@dataclass(slots=True, kw_only=True)
class Member:
    """One worker.

    Attributes:
        number: Its place among the workers.
        life: The actor that is it, or will be when it is up.
        ask: What its actors ask of a node.
        successor: The actor on another node that becomes it when this one's node is drained.
        task: The file it runs.
        place: The address of the node where it ran last; "" before it has run.
        retired: Whether its files were handed to the others.
        draining: Whether its node is about to go.
        failures: Starts in a row that failed.
        trouble: What happened to it last, until it runs again.
    """

    number: int
    life: Life
    ask: Ask
    successor: Life | None = None
    task: Task | None = None
    place: str = ""
    retired: bool = False
    draining: bool = False
    failures: int = 0
    trouble: str = ""

    @property
    def ready(self) -> bool:
        """Whether it is up and has the job."""
        return self.life.facts is not None

    @property
    def name(self) -> str:
        """Its number and node, for people."""
        return f"worker {self.number} on {self.place}" if self.place else f"worker {self.number}"

    def waiting(self, now_s: float, patience: Patience) -> str:
        """Return in words what is waited for; "" when it runs."""
        if self.ready:
            if self.life.silent_s >= patience.tell_s:
                return f"{self.name}: no sign of life for {format_seconds(self.life.silent_s)}"
            if self.draining:
                return f"{self.name}: its node is being drained, it moves to another"
            return ""
        since_s = now_s - self.life.began_s
        if self.trouble:
            again = "handed over its files" if self.retired else "started again"
            return f"{self.name}: {self.trouble}; {again}, not up for {format_seconds(since_s)}"
        if since_s < patience.tell_s:
            return ""
        return f"{self.name}: not up for {format_seconds(since_s)}, asks for {self.ask}"


def listed(texts: Sequence[str]) -> str:
    """Return texts as one, of many only the first and how many there are."""
    more = len(texts) - _LISTED
    return "; ".join(texts[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


def actor_class() -> Any:
    """Return the actors' class in Ray's form, which is sent to the cluster once."""
    return ray.remote(concurrency_groups={CONTROL: 1})(WorkerActor)


def spawn(remote: Any, ask: Ask, node: str = "") -> Life:
    """Return a new actor of the class.

    Args:
        remote: The class.
        ask: What it asks of its node.
        node: The id of the node where it starts as long as that is there; "" takes any, spread, but none that is
            drained.
    """
    strategy = NodeAffinitySchedulingStrategy(node, soft=True) if node else "SPREAD"
    # Never restarted by Ray: the driver knows what the lost one had and must hand it out again.
    return Life(actor=remote.options(scheduling_strategy=strategy, max_restarts=0, **ask.options).remote())


def question(life: Life) -> Any:
    """Ask an actor for facts; return the reference of its answer."""
    return life.actor.facts.options(concurrency_group=CONTROL).remote()


def arrived(references: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Return which answers are here, and which are not, without waiting."""
    waiting = list(references)
    return ray.wait(waiting, num_returns=len(waiting), timeout=0) if waiting else ([], [])


def answer(reference: Any) -> Any:
    """Return an answer, or raise what came instead."""
    return ray.get(reference)


def halt(life: Life, number: int) -> None:
    """Make what an actor runs for a job end at its next chunk."""
    life.actor.stop.options(concurrency_group=CONTROL).remote(number)


def end(life: Life) -> None:
    """Kill an actor, or take back that it was asked for."""
    ray.kill(life.actor)
