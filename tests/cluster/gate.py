"""A door in front of the S3 server: it holds the requests that a pattern names until it is told to let them through.

So a test finds a worker in the middle of a certain read or write, and not a moment before or after it.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

# What a hold waits for comes within seconds; the machine may be busy.
_PATIENCE_S = 90.0


class Hold:
    """Requests that stand at the door.

    Attributes:
        ports: From which the clients of the held requests called, in order.
    """

    def __init__(self, pattern: bytes, after: int) -> None:
        self.ports: list[int] = []
        self._pattern = re.compile(pattern)
        self._after = after
        self._seen = 0
        self._changed = threading.Condition()
        self._open = False

    def meet(self, data: bytes, port: int) -> None:
        """Wait if what a client sends is to be held."""
        if not self._pattern.search(data):
            return
        with self._changed:
            self._seen += 1
            if self._seen <= self._after:
                return
            self.ports.append(port)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._open)

    def wait(self, requests: int = 1) -> None:
        """Wait until so many requests are held.

        Raises:
            TimeoutError: They do not come.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.ports) >= requests, _PATIENCE_S):
                raise TimeoutError(
                    f"{len(self.ports)} of {requests} requests came that match {self._pattern.pattern!r}"
                )

    def release(self) -> None:
        """Let them, and all that follow, through."""
        with self._changed:
            self._open = True
            self._changed.notify_all()


class Gate:
    """Hands bytes on in both directions.

    Attributes:
        endpoint: For clients.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 0))
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._hold: Hold | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def hold(self, pattern: bytes, *, after: int = 0) -> Iterator[Hold]:
        """Hold requests from now on, at the end release them.

        Args:
            pattern: Of the first bytes of a request, such as rb"GET /bucket/models/".
            after: So many are let through first.
        """
        self._hold = hold = Hold(pattern, after)
        try:
            yield hold
        finally:
            self._hold = None
            hold.release()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        # Ends when the listener is closed.
        with suppress(OSError):
            while True:
                client, (_, port) = self._listener.accept()
                threading.Thread(target=self._serve, args=(client, port), daemon=True).start()

    def _serve(self, client: socket.socket, port: int) -> None:
        with client:
            try:
                server = socket.create_connection(self._upstream)
            except OSError:
                return
            with server:
                threading.Thread(target=_pump, args=(server, client), daemon=True).start()
                with suppress(OSError):
                    while data := client.recv(65536):
                        if hold := self._hold:
                            hold.meet(data, port)
                            if _is_gone(client):
                                # What a dead client had begun to send never left its machine.
                                break
                        server.sendall(data)
                _shut(server, client)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    _shut(source, sink)


def _is_gone(client: socket.socket) -> bool:
    try:
        return client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False


def _shut(*sockets: socket.socket) -> None:
    for one in sockets:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def wait_until(done: Callable[[], bool], what: str, patience_s: float = _PATIENCE_S) -> None:
    """Wait until a question is answered with yes.

    Raises:
        TimeoutError: Names what did not happen.
    """
    deadline = time.monotonic() + patience_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)
