"""One range of one URL by plain HTTP: the reply goes straight from its connection into the caller's memory.

Owns connections, their reuse, and the check that a reply is the range that was asked for. Must not know S3's requests,
credentials or retries.
"""

from __future__ import annotations

import select
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import SplitResult

from pipeline.storage.counting import count
from pipeline.storage.http_connection import Connection, Reply

# What is read of an error's text.
_ERROR_BYTES = 64 << 10
# They say nothing of the URL: the next reply may be another.
_PASSING = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
# What a request may fail with, other than by a reply.
FAILURES = (OSError, ValueError)

_Idle = dict[tuple[str, str], list[Connection]]


class RefusedError(Exception):
    """The reply is not the range, and the next one to the same URL would not be either.

    Attributes:
        text: The beginning of its body.
    """

    def __init__(self, status: int, text: bytes) -> None:
        super().__init__(f"HTTP status {status}")
        self.text = text


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait, in seconds.

    Attributes:
        connect_s: For a connection.
        read_s: For the next byte.
    """

    connect_s: float
    read_s: float


class RangeClient:
    """Connections that are used again. Thread-safe; every request holds the thread that asks.

    Args:
        patience: How long to wait.
        tls: Makes what certificates are checked by; called when a URL asks for it.
    """

    def __init__(self, patience: Patience, tls: Callable[[], ssl.SSLContext]) -> None:
        self._patience, self._make_tls = patience, tls
        self._tls: ssl.SSLContext | None = None
        self._idle: _Idle = {}
        self._lock = threading.Lock()
        # Not everyone who opens a store closes it.
        weakref.finalize(self, _close, self._idle)

    def read_into(self, url: SplitResult, start: int, buffers: Sequence[memoryview], end_s: float) -> int:
        """Fill buffers with the bytes of a URL from `start` on, one buffer behind the other.

        Args:
            url: http or https.
            start: The first byte.
            buffers: Writable bytes (format B), more than none.
            end_s: When to give up, by the monotonic clock.

        Returns:
            How many bytes came: fewer than there is room for where the reply says that it has no more.

        Raises:
            RefusedError: The reply is no such range.
            OSError: It did not come, or not whole; or ValueError, see `FAILURES`.
        """
        wanted_bytes = sum(map(len, buffers))
        connection, reply = self._asked(url, start, wanted_bytes, end_s)
        try:
            got_bytes = _range_bytes(connection, reply, start, wanted_bytes)
            _fill(connection, buffers, got_bytes, end_s)
        except BaseException:
            connection.close()
            raise
        if reply.keeps_alive:
            self._keep(url, connection)
        else:
            connection.close()
        return got_bytes

    def close(self) -> None:
        """End the connections that wait for another request."""
        with self._lock:
            _close(self._idle)

    def _asked(self, url: SplitResult, start: int, wanted_bytes: int, end_s: float) -> tuple[Connection, Reply]:
        """Send a request and return the head of the reply with its connection."""
        request = (
            f"GET {url.path}{'?' if url.query else ''}{url.query} HTTP/1.1\r\n"
            f"Host: {_host(url)}\r\n"
            f"Range: bytes={start}-{start + wanted_bytes - 1}\r\n"
            "Accept-Encoding: identity\r\nUser-Agent: geomerge\r\n\r\n"
        ).encode("ascii")
        while True:
            kept = self._taken(url)
            connection = kept or self._connected(url, end_s)
            count(requests=1)
            try:
                return connection, connection.ask(request)
            except BaseException as error:
                connection.close()
                # A server may end a connection that is idle at any time: another one serves.
                if kept is None or not isinstance(error, ConnectionError):
                    raise

    def _connected(self, url: SplitResult, end_s: float) -> Connection:
        connect_s = min(self._patience.connect_s, end_s - time.monotonic())
        if connect_s <= 0:
            raise TimeoutError
        tls = None
        if url.scheme == "https":
            with self._lock:
                tls = self._tls = self._tls or self._make_tls()
        port = url.port or (80 if tls is None else 443)
        return Connection(str(url.hostname), port, connect_s=connect_s, read_s=self._patience.read_s, tls=tls)

    def _taken(self, url: SplitResult) -> Connection | None:
        """Return a connection that is open as far as anyone knows."""
        while True:
            with self._lock:
                idle = self._idle.get((url.scheme, url.netloc))
                if not idle:
                    return None
                connection = idle.pop()
            poll = select.poll()
            poll.register(connection.descriptor, select.POLLIN)
            if not poll.poll(0):
                return connection
            # Nothing was asked for: the server has ended it.
            connection.close()

    def _keep(self, url: SplitResult, connection: Connection) -> None:
        with self._lock:
            self._idle.setdefault((url.scheme, url.netloc), []).append(connection)


def _close(idle: _Idle) -> None:
    for connections in idle.values():
        for connection in connections:
            connection.close()
    idle.clear()


def _host(url: SplitResult) -> str:
    """Return the host that a URL was signed for: botocore leaves the scheme's own port out."""
    usual = {"http": 80, "https": 443}.get(url.scheme)
    host = url.netloc.rpartition("@")[2]
    return host.removesuffix(f":{usual}") if url.port == usual else host


def _range_bytes(connection: Connection, reply: Reply, start: int, wanted_bytes: int) -> int:
    """Return how many bytes of the range a reply has."""
    length = reply.headers.get("content-length", "")
    size = int(length) if length.isdecimal() else 0
    begins = reply.headers.get("content-range", "").startswith(f"bytes {start}-")
    if reply.status == HTTPStatus.PARTIAL_CONTENT and begins and 0 < size <= wanted_bytes:
        return size
    if reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR or reply.status in _PASSING:
        raise OSError(f"HTTP status {reply.status}")
    text = bytearray(min(size, _ERROR_BYTES))
    with suppress(*FAILURES):
        connection.read_into(memoryview(text))
    raise RefusedError(reply.status, bytes(text))


def _fill(connection: Connection, buffers: Sequence[memoryview], size_bytes: int, end_s: float) -> None:
    """Read so many bytes into buffers, one behind the other."""
    for buffer in buffers:
        room = buffer[:size_bytes]
        size_bytes -= len(room)
        while room:
            if time.monotonic() > end_s:
                raise TimeoutError
            room = room[connection.read_into(room) :]
