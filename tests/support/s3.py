"""A real S3 server on the loopback interface: SeaweedFS in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.processes import kill_family, start

KEY, SECRET = "geomerge-tests", "not-a-secret-of-anyone"
_BUCKET = "bucket"
# Roles of the one process; each also listens for gRPC ten thousand ports higher.
_ROLES = ("master", "volume", "filer", "s3")
# Below the ports that the system gives to clients, also with the ten thousand added: a restart finds them free.
_FIRST_PORT, _LAST_PORT = 20_000, 22_700
# Start-up takes three seconds on an idle machine.
_PATIENCE_S = 90.0


class S3Server:
    """One server and its data, which outlive a kill.

    Args:
        folder: For its data; made if it is not there.

    Attributes:
        url: The bucket's.
        endpoint: Where it listens; the same after a restart.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = _free_ports()
        self.url = f"s3://{_BUCKET}"
        self.endpoint = f"http://127.0.0.1:{ports[-1]}"
        self._folder = folder
        self._ports = [*ports, *(port + 10_000 for port in ports)]
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [
            str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder}", "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-volume.max=0",
            "-master.volumeSizeLimitMB=1024", "-master.telemetry=false",
            # Its other services listen at fixed ports, where two servers of one machine would meet.
            "-s3.port.iceberg=0", "-s3.port.lance=0",
            # A master that was killed waits so long for others before it goes on alone; ten seconds by default.
            "-master.electionTimeout=1s",
            *(f"-{role}.port={port}" for role, port in zip(_ROLES, ports, strict=True)),
        ]  # fmt: skip

    @property
    def runs(self) -> bool:
        """Whether it was started and not killed since."""
        return self._process is not None

    def start(self, *, wait: bool = True) -> None:
        """Start it, on what an earlier run left."""
        log = self._folder / "log"
        with log.open("a") as stream:
            self._process = start(self._command, stdout=stream, stderr=subprocess.STDOUT, cwd=self._folder)
        if wait:
            _await(self.endpoint, self._process, log)

    def kill(self) -> None:
        """Kill it as a power cut would; what it has acknowledged is on disk."""
        if self._process is not None:
            # Nothing gentler: it takes half a minute to end by itself.
            kill_family(self._process)
            self._process = None

    def close(self) -> None:
        """Kill it and remove its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        for port in self._ports:
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)


@contextmanager
def s3_process(folder: Path) -> Iterator[S3Server]:
    """Run a server with an empty bucket; the environment leads s3fs to it meanwhile.

    Args:
        folder: An empty folder for its data.
    """
    server = S3Server(folder)
    with _environment(server.endpoint):
        try:
            server.start()
            _make_bucket()
            yield server
        finally:
            server.close()


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run a server as `s3_process` does and yield the bucket's URL."""
    with s3_process(folder) as server:
        yield server.url


def prefix(url: str) -> str:
    """Return a place of its own in a bucket."""
    return f"{url}/{uuid.uuid4().hex}"


def upload(folder: Path, url: str) -> str:
    """Copy a folder into the bucket and return its URL."""
    import s3fs

    s3fs.S3FileSystem().put(f"{folder}/", f"{url}/", recursive=True)
    return url


def _free_ports() -> list[int]:
    """Return a port for each role that is free now, with the one ten thousand higher."""
    ports: list[int] = []
    with ExitStack() as held:
        for candidate in range(_FIRST_PORT + os.getpid() % 2_000, _LAST_PORT):
            pair = [held.enter_context(socket.socket()) for _ in range(2)]
            try:
                for offset, listener in zip((0, 10_000), pair, strict=True):
                    listener.bind(("127.0.0.1", candidate + offset))
            except OSError:
                continue
            ports.append(candidate)
            if len(ports) == len(_ROLES):
                return ports
    raise RuntimeError("no free ports")


@contextmanager
def _environment(endpoint: str) -> Iterator[None]:
    """Set the variables by which the AWS libraries find the server, and restore them."""
    names = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _await(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{endpoint}/healthz", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text()[-2000:]}")


def _make_bucket() -> None:
    import s3fs

    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(_BUCKET)
        except OSError:
            # The filer comes up a moment after the gateway.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)
        else:
            return
