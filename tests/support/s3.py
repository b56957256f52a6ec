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

KEY, SECRET = "geomerge-tests", "not-a-secret-of-anyone"
_BUCKET = "bucket"
# Roles of the one process; each also listens for gRPC ten thousand ports higher.
_ROLES = ("master", "volume", "filer", "s3")
# Start-up takes three seconds on an idle machine.
_PATIENCE_S = 90.0


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run a server with an empty bucket and yield the bucket's URL; the environment leads s3fs to it meanwhile.

    Args:
        folder: An empty folder for its data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = _free_ports()
    command = [
        str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder}", "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-volume.max=0",
        "-master.volumeSizeLimitMB=1024", "-master.telemetry=false",
        *(f"-{role}.port={port}" for role, port in zip(_ROLES, ports, strict=True)),
    ]  # fmt: skip
    endpoint = f"http://127.0.0.1:{ports[-1]}"
    with (folder / "log").open("w") as log, _environment(endpoint):
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            _await(endpoint, process, folder / "log")
            _make_bucket()
            yield f"s3://{_BUCKET}"
        finally:
            # It takes half a minute to end by itself, and its data are of no use to anyone.
            process.kill()
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)


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
        for candidate in range(20_000 + os.getpid() % 5_000, 30_000):
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
