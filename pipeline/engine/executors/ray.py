"""The Ray executor: one actor a worker, on CPUs or one GPU each, wherever the cluster has room.

The only module that knows Ray. Owns actors, their placement and replacement, and the collective that adds up exact
partial sums: an all-gather over a gloo group whose store lives in the driver.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from pipeline.engine.executors.base import Tick, Usage
from pipeline.engine.process import peak_memory_bytes, pick_device, raise_descriptor_limit, single_threaded_products
from pipeline.engine.worker import Job, ShardWorker
from pipeline.errors import PipelineError, Problem, WorkerError
from pipeline.numerics.exact_sum import LIMBS

# Seconds between two looks at the actors' progress.
_TICK_S = 0.5
# All ranks have read their shards when they meet, so this is for the exchange alone; a dead rank is seen by its closed
# connection, not by this.
_COLLECTIVE_TIMEOUT_S = 60
# Seconds for a cluster to find room for all actors before the merge gives up with what is missing.
_PLACEMENT_TIMEOUT_S = 120
# Times one file may lose its worker: a machine that dies thrice on the same file is the file's fault.
_ATTEMPTS = 3


class _Actor:
    """A `ShardWorker` in a process of its own, with a second thread for questions while it works."""

    def __init__(self, job: Job) -> None:
        # The process is the actor's for life, so the setting is not put back.
        single_threaded_products().__enter__()
        raise_descriptor_limit()
        self._worker = ShardWorker(dataclasses.replace(job, device=pick_device(job.device, 0)))
        self._group: Any = None
        self._world = 1
        self._partial: dict[int, np.ndarray] = {}
        # A verb that a lost neighbour left behind may still run when the next one arrives.
        self._verb = threading.Lock()

    def join(self, host: str, port: int, generation: int, rank: int, world: int) -> None:
        """Become a rank of a collective group."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=_COLLECTIVE_TIMEOUT_S)
        # Bound to Ray's own address of the node: gloo would take the host name's, which is often 127.0.1.1.
        options._devices = [ProcessGroupGloo.create_device(hostname=ray.util.get_node_ip_address())]
        store = PrefixStore(f"generation-{generation}", TCPStore(host, port, None, False))
        self._group = ProcessGroupGloo(store, rank, world, options)
        self._world = world

    def run(self, verb: str, file: int, arguments: tuple[Any, ...]) -> Any:
        """Run a verb on one file."""
        with self._verb:
            return getattr(self._worker, verb)(file, *arguments)

    def probe(self, requests: Mapping[int, np.ndarray], files: Sequence[int]) -> None:
        """Probe this shard and keep the partial sums for `reduce`."""
        with self._verb:
            self._partial = self._worker.probe(requests, files)

    def reduce(self, requests: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Return the sums of all ranks' last probes; the same on every rank."""
        partial, group = self._partial, self._group
        shapes = {group: _limb_shape(coefficients) for group, coefficients in requests.items()}
        flat = np.concatenate([
            partial[group].ravel() if group in partial else np.zeros(shape, np.int64).ravel()
            for group, shape in shapes.items()
        ])  # fmt: skip
        try:
            total = _sum(group, self._world, torch.from_numpy(flat)).numpy()
        except RuntimeError:
            # Dropped at once: the closed connections wake the other ranks, which would wait for the timeout.
            self._group = None
            raise
        result, position = {}, 0
        for group, shape in shapes.items():
            size = shape[0] * shape[1]
            result[group] = total[position : position + size].reshape(shape)
            position += size
        return result

    def facts(self) -> dict[str, int]:
        """Return progress and memory; answered while a verb runs."""
        read, reused = self._worker.traffic()
        return {"done": self._worker.done_bytes, "peak": peak_memory_bytes(), "read": read, "reused": reused}

    def process_id(self) -> int:
        """Return the actor's process, for whoever must find it in a node's list of processes."""
        return os.getpid()


class RayExecutor:
    """Runs every worker as an actor.

    Args:
        address: The cluster's; None starts one here, or takes the one a job runs in.
    """

    name = "ray"

    def __init__(self, *, address: str | None = None) -> None:
        self._address = address
        self._own = False
        self._actors: list[Any] = []
        self._shards: list[tuple[int, ...]] = []
        self._placement: PlacementGroup | None = None
        self._job: Job | None = None
        self._store: Any = None
        self._generation = 0
        self._joined = False

    def start(self, job: Job, shards: Sequence[Sequence[int]]) -> None:
        """Connect, reserve room for all actors spread over nodes, and start them."""
        self._connect(len(shards))
        gpus = 0 if job.device == "cpu" else ray.cluster_resources().get("GPU", 0)
        if job.device == "cuda" and not gpus:
            raise WorkerError(Problem(what="the Ray cluster has no GPU", remedy="use --device cpu"))
        bundle = {"CPU": 1.0, **({"GPU": 1.0} if gpus else {})}
        self._placement = placement_group([bundle] * len(shards), strategy="SPREAD")
        try:
            ray.get(self._placement.ready(), timeout=_PLACEMENT_TIMEOUT_S)
        except GetTimeoutError as error:
            raise WorkerError(
                Problem(
                    what=f"no room for {len(shards)} workers of {bundle} within {_PLACEMENT_TIMEOUT_S} s",
                    where=f"Ray cluster with {ray.cluster_resources()}",
                    remedy="ask for fewer --workers, or add nodes",
                )
            ) from error
        self._job = dataclasses.replace(job, device="cuda" if gpus else "cpu")
        self._shards = [tuple(shard) for shard in shards]
        self._actors = [self._spawn(rank) for rank in range(len(shards))]

    def map(self, verb: str, items: Mapping[int, tuple[Any, ...]], tick: Tick) -> Iterator[tuple[int, Any]]:
        """Run a verb on files, each on the actor that owns it; a lost actor is replaced and its file run again."""
        waiting = [[file for file in shard if file in items] for shard in self._shards]
        attempts = dict.fromkeys(items, 0)
        running: dict[Any, tuple[int, int]] = {}

        def submit(rank: int) -> None:
            if waiting[rank]:
                file = waiting[rank].pop(0)
                attempts[file] += 1
                running[self._actors[rank].run.remote(verb, file, items[file])] = (rank, file)

        for rank in range(len(self._actors)):
            submit(rank)
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=_TICK_S)
            tick(self._done_bytes())
            for reference in done:
                rank, file = running.pop(reference)
                try:
                    result = ray.get(reference)
                except RayTaskError as error:
                    raise _cause(error) from error
                except RayError as error:  # the actor, its node or its memory
                    if attempts[file] >= _ATTEMPTS:
                        raise _lost(rank, file, error) from error
                    self._replace(rank)
                    waiting[rank].insert(0, file)
                else:
                    yield file, result
                submit(rank)

    def all_reduce(self, requests: Mapping[int, np.ndarray], tick: Tick) -> dict[int, np.ndarray]:
        """Probe all shards; the actors add up their exact sums among themselves."""
        last: Exception | None = None
        for _ in range(_ATTEMPTS):
            try:
                self._join()
                self._each("probe", [(requests, shard) for shard in self._shards], tick)
                totals = self._each("reduce", [(requests,)] * len(self._actors), tick)
                result: dict[int, np.ndarray] = totals[0]
                return result
            except RayError as error:
                cause = _cause(error) if isinstance(error, RayTaskError) else None
                if isinstance(cause, PipelineError):
                    raise cause from error
                last = error
                self._regroup()
        raise WorkerError(
            Problem(what=f"the workers' reduction failed {_ATTEMPTS} times: {last}", remedy="look at the nodes' logs")
        ) from last

    def usage(self) -> Usage:
        """Return what every actor has used, and the driver's memory."""
        facts = ray.get([actor.facts.remote() for actor in self._actors])
        peaks = {f"worker {rank}": fact["peak"] for rank, fact in enumerate(facts)}
        return Usage(
            peak_memory_bytes={"driver": peak_memory_bytes(), **peaks},
            read_bytes=sum(fact["read"] for fact in facts),
            reused_bytes=sum(fact["reused"] for fact in facts),
        )

    def close(self) -> None:
        """End actors, placement and, if it was started here, Ray."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None
        self._store = None
        if self._own:
            ray.shutdown()
            self._own = False

    def _connect(self, workers: int) -> None:
        if ray.is_initialized():
            return
        self._own = True
        inside = self._address or os.environ.get("RAY_ADDRESS")
        resources: dict[str, Any] = {} if inside else {"num_cpus": workers, "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level="warning", **resources)
        except (ConnectionError, RuntimeError, ValueError) as error:
            self._own = False
            raise WorkerError(
                Problem(
                    what=f"cannot connect to Ray: {error}",
                    where=f"address {inside or 'local'}",
                    remedy="start the cluster, or correct --address",
                )
            ) from error

    def _spawn(self, rank: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
        gpus = 0 if self._job is None or self._job.device == "cpu" else 1
        options = {"num_cpus": 1, "num_gpus": gpus, "scheduling_strategy": strategy, "max_concurrency": 2}
        return ray.remote(_Actor).options(**options).remote(self._job)

    def _each(self, verb: str, arguments: Sequence[tuple[Any, ...]], tick: Tick) -> list[Any]:
        """Run a verb on every actor at once and return the results by rank; raise the first failure when it happens."""
        calls = [getattr(actor, verb).remote(*given) for actor, given in zip(self._actors, arguments, strict=True)]
        pending = calls
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=_TICK_S)
            ray.get(done)
            tick(self._done_bytes())
        results: list[Any] = ray.get(calls)
        return results

    def _replace(self, rank: int) -> None:
        """Start a new actor in a lost one's place."""
        ray.kill(self._actors[rank])
        self._actors[rank] = self._spawn(rank)
        self._joined = False
        try:
            ray.get(self._actors[rank].facts.remote(), timeout=_PLACEMENT_TIMEOUT_S)
        except RayError as error:
            raise WorkerError(
                Problem(
                    what=f"worker {rank} was lost, and none could be started in its place"
                    f" within {_PLACEMENT_TIMEOUT_S} s: {error}",
                    where=f"Ray cluster with {ray.cluster_resources()}",
                    remedy="add a node, or ask for fewer --workers; the same command resumes",
                )
            ) from error

    def _join(self) -> None:
        """Make all actors ranks of one group, once per generation."""
        if self._joined or len(self._actors) == 1:
            return
        host = ray.util.get_node_ip_address()
        if self._store is None:
            self._store = TCPStore(host, 0, None, True, wait_for_workers=False)
        self._generation += 1
        world = len(self._actors)
        ray.get([
            actor.join.remote(host, self._store.port, self._generation, rank, world)
            for rank, actor in enumerate(self._actors)
        ])  # fmt: skip
        self._joined = True

    def _regroup(self) -> None:
        """Replace the actors that no longer answer; the next reduction joins a new generation."""
        self._joined = False
        for rank, actor in enumerate(self._actors):
            try:
                ray.get(actor.facts.remote(), timeout=10)
            except RayError:
                self._replace(rank)

    def _done_bytes(self) -> int:
        """Return all actors' progress; one that does not answer now is asked again at the next tick."""
        calls = [actor.facts.remote() for actor in self._actors]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=_TICK_S)
        total = 0
        for call in done:
            try:
                total += ray.get(call)["done"]
            except RayError:
                continue
        return total


def _sum(group: Any, world: int, values: torch.Tensor) -> torch.Tensor:
    """Return the sum of all ranks' integers, exact in any order."""
    if world == 1:
        return values
    gathered = [[torch.empty_like(values) for _ in range(world)]]
    group.allgather(gathered, [values]).wait()
    return torch.stack(gathered[0]).sum(dim=0)


def _limb_shape(coefficients: np.ndarray) -> tuple[int, int]:
    """Return the shape of a probe's limbs for Q × N coefficients."""
    rows, models = coefficients.shape
    return rows * models + rows * rows, LIMBS


def _cause(error: RayTaskError) -> BaseException:
    """Return the exception that a worker raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _lost(rank: int, file: int, error: Exception) -> WorkerError:
    return WorkerError(
        Problem(
            what=f"lost its worker {_ATTEMPTS} times: {error}",
            where=f"output file {file}, worker {rank}",
            remedy="look at the node's log; more --memory or fewer workers a node if it was killed for memory",
        )
    )
