"""What a client library alone reads of a family in object storage, or writes there; prints its rate as JSON.

    python -m tests.benchmarks.remote_plain read|write LIBRARY AT_ONCE RECIPE

Owns the plain readers and writers: s3fs, boto3 or obstore, so many requests in flight, bytes thrown away as they come.
Imports nothing of the project, so that another interpreter with other libraries can run it as a file.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# What the libraries are fastest with.
_PIECE_BYTES = 8 << 20
_BUCKET = "bucket"

_Sizes = dict[str, int]


def main(verb: str, library: str, at_once: str, recipe: str) -> None:
    """Read or write once, warm, and print the figures."""
    document = json.loads(Path(recipe).read_text())
    places = [document["base_model"], *(entry["model"] for entry in document["models"])]
    keys = [f"{place}/model.safetensors".removeprefix(f"s3://{_BUCKET}/") for place in places]
    client: Any = _CLIENTS[library](int(at_once))
    sizes = client.sizes(keys)
    run: Callable[[], int] = lambda: client.read(sizes)  # noqa: E731
    if verb == "write":
        data = os.urandom(sizes[keys[0]])
        run = lambda: client.write(keys[0] + ".copy", data)  # noqa: E731
    begun, cpu = time.perf_counter(), time.process_time()
    moved_bytes = run()
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    figures = {
        "rate": moved_bytes / seconds / 1e6,
        "cpu_s_per_gb": cpu_s / moved_bytes * 1e9,
        "peak_mb": _peak_mb(),
    }
    print(json.dumps(figures))


def _peak_mb() -> float:
    """Return this process's own peak: what getrusage tells begins with that of the process which started it."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def _pieces(sizes: _Sizes) -> list[tuple[str, int, int]]:
    return [
        (key, start, min(start + _PIECE_BYTES, size))
        for key, size in sizes.items()
        for start in range(0, size, _PIECE_BYTES)
    ]


class _S3fs:
    def __init__(self, at_once: int) -> None:
        import s3fs

        self._at_once = at_once
        self._system = s3fs.S3FileSystem(config_kwargs={"max_pool_connections": 64})

    def sizes(self, keys: list[str]) -> _Sizes:
        return {key: self._system.info(f"{_BUCKET}/{key}")["size"] for key in keys}

    def read(self, sizes: _Sizes) -> int:
        pieces, total = _pieces(sizes), 0
        for begin in range(0, len(pieces), self._at_once):
            keys, starts, stops = zip(*pieces[begin : begin + self._at_once], strict=True)
            paths = [f"{_BUCKET}/{key}" for key in keys]
            total += sum(map(len, self._system.cat_ranges(paths, list(starts), list(stops))))
        return total

    def write(self, key: str, data: bytes) -> int:
        self._system.pipe_file(f"{_BUCKET}/{key}", data, chunksize=_PIECE_BYTES, max_concurrency=self._at_once)
        return len(data)


def _by_threads(at_once: int, read_one: Callable[[str, int, int], int], sizes: _Sizes) -> int:
    """Read by a library whose calls hold a thread."""
    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(lambda piece: read_one(*piece), _pieces(sizes)))


class _Boto3:
    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        import boto3  # type: ignore[import-not-found]
        from botocore.config import Config

        self._client = boto3.client("s3", config=Config(max_pool_connections=64))

    def sizes(self, keys: list[str]) -> _Sizes:
        return {key: self._client.head_object(Bucket=_BUCKET, Key=key)["ContentLength"] for key in keys}

    def read(self, sizes: _Sizes) -> int:
        return _by_threads(self._at_once, self._read_one, sizes)

    def _read_one(self, key: str, start: int, stop: int) -> int:
        body = self._client.get_object(Bucket=_BUCKET, Key=key, Range=f"bytes={start}-{stop - 1}")["Body"]
        buffer, done = memoryview(bytearray(stop - start)), 0
        while got_bytes := body.readinto(buffer[done:]):
            done += got_bytes
        return done

    def write(self, key: str, data: bytes) -> int:
        from boto3.s3.transfer import TransferConfig  # type: ignore[import-not-found]

        config = TransferConfig(multipart_chunksize=_PIECE_BYTES, max_concurrency=self._at_once)
        self._client.upload_fileobj(io.BytesIO(data), _BUCKET, key, Config=config)
        return len(data)


class _Obstore:
    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        import obstore  # type: ignore[import-not-found]
        from obstore.store import S3Store  # type: ignore[import-not-found]

        self._library = obstore
        endpoint, region = os.environ["AWS_ENDPOINT_URL"], os.environ["AWS_DEFAULT_REGION"]
        self._store = S3Store(_BUCKET, endpoint=endpoint, region=region, client_options={"allow_http": True})

    def sizes(self, keys: list[str]) -> _Sizes:
        return {key: self._library.head(self._store, key)["size"] for key in keys}

    def read(self, sizes: _Sizes) -> int:
        return _by_threads(self._at_once, self._read_one, sizes)

    def _read_one(self, key: str, start: int, stop: int) -> int:
        # One by one: get_ranges would join neighbours into one request.
        return len(self._library.get_range(self._store, key, start=start, end=stop))

    def write(self, key: str, data: bytes) -> int:
        body, parts = io.BytesIO(data), {"chunk_size": _PIECE_BYTES, "max_concurrency": self._at_once}
        self._library.put(self._store, key, body, use_multipart=True, **parts)
        return len(data)


_CLIENTS = {"s3fs": _S3fs, "boto3": _Boto3, "obstore": _Obstore}


if __name__ == "__main__":
    main(*sys.argv[1:5])
