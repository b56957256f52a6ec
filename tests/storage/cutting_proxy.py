"""A TCP proxy on the loopback interface that resets connections in the middle of requests."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class CuttingProxy:
    """Hands bytes on, but resets a connection once a request that a mark names has sent so many.

    Attributes:
        url: The endpoint for clients.
        cuts: How many requests were cut.
    """

    def __init__(self, endpoint: str, mark: bytes, after_bytes: int, times: int) -> None:
        self._upstream = urlsplit(endpoint)
        self._mark, self._after_bytes, self._times = mark, after_bytes, times
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0

    def serve(self) -> None:
        """Accept until `close`."""
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve_one, args=(client,), daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        # A thread that waits in accept() wakes up by this alone.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve_one(self, client: socket.socket) -> None:
        assert self._upstream.hostname
        assert self._upstream.port
        server = socket.create_connection((self._upstream.hostname, self._upstream.port))
        threading.Thread(target=self._copy, args=(server, client), daemon=True).start()
        seen, passed = b"", -1
        with suppress(OSError), client, server:
            while data := client.recv(1 << 16):
                seen = (seen + data)[-(1 << 17) :]
                if self._mark in seen:
                    passed, seen = 0, b""
                if passed >= 0:
                    passed += len(data)
                    if passed > self._after_bytes and self._cut():
                        for end in (client, server):
                            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
                server.sendall(data)

    def _cut(self) -> bool:
        with self._lock:
            cutting = self.cuts < self._times
            self.cuts += cutting
            return cutting

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@contextmanager
def cutting_proxy(endpoint: str, mark: bytes, after_bytes: int, times: int) -> Iterator[CuttingProxy]:
    """Run a proxy.

    Args:
        endpoint: The server's URL.
        mark: In the first lines of the requests to cut.
        after_bytes: So many of such a request go through.
        times: So many requests are cut.
    """
    proxy = CuttingProxy(endpoint, mark, after_bytes, times)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
