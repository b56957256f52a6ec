"""The reduction among actors: they join a group, add up their sums, and whoever keeps the others waiting is named.

Owns groups and their generations. The store at which ranks find each other is the driver's: no actor's death loses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.engine.executors.ray_crew import TICK_S, Crew, cause, first_line
from pipeline.engine.executors.ray_life import Life, Member, Patience, listed, question
from pipeline.errors import PipelineError
from pipeline.units import format_seconds

# Graces that ranks get to notice that another was ended: Ray takes five seconds or so for one that does not react.
_ENDED = 3


class Meeting:
    """The group of the last reduction, joined again only when its ranks have changed.

    Args:
        patience: How long to wait for ranks.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._store: Any = None
        self._generation = 0
        # The ranks that have joined; compared by identity, as a worker's next life has joined nothing.
        self._lives: list[Life] = []
        # What went wrong with the last reduction, naming ranks and nodes.
        self.trouble = ""

    def total(
        self,
        crew: Crew,
        ranks: Sequence[Member],
        files: Mapping[int, Sequence[int]],
        number: int,
        requests: Any,
        look: Callable[[], None],
    ) -> dict[int, np.ndarray] | None:
        """Return the sums over all ranks; None if the reduction failed.

        Args:
            crew: Told of ranks that are lost.
            ranks: Who takes part.
            files: By worker, what its sums must cover.
            number: The pass.
            requests: A reference of what was probed.
            look: Looks after the crew while ranks are waited for.

        Raises:
            PipelineError: What a worker raised.
        """
        if not self._join(crew, ranks, look):
            return None
        calls = [
            (member, member.life.actor.reduce.remote(self._generation, number, requests, tuple(files[member.number])))
            for member in ranks
        ]
        results = self._answers(crew, calls, self._patience.reduce_s, "add up its sums with the others", look)
        return results[0] if results is not None else None

    def close(self) -> None:
        """Forget the group and the store."""
        self._store = None
        self._lives = []

    def _join(self, crew: Crew, ranks: Sequence[Member], look: Callable[[], None]) -> bool:
        """Make ranks one group unless they are; return whether they are."""
        lives = [member.life for member in ranks]
        if len(lives) == len(self._lives) and all(a is b for a, b in zip(lives, self._lives, strict=True)):
            return True
        self._lives = []
        # One that is dead would keep the others waiting at the store.
        alive = [(member, question(member.life)) for member in ranks]
        if self._answers(crew, alive, self._patience.join_s, "answer", look) is None:
            return False
        host = ray.util.get_node_ip_address()
        if self._store is None:
            # Most merges add up nothing, and need no torch.
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            self._store = TCPStore(host, 0, None, True, wait_for_workers=False)
        self._generation += 1
        limits_s = (self._patience.join_s, self._patience.reduce_s)
        place = (host, self._store.port, self._generation)
        calls = [
            (member, member.life.actor.join.remote(place, rank, len(ranks), limits_s))
            for rank, member in enumerate(ranks)
        ]
        if self._answers(crew, calls, self._patience.join_s, "join the reduction", look) is None:
            return False
        self._lives = lives
        return True

    def _answers(
        self,
        crew: Crew,
        calls: Sequence[tuple[Member, Any]],
        limit_s: float,
        what: str,
        look: Callable[[], None],
    ) -> list[Any] | None:
        """Return the answers of all ranks; None when one failed, which `trouble` tells."""
        waiting = {call: (member, member.life) for member, call in calls}
        results: dict[Any, Any] = {}
        troubles = []
        limit_s += self._patience.grace_s
        deadline_s = time.monotonic() + limit_s
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=TICK_S)
            for call in done:
                member, life = waiting.pop(call)
                try:
                    results[call] = ray.get(call)
                except RayTaskError as error:
                    inner = cause(error)
                    if isinstance(inner, PipelineError):
                        raise inner from error
                    troubles.append(f"{member.name}: {first_line(inner)}")
                except RayError as error:
                    troubles.append(f"{member.name}: {first_line(error)}")
                    if life is member.life:
                        crew.lose(member, first_line(error))
            look()
            if time.monotonic() > deadline_s:
                silent = [call for call, (_, life) in waiting.items() if life.silent_s > self._patience.grace_s / 2]
                # Whoever still answers questions waits for those that do not, and will be woken by their end.
                for call in silent or list(waiting):
                    member, life = waiting.pop(call)
                    reason = f"did not {what} within {format_seconds(limit_s)}"
                    troubles.append(f"{member.name}: {reason}")
                    if life is member.life:
                        crew.lose(member, reason)
                deadline_s = time.monotonic() + _ENDED * self._patience.grace_s
        if troubles:
            self.trouble, self._lives = listed(troubles), []
            return None
        return [results[call] for _, call in calls]
