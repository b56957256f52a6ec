"""A cluster that cannot be reached is told of in seconds, before anything is claimed, and in words that help."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.exceptions import AuthenticationError

from pipeline.engine.executors import ray_reach
from pipeline.engine.executors.ray_reach import refused, require_reachable
from pipeline.errors import WorkerError
from tests.planning.plans import small_family


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_reach, "_PATIENCE_S", 1.0)


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """A server that gives everybody one answer, or none; yield its address."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)

        def serve() -> None:
            while not over.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.recv(64)
                    if answer is None:
                        over.wait(2.0)
                    else:
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_closed_port(tmp_path: Path) -> None:
    """Nothing is claimed, and no phase is announced."""
    family = small_family(tmp_path / "family")
    output = tmp_path / "out"
    address = f"127.0.0.1:{closed_port()}"
    # In a process of its own: this one may be connected to a Ray for other tests.
    command = [sys.executable, "-m", "pipeline", "merge", str(family.recipe()), str(output)]
    result = subprocess.run(
        [*command, "--executor", "ray", "--address", address], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == WorkerError.exit_code, result.stderr
    assert f"address {address}: cannot connect to Ray: Connection refused" in result.stderr
    assert "measure" not in result.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("answer", "words"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no Ray"), (b"", "is no Ray"), (None, "no answer")],
    ids=["another protocol", "hangs up", "silent"],
)
def test_a_port_of_another_program(answer: bytes | None, words: str) -> None:
    with listening(answer) as address, pytest.raises(WorkerError, match=words):
        require_reachable(address)


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:0", "head:65536", "head:x", "http://head:8265"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(WorkerError, match="is no address of a Ray cluster"):
        require_reachable(address)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(WorkerError, match="cannot connect to Ray"):
        require_reachable("nobody.invalid:6379")


def test_what_is_left_to_ray() -> None:
    require_reachable("auto")
    require_reachable("local")


def test_a_cluster_that_is_there(ray_cluster: str) -> None:
    require_reachable(ray_cluster)


@pytest.mark.parametrize(
    ("mode", "text", "what", "remedy"),
    [
        (None, "InvalidAuthToken", "the cluster wants a token", "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"),
        ("token", "no authentication token was found", "there is none here", "set RAY_AUTH_TOKEN or"),
        ("token", "InvalidAuthToken", "the cluster wants another token", "correct RAY_AUTH_TOKEN"),
    ],
)  # fmt: skip
def test_tokens(monkeypatch: pytest.MonkeyPatch, mode: str | None, text: str, what: str, remedy: str) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    problem = refused(AuthenticationError(text), "10.0.0.7:6379").problems[0]
    assert what in problem.what
    assert problem.where == "address 10.0.0.7:6379"
    assert problem.remedy.startswith(remedy)
