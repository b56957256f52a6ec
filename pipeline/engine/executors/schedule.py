"""Which worker runs which file next, when workers are uneven, lost, replaced or retired.

Owns the queues of one pass and who owns a file from pass to pass; pure, and knows nothing of Ray or of what is run.
The bits of the output do not depend on any of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from pipeline.errors import Problem, WorkerError

# Times one file may lose its worker: what dies thrice on the same file, on whatever node, dies of the file.
ATTEMPTS = 3


class Schedule:
    """Queues of files by worker.

    A worker runs the files it owns first, since it may hold their bytes from an earlier pass; with none left it takes
    from whoever has most. A file belongs to the worker that took it last, so later passes keep the balance found.

    Args:
        shards: File indices by worker, each file once.
    """

    def __init__(self, shards: Sequence[Sequence[int]]) -> None:
        self._owner = {file: worker for worker, shard in enumerate(shards) for file in shard}
        self._queues: dict[int, deque[int]] = {worker: deque() for worker in range(len(shards))}
        self._left: set[int] = set()
        # Files of workers that are gone while there is no other: whoever comes back gets them.
        self._orphans: deque[int] = deque()
        self._losses: dict[int, list[str]] = {}

    @property
    def workers(self) -> tuple[int, ...]:
        """The workers that have not been retired."""
        return tuple(self._queues)

    @property
    def files(self) -> tuple[int, ...]:
        """All files of the shards, in order."""
        return tuple(sorted(self._owner))

    @property
    def left(self) -> int:
        """How many files of this pass are not done: those in a queue and those in hand."""
        return len(self._left)

    def owned(self, worker: int) -> tuple[int, ...]:
        """Return the files that a worker owns, in order."""
        return tuple(sorted(file for file, owner in self._owner.items() if owner == worker))

    def begin(self, files: Iterable[int]) -> None:
        """Begin a pass over files; what an abandoned one left behind is forgotten."""
        for queue in self._queues.values():
            queue.clear()
        self._orphans.clear()
        self._losses.clear()
        wanted = sorted(files)
        self._left = set(wanted)
        strays = []
        for file in wanted:
            own = self._queues.get(self._owner[file])
            if own is None:
                strays.append(file)
            else:
                own.append(file)
        self._hand_out(strays)

    def take(self, worker: int) -> int | None:
        """Return the file that an idle worker runs next, now its own; None when no queue has one."""
        own = self._queues[worker]
        if own:
            return own.popleft()
        longest = max(self._queues.values(), key=len)
        if not longest:
            return None
        # The last one: what its owner would come to latest.
        file = longest.pop()
        self._owner[file] = worker
        return file

    def done(self, file: int) -> None:
        """Take note that a file is done."""
        self._left.discard(file)

    def put_back(self, files: Iterable[int]) -> None:
        """Put files that were in hand, or done in vain, at the front of their owners' queues."""
        strays = []
        for file in sorted(files, reverse=True):
            self._left.add(file)
            own = self._queues.get(self._owner[file])
            if own is None:
                strays.append(file)
            else:
                own.appendleft(file)
        self._hand_out(reversed(strays))

    def lost(self, file: int, name: str, place: str) -> None:
        """Put back a file whose worker was lost while it ran.

        Args:
            file: Its index.
            name: Its name, for the error.
            place: The worker and its node, for the error.

        Raises:
            WorkerError: It has lost its worker too often.
        """
        places = self._losses.setdefault(file, [])
        places.append(place)
        if len(places) >= ATTEMPTS:
            raise WorkerError(
                Problem(
                    what=f"lost its worker {ATTEMPTS} times: {', '.join(places)}",
                    where=f"output file {name}",
                    remedy="look at the nodes' logs; more --memory or fewer workers a node if they were killed for"
                    " memory; the same command resumes",
                )
            )
        self.put_back([file])

    def retire(self, worker: int) -> None:
        """Hand a worker's queue to the others, or keep it for whoever comes back."""
        self._hand_out(self._queues.pop(worker, ()))

    def restore(self, worker: int) -> None:
        """Let a retired worker take files again."""
        self._queues.setdefault(worker, deque())
        orphans, self._orphans = self._orphans, deque()
        self._hand_out(orphans)

    def _hand_out(self, files: Iterable[int]) -> None:
        """Give files without an owner to the shortest queues."""
        for file in files:
            if not self._queues:
                self._orphans.append(file)
                continue
            worker = min(self._queues, key=lambda worker: (len(self._queues[worker]), worker))
            self._queues[worker].append(file)
            self._owner[file] = worker
