"""A Ray of any number of workers in this process that hold no parameters, for the real Ray executor to drive.

Owns the workers' answers (exact sums of small random vectors, the same whoever owns a file), an order of completion
drawn anew for every pass, and the counts of what passes between driver and workers. Driver, executor, schedule and the
arithmetic of sums are the real ones; reading, writing and the wire are left out. Legend: P points, N models,
E elements, R rows as of chunks, Q combinations.
"""

from __future__ import annotations

import pickle
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from pipeline.engine.executors import ray as ray_executor
from pipeline.engine.executors import ray_metrics, ray_nodes
from pipeline.engine.executors.limbs import add_limbs, pack, unpack
from pipeline.engine.executors.ray_actor import Facts
from pipeline.engine.solutions import Solution
from pipeline.engine.worker import Job, WrittenFile
from pipeline.numerics.exact_sum import ExactSum, exact_column_sums
from pipeline.planning.plan import Plan
from pipeline.storage import Counters

# Elements of a row: enough for points that span a space, few enough for thousands of files.
_WIDTH = 16
_ADDRESS = "127.0.0.1"


class FakeWorker:
    """Answers as a `ShardWorker` does, from vectors made of the file's number.

    Args:
        plan: The plan.
        rows: Rows in each file's part of a group, as many as it had chunks.
    """

    def __init__(self, plan: Plan, rows: int) -> None:
        self.plan = plan
        self._rows = rows
        self._made: dict[int, dict[int, np.ndarray]] = {}

    def measure(self, file: int) -> dict[int, ExactSum]:
        """Return the groups' exact sums of squared distances."""
        found = {}
        for group, points_RPE in self.points(file).items():
            upper = np.triu_indices(points_RPE.shape[1], k=1)
            rows = [((row[upper[0]] - row[upper[1]]) ** 2).sum(axis=1) for row in points_RPE]
            found[group] = ExactSum(len(upper[0]))
            found[group].add(rows)
        return found

    def probe(self, requests: Mapping[int, np.ndarray], files: Sequence[int]) -> dict[int, np.ndarray]:
        """Return the limbs of Q·N squared distances and Q·Q products by group."""
        totals: dict[int, ExactSum] = {}
        for file in files:
            for group, points_RPE in self.points(file).items():
                if group not in requests:
                    continue
                models_RNE = points_RPE[:, self.plan.offset :]
                combined_RQE = requests[group] @ models_RNE
                apart_RQN = ((combined_RQE[:, :, None] - models_RNE[:, None]) ** 2).sum(axis=3)
                moved_RQE = combined_RQE - combined_RQE[:, :1]
                products_RQQ = moved_RQE @ moved_RQE.transpose(0, 2, 1)
                rows = np.concatenate([apart_RQN.reshape(self._rows, -1), products_RQQ.reshape(self._rows, -1)], axis=1)
                totals.setdefault(group, ExactSum(rows.shape[1])).add(rows)
        return {group: total.to_limbs() for group, total in totals.items()}

    def write(self, file: int, solutions: Mapping[int, Solution]) -> WrittenFile:
        """Return the record of a file that holds the exact combination."""
        squared = {}
        for group, points_RPE in self.points(file).items():
            written_RE = np.asarray(solutions[group].factors) @ points_RPE
            rows_RP = ((points_RPE - written_RE[:, None]) ** 2).sum(axis=2)
            squared[group] = tuple(exact_column_sums(rows_RP).tolist())
        layout = self.plan.files[file]
        return WrittenFile(
            file=file,
            name=layout.name,
            size_bytes=layout.size_bytes,
            sha256=f"{file:064x}",
            squared_distances=squared,
            squared_rounding=dict.fromkeys(squared, 0.0),
            replaced=(0,) * len(self.plan.points),
            solutions=(),
            discarded={},
        )

    def points(self, file: int) -> dict[int, np.ndarray]:
        """Return a file's part of all points by group: the base, and models around it of different spreads."""
        if file in self._made:
            return self._made[file]
        groups = {self.plan.tensors[tensor].group for tensor in self.plan.files[file].tensors}
        points = len(self.plan.points)
        found = {}
        for group in sorted(group for group in groups if group >= 0):
            generator = np.random.default_rng([file, group])
            points_RPE = generator.normal(size=(self._rows, points, _WIDTH))
            points_RPE *= np.linspace(0.5, 2.0, points)[:, None] * 1e-3
            found[group] = points_RPE + 0.02 * generator.normal(size=(self._rows, 1, _WIDTH))
        self._made[file] = found
        return found


class FakeRay:
    """What the executor's modules use of Ray, in one thread: a verb runs when somebody waits for it.

    Args:
        rows: Of each file's part of a group.
        seed: Of the order of completion.

    Attributes:
        calls: Calls of actors' methods, by name.
        sent_bytes: What those calls' arguments take pickled, by name; a reference counts as one.
        got_bytes: What came back to the driver, by name.
        waits: Calls of `wait`.
        waited: References handed to all of them: Ray looks at each.
        watch: Told the name of every call.
        workers_s: CPU seconds of all of this, which are not the driver's.
        ranks_s: The part of it that packing sums takes, at all ranks together.
    """

    def __init__(self, *, rows: int = 4, seed: int = 0) -> None:
        self._rows = rows
        self._random = random.Random(seed)
        self._sums: dict[_Actor, dict[int, np.ndarray]] = {}
        self.worker: FakeWorker | None = None
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.got_bytes: Counter[str] = Counter()
        self.waits = self.waited = 0
        self.watch: Callable[[str], None] = lambda _: None
        self.workers_s = self.ranks_s = 0.0
        self.util = SimpleNamespace(get_node_ip_address=lambda: _ADDRESS)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in for Ray in the executor's modules."""
        with pytest.MonkeyPatch.context() as patch:
            prefix = ray_executor.__name__
            modules = [module for name, module in sys.modules.items() if name.startswith(prefix)]
            for module in modules:
                if getattr(module, "ray", None) is ray:
                    patch.setattr(module, "ray", self)
            # Counters of a Ray that does not run.
            for name in ("count_stored", "count_pass", "count_loss", "show_stragglers"):
                patch.setattr(ray_metrics, name, lambda *_: None)
            patch.setattr(ray_nodes, "draining_nodes", frozenset)
            yield

    def prepare(self, plan: Plan) -> None:
        """Make the vectors of all files, before a clock runs."""
        self.worker = FakeWorker(plan, self._rows)
        for file in range(len(plan.files)):
            self.worker.points(file)

    def is_initialized(self) -> bool:
        """Say that there is a cluster."""
        return True

    def cluster_resources(self) -> dict[str, float]:
        """Name no GPU."""
        return {"CPU": 1e6, "memory": 1e18}

    available_resources = cluster_resources

    def nodes(self) -> list[dict[str, Any]]:
        """Name no node."""
        return []

    def put(self, value: object) -> _Reference:
        """Keep a value."""
        with self.working():
            self.sent_bytes["put"] += len(pickle.dumps(value))
        return _Reference(name="put", value=value)

    def remote(self, **_: object) -> Callable[[type], Any]:
        """Decorate the actors' class."""
        return lambda _: _Class(self)

    def kill(self, actor: _Actor) -> None:
        """End an actor."""
        self._sums.pop(actor, None)

    def shutdown(self) -> None:
        """End nothing."""

    def get(self, reference: _Reference) -> Any:
        """Return a result."""
        self._run(reference)
        return reference.value

    def wait(
        self, references: Sequence[_Reference], *, num_returns: int, timeout: float
    ) -> tuple[list[_Reference], list[_Reference]]:
        """Let calls of the references run, in any order, until so many are done; none without a timeout."""
        self.waits += 1
        self.waited += len(references)
        with self.working():
            done = [reference for reference in references if reference.done][:num_returns]
            if timeout and len(done) < num_returns:
                open_ones = [reference for reference in references if not reference.done]
                for reference in self._random.sample(open_ones, num_returns - len(done)):
                    self._run(reference)
                    done.append(reference)
            chosen = set(done)
            return done, [reference for reference in references if reference not in chosen]

    def call(self, actor: _Actor, name: str, arguments: tuple[Any, ...]) -> _Reference:
        """Take a call of an actor's method."""
        self.watch(name)
        with self.working():
            self.calls[name] += 1
            self.sent_bytes[name] += len(pickle.dumps(arguments))
            values = [given.value if isinstance(given, _Reference) else given for given in arguments]
            reference = _Reference(name=name, task=lambda: getattr(self, f"_{name}")(actor, *values))
        if name in ("facts", "stop"):
            # Those have a thread of their own at every actor.
            self._run(reference)
        return reference

    def _run(self, reference: _Reference) -> None:
        if not reference.done:
            with self.working():
                result = pickle.dumps(reference.task())
            self.got_bytes[reference.name] += len(result)
            # Reading a result is the driver's work.
            reference.value, reference.task = pickle.loads(result), None

    def _begin(self, _: _Actor, __: int, job: Job) -> Facts:
        if self.worker is None or self.worker.plan is not job.plan:
            self.worker = FakeWorker(job.plan, self._rows)
        return self._facts(_)

    def _run_verb(self, actor: _Actor, verb: str, file: int, arguments: tuple[Any, ...]) -> tuple[Any, Facts]:
        return getattr(self.worker, verb)(file, *arguments), self._facts(actor)

    def _probe(self, actor: _Actor, number: int, requests: Mapping[int, np.ndarray], file: int) -> tuple[None, Facts]:
        if actor.number != number:
            actor.number, self._sums[actor] = number, {}
        if self.worker is not None:
            add_limbs(self._sums[actor], self.worker.probe(requests, [file]))
        return None, self._facts(actor)

    def _join(self, actor: _Actor, _: object, rank: int, *__: object) -> None:
        actor.rank = rank

    def _reduce(
        self, actor: _Actor, _: int, number: int, requests: Mapping[int, np.ndarray], files: Sequence[int]
    ) -> dict[int, np.ndarray] | None:
        if actor.rank:
            return None
        ranks = [other for other in self._sums if other.number == number]
        total: Any = 0
        for rank in ranks:
            started = time.thread_time()
            flat = pack(requests, self._sums[rank])
            self.ranks_s += time.thread_time() - started
            total = flat + total
        return unpack(requests, total)

    def _facts(self, _: _Actor) -> Facts:
        return Facts(
            done_bytes=0,
            peak_bytes=0,
            read_bytes=0,
            reused_bytes=0,
            stored=Counters(),
            node="node",
            address=_ADDRESS,
            process=0,
        )

    def _stop(self, *_: object) -> None:
        return None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the time as the workers'; within itself it counts once."""
        before, started = self.workers_s, time.thread_time()
        yield
        self.workers_s = before + time.thread_time() - started


class _Reference:
    """The result of a call, or of a `put`."""

    def __init__(self, *, name: str, task: Callable[[], Any] | None = None, value: Any = None) -> None:
        self.name, self.task, self.value = name, task, value

    @property
    def done(self) -> bool:
        return self.task is None

    def __reduce__(self) -> tuple[Any, ...]:
        # As large as Ray's.
        return bytes, (bytes(28),)


class _Class:
    """An actor's class as Ray hands it back."""

    def __init__(self, ray: FakeRay) -> None:
        self._ray = ray

    def options(self, **_: object) -> _Class:
        return self

    def remote(self) -> _Actor:
        return _Actor(self._ray)


class _Actor:
    """An actor's handle; it keeps which pass its sums are of, and its rank."""

    def __init__(self, ray: FakeRay) -> None:
        self._ray = ray
        self.number, self.rank = -1, 0

    def __getattr__(self, name: str) -> _Method:
        return _Method(self._ray, self, "run_verb" if name == "run" else name)


class _Method:
    """An actor's method."""

    def __init__(self, ray: FakeRay, actor: _Actor, name: str) -> None:
        self._ray, self._actor, self._name = ray, actor, name

    def options(self, **_: object) -> _Method:
        return self

    def remote(self, *arguments: Any) -> _Reference:
        return self._ray.call(self._actor, self._name, arguments)
