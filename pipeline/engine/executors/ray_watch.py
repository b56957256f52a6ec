"""Looking after the workers of a cluster: who gives no sign of life, who must move, who does not come up.

Owns every decision about workers' lives, and the questions they are asked; what follows from one is done by the crew.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray.exceptions import RayError, RayTaskError

from pipeline.engine.executors import ray_metrics, ray_nodes
from pipeline.engine.executors.ray_crew import TICK_S, Change, Crew, cause, first_line
from pipeline.engine.executors.ray_life import Life, Member, Patience, answer, arrived, end, listed, question
from pipeline.engine.executors.schedule import ATTEMPTS
from pipeline.errors import Problem, WorkerError
from pipeline.units import format_seconds

# Questions to all workers together a second: one costs the driver half a millisecond, so they take a tenth of a core
# at most. A thousand workers are asked every five seconds then, which is a twelfth of the patience with a silent one.
_QUESTIONS_PER_S = 200


class Watch:
    """Looks after a crew, as often as it is called but not much oftener than people look.

    Args:
        crew: The workers.
        patience: How long to wait for what.
    """

    def __init__(self, crew: Crew, patience: Patience) -> None:
        self._crew = crew
        self._patience = patience
        self._drains = ray_nodes.DrainWatch(patience.look_s)
        self._looked_s = 0.0

    def look(self, holds: Callable[[Member], bool]) -> list[Change]:
        """Hear all workers, replace who is lost, move who must move; return what happened since the last time.

        Args:
            holds: Whether a worker keeps results in memory that it would take along.

        Raises:
            PipelineError: A worker cannot take the job.
        """
        now_s = time.monotonic()
        self._hear_beginners(now_s)
        if now_s - self._looked_s >= TICK_S / 2:
            # The driver may have been away; that is not the workers' silence.
            self._hear(now_s, min(now_s - self._looked_s, 2 * TICK_S))
            self._look_at_drains(now_s, holds)
            self._looked_s = now_s
            self._describe(now_s)
        return self._crew.changes()

    def require_hope(self) -> None:
        """Raise when no worker runs, and none that may still come up is waited for.

        Raises:
            WorkerError: What each asks for, what happened to it, and what the cluster has.
        """
        if not any(member.ready or not member.retired for member in self._crew.members):
            reasons = listed([f"{member.name}: {member.trouble}" for member in self._crew.members])
            raise WorkerError(
                Problem(
                    what=f"no worker is left; each asks for {self._crew.ask} ({reasons})",
                    where=f"Ray cluster of {ray_nodes.room()}",
                    remedy="add nodes, or ask for less --memory; the same command resumes",
                )
            )

    def _hear_beginners(self, now_s: float) -> None:
        """Take who has come up, and give up who has not in time."""
        waiting = {life.begun: (member, life) for member, life in self._crew.beginners()}
        done, late = arrived(waiting)
        for reference in done:
            self._answered(*waiting[reference])
        for reference in late:
            member, life = waiting[reference]
            if life is member.life and not member.retired and now_s - life.began_s > life.limit_s:
                limit = format_seconds(life.limit_s)
                self._crew.retire(member, f"no room for it, or not up, within {limit}; it asks for {self._crew.ask}")

    def _answered(self, member: Member, life: Life) -> None:
        """Take the first answer of an actor."""
        try:
            facts = answer(life.begun)
        except RayTaskError as error:
            raise cause(error) from error
        except RayError as error:
            self._not_begun(member, life, first_line(error))
            return
        life.begun = None
        self._crew.heard(member, life, facts)
        if life is not member.life:
            return
        back, member.place, member.failures = member.trouble or member.retired, facts.address, 0
        member.trouble = ""
        if back:
            self._crew.note(f"{member.name}: runs again")
        if member.retired:
            self._crew.restore(member)

    def _not_begun(self, member: Member, life: Life, reason: str) -> None:
        """Try again with an actor that died before it was up, but not for ever."""
        member.failures += 1
        life.begun = None
        if life is member.successor:
            member.successor = None
        elif member.failures < ATTEMPTS:
            member.trouble = reason
            member.life = self._crew.spawn()
        elif not member.retired:
            self._crew.retire(member, f"died {ATTEMPTS} times before it was up: {reason}")

    def _hear(self, now_s: float, step_s: float) -> None:
        """Read the answers that have come, replace who is silent or lost, and ask again, not too often."""
        asked = {
            member.life.asked: member for member in self._crew.members if member.ready and member.life.asked is not None
        }
        done, silent = arrived(asked)
        for reference in done:
            member = asked[reference]
            member.life.asked = None
            try:
                self._crew.heard(member, member.life, answer(reference))
            except RayError as error:
                self._crew.lose(member, first_line(error))
        for reference in silent:
            member = asked[reference]
            member.life.silent_s += step_s
            if member.life.silent_s > self._patience.silence_s:
                self._crew.lose(member, f"no sign of life for {format_seconds(member.life.silent_s)}")
        pause_s = max(TICK_S, len(self._crew.members) / _QUESTIONS_PER_S)
        for member in self._crew.members:
            if member.ready and member.life.asked is None and now_s - member.life.asked_s >= pause_s:
                member.life.asked, member.life.asked_s, member.life.silent_s = question(member.life), now_s, 0.0

    def _look_at_drains(self, now_s: float, holds: Callable[[Member], bool]) -> None:
        """Move workers away from nodes that are about to go, if a node that stays could take them."""
        leave = self._drains.leave(self._crew.ask, now_s)
        for member in self._crew.members:
            facts = member.life.facts
            if facts is None:
                continue
            before, member.draining = member.draining, facts.node in leave
            if not member.draining:
                if member.successor is not None:
                    end(member.successor)
                    member.successor = None
                continue
            if not before:
                self._crew.note(f"{member.name}: its node is being drained; it takes no new file and moves to another")
            if member.successor is None and member.failures < ATTEMPTS:
                member.successor = self._crew.spawn()
            if member.task is None and not holds(member):
                self._move(member, now_s)

    def _move(self, member: Member, now_s: float) -> None:
        """Let an idle worker of a drained node go on elsewhere, or hand its files out when there is no room."""
        successor, place = member.successor, member.name
        if successor is None:
            return
        if successor.facts is not None:
            self._crew.move(member, successor)
            member.failures = 0
            member.place = successor.facts.address
            self._crew.note(f"{place}: moved to {member.place}")
        elif now_s - successor.began_s > successor.limit_s and any(
            other.ready and not other.draining for other in self._crew.members
        ):
            self._crew.move(member, successor)
            self._crew.retire(member, "its node is being drained, and no other has room")

    def _describe(self, now_s: float) -> None:
        """Put into words what is waited for."""
        texts = [member.waiting(now_s, self._patience) for member in self._crew.members]
        behind = self._crew.books.stragglers(self._crew.members, now_s)
        for member, took_s, usual_s in behind:
            texts.append(f"{member.name}: {format_seconds(took_s)} for a file, {format_seconds(usual_s)} is usual")
        ray_metrics.show_stragglers(len(behind))
        self._crew.text = listed([text for text in texts if text])
