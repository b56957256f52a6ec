"""A real Ray cluster on this machine: a head and workers, each a node of its own on its own address of the loopback.

Owns the nodes' processes: every one of them is known, and killed at the end. Needs a network of its own
(`tests.support.namespace`): nodes on 127.0.0.2 and further are possible only where there is nothing but `lo`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import command_line, family, kill_family, start

_PORT, _DASHBOARD_PORT, _AGENT_PORT, _METRICS_PORT = 6379, 8265, 52365, 9400
# The head takes drivers, as in production; the work is done elsewhere.
_HEAD_CPUS, WORKER_CPUS = 0, 2
# The least that Ray accepts; nothing of a merge goes through the object store.
_OBJECT_STORE_BYTES = 78_643_200
# A node needs ten seconds on an idle machine, and this one may be shared.
_PATIENCE_S = 240.0
_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Thirty seconds are too few for a node to register on a busy machine.
    "RAY_raylet_start_wait_time_s": "120",
    # A killed node is known to be dead after four seconds instead of fifteen; one that is only slow is given time.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    # What else runs on this machine may fill its memory; nothing here is to die of that.
    "RAY_memory_monitor_refresh_ms": "0",
}
# How a head answers whose agent for jobs is not up yet, seconds after the nodes are.
_TOO_YOUNG = "No available agent to submit job"
# Ray's own processes that are called as if they were a user's.
_NOT_ACTORS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::JobSupervisor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node: the `ray start --block` that leads it, and everything that it started."""

    number: int
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def metrics_url(self) -> str:
        """Where the node shows its metrics to Prometheus."""
        return f"http://{_address(self.number)}:{_METRICS_PORT + self.number}/metrics"

    def is_up(self) -> bool:
        """Return whether it runs a raylet with its agents, and so takes work."""
        commands = [command_line(pid) for pid in self.processes()]
        return any(command.startswith("ray::RuntimeEnvAgent") for command in commands)

    def processes(self) -> list[int]:
        """Return all processes of this node that live."""
        return family(self.process.pid)


class Cluster:
    """A cluster in the environment as it is when this is made, that of an S3 server included.

    Attributes:
        address: For drivers.
        dashboard: For jobs.
        token: What everyone who joins has to show.
        environment: For drivers and commands.
        nodes: By number; 0 is the head. A killed one is missing until it is added again.
    """

    def __init__(self, folder: Path, *, workers: int = 2) -> None:
        self.address = f"{_address(0)}:{_PORT}"
        self.dashboard = f"http://{_address(0)}:{_DASHBOARD_PORT}"
        self.token = secrets.token_hex(32)
        self.nodes: dict[int, Node] = {}
        self._folder = folder
        self._workers = workers
        binaries = Path(sys.executable).parent
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            **_SETTINGS,
            "RAY_AUTH_TOKEN": self.token,
            "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def start(self) -> None:
        """Start the head, and then all workers at once."""
        self._launch(0)
        self._await(lambda: len(self.living()) == 1, "the head")
        self.restore()

    def kill_node(self, number: int) -> None:
        """Lose a machine: kill all of a node's processes at once."""
        node = self.nodes.pop(number)
        kill_family(node.process)
        shutil.rmtree(node.folder, ignore_errors=True)

    def restore(self, *, wait: bool = True) -> None:
        """Start the worker nodes that are missing.

        Args:
            wait: Until the cluster knows of them, and of the death of those that they replace.
        """
        for number in range(1, self._workers + 1):
            if number in self.nodes and self.nodes[number].process.poll() is not None:
                self.kill_node(number)
            if number not in self.nodes:
                self._launch(number)
        if wait:
            wanted = [_address(number) for number in range(self._workers + 1)]
            self._await(lambda: self.living() == wanted, "the nodes")

    def living(self) -> list[str]:
        """Return the addresses of the nodes that the cluster believes to be alive, in order."""
        try:
            nodes = self.ask("/api/v0/nodes")["data"]["result"]["result"]
        except OSError:
            return []
        return sorted(node["node_ip"] for node in nodes if node["state"] == "ALIVE")

    def actors(self, number: int | None = None) -> list[int]:
        """Return the processes that run workers of merges, on one node or on all."""
        nodes = list(self.nodes.values()) if number is None else [self.nodes[number]]
        return [pid for node in nodes for pid in node.processes() if _is_actor(command_line(pid))]

    def ask(self, path: str) -> Any:
        """Return what the dashboard answers to a GET, of JSON."""
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.dashboard}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    def submit(self, submission: str, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        """Run `ray job submit`, which prints the job's log and returns at its end."""
        return self.run("ray", "job", "submit", "--submission-id", submission, "--", *entrypoint)

    def job_status(self, submission: str) -> str:
        """Return a job's status as Ray knows it: what `ray job submit` exits with does not tell."""
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(self.dashboard, headers={"Authorization": f"Bearer {self.token}"})
        return str(client.get_job_status(submission).value)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster does; once more while the cluster is too young to take a job."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            done = subprocess.run(
                command,
                env=self.user_environment,
                cwd=self._folder,
                capture_output=True,
                text=True,
                timeout=_PATIENCE_S,
            )
            if _TOO_YOUNG not in done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(1)

    @property
    def user_environment(self) -> dict[str, str]:
        """What a user has set who works with this cluster."""
        return {**self.environment, "RAY_API_SERVER_ADDRESS": self.dashboard, "RAY_ADDRESS": self.address}

    def close(self) -> None:
        """Kill everything."""
        # The head last: the others would notice its end and begin to end themselves.
        for number in sorted(self.nodes, reverse=True):
            self.kill_node(number)

    def _launch(self, number: int) -> None:
        # Nodes that share a folder remove each other's files.
        folder = self._folder / f"n{number}"
        folder.mkdir()
        here = _address(number)
        role = (
            ["--head", f"--port={_PORT}", "--include-dashboard=true", f"--dashboard-port={_DASHBOARD_PORT}"]
            if number == 0
            else [f"--address={self.address}", "--include-log-monitor=false"]
        )
        command = [
            str(Path(sys.executable).with_name("ray")), "start", *role, "--block", "--disable-usage-stats",
            f"--temp-dir={folder}", f"--node-ip-address={here}", f"--num-cpus={WORKER_CPUS if number else _HEAD_CPUS}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0",
            f"--dashboard-agent-listen-port={_AGENT_PORT + number}", f"--metrics-export-port={_METRICS_PORT + number}",
        ]  # fmt: skip
        with (self._folder / f"n{number}.log").open("ab") as log:
            process = start(
                command,
                env=self.environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.nodes[number] = Node(number=number, folder=folder, process=process)

    def _await(self, ready: Any, what: str) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not ready():
            ended = [number for number, node in self.nodes.items() if node.process.poll() is not None]
            if ended or time.monotonic() > deadline:
                paths = [*self._folder.glob("n*.log"), *self._folder.glob("n*/session_*/logs/raylet.*")]
                logs = "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(paths))
                raise RuntimeError(f"{what} did not start; ended: {ended}; alive: {self.living()}\n{logs}")
            time.sleep(0.3)


@contextmanager
def ray_nodes(*, workers: int = 2) -> Iterator[Cluster]:
    """Run a cluster.

    Args:
        workers: How many nodes beside the head.
    """
    _remove_leftovers()
    # Short: sockets below it have a limit of 107 characters.
    folder = Path(tempfile.mkdtemp(prefix=f"gm-{os.getpid()}-", dir="/tmp"))
    cluster = Cluster(folder, workers=workers)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers() -> None:
    """Remove the folders of runs that were killed."""
    for folder in Path("/tmp").glob("gm-*-*"):
        if not Path(f"/proc/{folder.name.split('-')[1]}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _address(number: int) -> str:
    return f"127.0.0.{number + 1}"


def _is_actor(command: str) -> bool:
    return command.startswith("ray::") and not command.startswith(_NOT_ACTORS)
