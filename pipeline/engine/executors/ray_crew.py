"""The workers of a job on a cluster: who is there, who is lost, replaced, moved or retired.

Owns the actors and what can be done with them; `ray_watch` decides when. Knows nothing of queues: it reports what
happened to a worker as `Change`s. Called from the driver's thread only, but for `text`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.engine.executors import ray_metrics, ray_nodes, ray_spread
from pipeline.engine.executors.ray_actor import Facts
from pipeline.engine.executors.ray_books import Books
from pipeline.engine.executors.ray_life import Life, Member, Patience, Task, actor_class, end, halt, question, spawn
from pipeline.engine.executors.ray_nodes import Ask
from pipeline.engine.worker import Job
from pipeline.events import Listener, Note

# Seconds between two looks at the workers' progress: smooth on a terminal.
TICK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happened to a worker.

    Attributes:
        kind: "lost": what it held is gone, another actor takes its place. "retired": its files must go to the others.
            "back": a retired one runs after all.
        member: The worker.
        place: Its name and node when it happened.
        file: The file that it had in hand.
        counted: Whether the file may be to blame.
    """

    kind: Literal["lost", "retired", "back"]
    member: Member
    place: str
    file: int | None = None
    counted: bool = False


class Crew:
    """The workers of an executor.

    Args:
        patience: How long to wait for what.
        listen: Told of losses, replacements, moves.
    """

    def __init__(self, patience: Patience, listen: Listener) -> None:
        self.members: list[Member] = []
        # What is waited for; replaced as a whole, so that another thread may read it.
        self.text = ""
        # What a worker asks of a node.
        self.ask = Ask(memory_bytes=0, gpus=0)
        self.books = Books()
        self._patience = patience
        self._listen = listen
        self._changes: list[Change] = []
        self._class: Any = None
        self._job: Any = None
        self._job_number = 0

    def engage(self, job: Job, workers: int, ask: Ask) -> None:
        """Give a job to so many workers: those that are there and large enough, and new ones."""
        self.stop()
        self._changes.clear()
        self.books = Books()
        self._class = self._class or actor_class()
        self._job = ray.put(job)
        self._job_number += 1
        if not self.ask.covers(ask):
            self.close()
            self.ask = ask
        for member in self.members[workers:]:
            _end(member)
        del self.members[workers:]
        # With nobody to go on without them, they are waited for like new ones.
        none_left = all(member.retired for member in self.members)
        for member in self.members:
            member.task, member.draining = None, False
            if member.successor is not None:
                end(member.successor)
                member.successor = None
            if member.failures or none_left:
                end(member.life)
                member.life, member.failures, member.retired = spawn(self._class, self.ask), 0, False
            member.life.begin(self._job_number, self._job, self._patience.start_s)
        numbers = range(len(self.members), workers)
        for number, node in zip_longest(numbers, ray_spread.places(self.ask, len(numbers))):
            life = spawn(self._class, self.ask, node or "")
            life.begin(self._job_number, self._job, self._patience.start_s)
            self.members.append(Member(number=number, life=life, ask=self.ask))

    def begin_pass(self) -> None:
        """Begin a pass, which has its own usual time for a file."""
        ray_metrics.count_pass()
        self.books.begin_pass()

    def changes(self) -> list[Change]:
        """Return what happened to workers since the last time."""
        changes, self._changes = self._changes, []
        return changes

    def free(self) -> list[Member]:
        """Return the workers that may take a file, those of drained nodes only while there is no other."""
        ready = [member for member in self.members if member.ready]
        staying = [member for member in ready if not member.draining]
        return [member for member in staying or ready if member.task is None]

    def assign(self, member: Member, file: int, reference: Any) -> None:
        """Take note that a worker was given a file."""
        member.task = Task(reference=reference, file=file, since_s=time.monotonic())

    def wait(self) -> Iterator[tuple[Member, int, Any]]:
        """Wait a moment for workers to finish a file, or to come up; yield worker, file and result.

        Raises:
            PipelineError: What a worker raised.
        """
        running = {member.task.reference: member for member in self.members if member.task is not None}
        references = [*running, *(life.begun for _, life in self.beginners())]
        if not references:
            time.sleep(TICK_S / 10)
            return
        done, others = ray.wait(references, num_returns=1, timeout=TICK_S)
        if done and others:
            # Whatever else is done, in one go: each look costs as much as there are workers.
            done += ray.wait(others, num_returns=len(others), timeout=0)[0]
        for reference in done:
            member = running.get(reference)
            if member is None or member.task is None:
                continue
            try:
                result, facts = ray.get(reference)
            except RayTaskError as error:
                raise cause(error) from error
            except RayError as error:  # the actor, its node or its memory
                self.lose(member, first_line(error))
                continue
            task, member.task = member.task, None
            self.books.took(time.monotonic() - task.since_s)
            self.heard(member, member.life, facts)
            yield member, task.file, result

    def lose(self, member: Member, reason: str) -> None:
        """Give up a worker's actor and start another in its place."""
        place, file, drained = member.name, member.task.file if member.task else None, member.draining
        self.move(member, member.successor or self.spawn())
        member.trouble = reason
        self._changes.append(Change(kind="lost", member=member, place=place, file=file, counted=not drained))
        self.note(f"{place}: {reason}; started again")
        ray_metrics.count_loss()

    def progress(self) -> int:
        """Return the input bytes done of the job, by what was heard last."""
        return self.books.progress(self.members)

    def used(self) -> tuple[dict[int, int], int, int]:
        """Return peak memory by worker, bytes read and bytes reused, after asking all workers once more."""
        calls = {question(member.life): member for member in self.members if member.ready}
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=self._patience.tell_s) if calls else ([], [])
        for call in done:
            # Of one that does not answer, what was heard last stands.
            with suppress(RayError):
                self.heard(calls[call], calls[call].life, ray.get(call))
        return self.books.used(self.members)

    def settle(self) -> None:
        """Take note that all progress so far stays, whoever is lost."""
        for member in self.members:
            facts = member.life.facts
            member.life.settled_bytes = facts.done_bytes if facts is not None else 0

    def stop(self, *, wait_s: float = 0.0) -> None:
        """Make all workers end what they do at their next chunk; they need a job again after that.

        Args:
            wait_s: Wait so long for those that have a file in hand.
        """
        running = [member.task.reference for member in self.members if member.task is not None]
        for member in self.members:
            member.task = None
            if member.ready:
                halt(member.life, self._job_number)
        if running and wait_s:
            ray.wait(running, num_returns=len(running), timeout=wait_s)

    def close(self) -> None:
        """End all workers."""
        for member in self.members:
            _end(member)
        self.members.clear()
        self.text = ""

    def beginners(self) -> list[tuple[Member, Life]]:
        """Return the actors that have not answered yet."""
        lives = [(member, life) for member in self.members for life in (member.life, member.successor) if life]
        return [(member, life) for member, life in lives if life.begun is not None]

    def heard(self, member: Member, life: Life, facts: Facts) -> None:
        """Take a sign of life."""
        ray_metrics.count_stored(member.number, life.stored, facts.stored)
        life.facts, life.stored, life.silent_s = facts, facts.stored, 0.0

    def leave(self, member: Member) -> None:
        """End a worker's actor; what it has done is kept in mind."""
        self.books.leave(member)
        end(member.life)
        member.task, member.draining = None, False

    def move(self, member: Member, successor: Life) -> None:
        """Let a worker go on as another actor; what it has done is kept in mind."""
        self.leave(member)
        member.life, member.successor = successor, None

    def restore(self, member: Member) -> None:
        """Take a retired worker that is up after all."""
        member.retired = False
        self._changes.append(Change(kind="back", member=member, place=member.name))

    def retire(self, member: Member, reason: str) -> None:
        """Hand a worker's files to the others; should it come up after all, it is welcome."""
        member.retired, member.trouble = True, reason
        self._changes.append(Change(kind="retired", member=member, place=member.name))
        self.note(f"{member.name}: {reason}; its files go to the others (cluster: {ray_nodes.room()})")

    def spawn(self) -> Life:
        """Return a new actor for the job in hand."""
        life = spawn(self._class, self.ask)
        life.begin(self._job_number, self._job, self._patience.replace_s)
        return life

    def note(self, text: str) -> None:
        """Tell the listener."""
        self._listen(Note(text=text))


def cause(error: RayTaskError) -> BaseException:
    """Return the exception that a worker raised, without Ray's wrapping."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error


def first_line(error: BaseException) -> str:
    """Return what Ray says of a loss in one line; the rest is about classes and log files."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    return line[:1].lower() + line[1:]


def _end(member: Member) -> None:
    end(member.life)
    if member.successor is not None:
        end(member.successor)
