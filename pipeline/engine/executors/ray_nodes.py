"""The cluster as the executor sees it: reaching it, what it has, and which nodes are about to go.

Owns Ray's calls about nodes and resources.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RaySystemError

from pipeline.engine.executors.ray_reach import refused, require_reachable
from pipeline.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one worker asks of a node: a CPU, its projected memory, and a GPU if any. Ray keeps books, no limits."""

    memory_bytes: int
    gpus: int

    def covers(self, other: Ask) -> bool:
        """Return whether a worker that asked for this may do what was asked for by the other."""
        return self.memory_bytes >= other.memory_bytes and self.gpus == other.gpus

    @property
    def bundle(self) -> dict[str, float]:
        """What a placement group sets aside for a worker."""
        asked = {"CPU": 1, "GPU": self.gpus, "memory": self.memory_bytes}
        return {name: float(amount) for name, amount in asked.items() if amount}

    @property
    def options(self) -> dict[str, Any]:
        """The actor's options."""
        return {"num_cpus": 1, "num_gpus": self.gpus, "memory": self.memory_bytes}

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPU" if self.gpus else ""
        return f"1 CPU, {format_bytes(self.memory_bytes)} memory{gpus}"


def cluster_address(address: str | None) -> str | None:
    """Return the address of the cluster that `connect` would join, or None when it would start one here.

    Args:
        address: What was asked for.
    """
    # Ray sets this for the entrypoint of a submitted job.
    return address or os.environ.get("RAY_ADDRESS") or None


def connect(address: str | None, *, workers: int, memory_bytes: int) -> bool:
    """Connect to a cluster unless this process is connected; return whether Ray was started here for it.

    Args:
        address: The cluster's; None takes the one a job runs in, or starts one here.
        workers: How many a Ray started here has room for.
        memory_bytes: What each of them may take.

    Raises:
        WorkerError: There is none at the address, or it wants a token.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    inside = cluster_address(address)
    given: dict[str, Any] = {"address": address}
    if not inside:
        given = {
            "address": "local",
            "num_cpus": workers,
            "include_dashboard": False,
            # Ray would give the workers a part of this machine's memory; the budget is the user's word.
            "_memory": workers * memory_bytes,
        }
    else:
        require_reachable(inside)
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level="warning", **given)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError, RaySystemError) as error:
        raise refused(error, inside or "local") from error
    if on_term is not None and threading.current_thread() is threading.main_thread():
        # Ray puts its own handler there, which ends the process before anything is put in order.
        signal.signal(signal.SIGTERM, on_term)
    return not inside


def room() -> str:
    """Return in words what the cluster has, and what of it is free."""
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    counted = "1 node" if nodes == 1 else f"{nodes} nodes"
    return f"{counted} with {_listed(ray.cluster_resources())}; free: {_listed(ray.available_resources())}"


def draining_nodes() -> frozenset[str]:
    """Return the ids of nodes that are about to be taken away: pre-empted, or drained by somebody."""
    try:
        # Not public; Ray's own Train and Serve use it. Without it a node that goes is noticed when it has gone.
        from ray._private.state import state

        return frozenset(state.get_draining_nodes())
    except (ImportError, AttributeError):
        return frozenset()


class DrainWatch:
    """Which nodes to leave, asked now and then: one question serves all workers.

    Args:
        pause_s: Seconds between two questions.
    """

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._asked_s = -pause_s
        self._leave: frozenset[str] = frozenset()

    def leave(self, ask: Ask, now_s: float) -> frozenset[str]:
        """Return the nodes to leave: those that are drained, if a node that stays could take a worker at all."""
        if now_s - self._asked_s >= self._pause_s:
            self._asked_s = now_s
            drained = draining_nodes()
            self._leave = drained if drained and has_other_host(ask, drained) else frozenset()
        return self._leave


def has_other_host(ask: Ask, draining: frozenset[str]) -> bool:
    """Return whether a node that stays is large enough for a worker, busy or not."""
    for node in ray.nodes():
        has = node["Resources"]
        enough = has.get("CPU", 0) >= 1 and has.get("GPU", 0) >= ask.gpus and has.get("memory", 0) >= ask.memory_bytes
        if node["Alive"] and node["NodeID"] not in draining and enough:
            return True
    return False


def _listed(resources: dict[str, float]) -> str:
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    return f"{cpus:g} CPU, {format_bytes(resources.get('memory', 0))} memory, {gpus:g} GPU"
