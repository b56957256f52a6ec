"""A proxy on the loopback interface that hands HTTP requests on unchanged, and breaks those that a rule names."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

# Between two hops only, never handed on; "Expect" is answered here.
_HOP = {"connection", "keep-alive", "expect", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
# Far below the client's patience of 30 s.
STALL_S = 1.5


class Fault(Enum):
    """What happens to a request."""

    # Answered here; the server hears nothing of it.
    SLOW_DOWN = (503, "SlowDown")
    INTERNAL = (500, "InternalError")
    MISSING = (404, "NoSuchKey")
    # In the middle of the reply's body: a reset, an orderly close with the promised length not kept, a pause.
    RESET = "reset"
    SHORT = "short"
    STALL = "stall"
    # Half of the reply, with a length that says nothing of the other half.
    HALVED = "halved"
    # The server does it, and the client never hears of it.
    LOST_REPLY = "lost reply"
    # One bit of the byte that the rule names, on the way to the client; of the body's middle, on the way to the server.
    FLIP = "flip"
    FLIP_UPLOAD = "flip upload"


@dataclass(slots=True, kw_only=True, eq=False)
class Rule:
    """Which requests meet a fault.

    Attributes:
        fault: What happens to them.
        method: Their method.
        part: In their path or query, unquoted.
        byte: Only ranges that hold this byte of the object.
        after: So many are let through first.
        times: At most so many are broken; None: all.
        seen: How many requests matched.
        broken: How many of them met the fault.
    """

    fault: Fault
    method: str = "GET"
    part: str = ""
    byte: int | None = None
    after: int = 0
    times: int | None = 1
    seen: int = field(default=0, init=False)
    broken: int = field(default=0, init=False)

    def takes(self, method: str, path: str, span: tuple[int, int] | None) -> bool:
        """Count a request and return whether it meets the fault."""
        if method != self.method or self.part not in path:
            return False
        if self.byte is not None and (span is None or not span[0] <= self.byte <= span[1]):
            return False
        self.seen += 1
        if self.seen <= self.after or (self.times is not None and self.broken >= self.times):
            return False
        self.broken += 1
        return True


class FaultProxy:
    """Where a proxy listens, and its rules.

    Attributes:
        url: The endpoint for clients.
    """

    def __init__(self, url: str, upstream: str) -> None:
        self.url, self._upstream = url, upstream
        self._rules: tuple[Rule, ...] = ()
        self._requests = 0
        self._lock = threading.Lock()

    def start(self, *rules: Rule) -> None:
        """Count from zero, under rules of which the first that takes a request decides."""
        with self._lock:
            self._rules, self._requests = rules, 0
            for rule in rules:
                rule.seen = rule.broken = 0

    def stop(self) -> int:
        """Break nothing more and return how many requests came by."""
        with self._lock:
            self._rules = ()
            return self._requests

    def rule_for(self, method: str, path: str, span: tuple[int, int] | None) -> Rule | None:
        """Count a request and return the rule that takes it."""
        with self._lock:
            self._requests += 1
            return next((rule for rule in self._rules if rule.takes(method, path, span)), None)

    def forward(self, method: str, target: str, headers: Any, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Send a request to the server, its Host as the client signed it; return status, headers and body."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in _HOP:
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            reply = connection.getresponse()
            return reply.status, reply.getheaders(), reply.read()
        finally:
            connection.close()


@contextmanager
def fault_proxy(endpoint: str) -> Iterator[FaultProxy]:
    """Run a proxy in front of an HTTP endpoint.

    Args:
        endpoint: The server's URL.
    """
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.proxy = FaultProxy(f"http://127.0.0.1:{server.server_address[1]}", urlsplit(endpoint).netloc)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.proxy
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A merge opens many connections at once.
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients go away in the middle of broken replies."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        span = _RANGE.fullmatch(self.headers.get("Range") or "")
        start = int(span[1]) if span else 0
        proxy = self.server.proxy
        rule = proxy.rule_for(self.command, unquote(self.path), (start, int(span[2])) if span else None)
        fault = rule.fault if rule else None
        if fault and isinstance(fault.value, tuple):
            self._refuse(*fault.value)
            return
        if fault is Fault.FLIP_UPLOAD:
            body = _flipped(body, len(body) // 2)
        status, headers, content = proxy.forward(self.command, self.path, self.headers, body)
        if fault is Fault.LOST_REPLY:
            self._reset()
            return
        if fault is Fault.FLIP:
            if rule is None or rule.byte is None:
                raise ValueError("a flip needs the byte to flip")
            content = _flipped(content, rule.byte - start)
        if fault is Fault.HALVED:
            content = content[: len(content) // 2]
        self._reply(status, headers, content, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _reply(self, status: int, headers: list[tuple[str, str]], content: bytes, fault: Fault | None = None) -> None:
        """Send a reply, its body broken in the middle where the fault says so."""
        self.send_response_only(status)
        for name, value in headers:
            is_length = name.lower() == "content-length"
            if name.lower() not in _HOP and not (is_length and self.command != "HEAD"):
                self.send_header(name, value)
        if self.command != "HEAD" and status != http.HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        middle = len(content) // 2
        self.wfile.write(content[:middle])
        if fault is Fault.RESET:
            self._reset()
        elif fault is Fault.SHORT:
            self.close_connection = True
        else:
            if fault is Fault.STALL:
                time.sleep(STALL_S)
            self.wfile.write(content[middle:])

    def _refuse(self, status: int, code: str) -> None:
        """Answer as S3 does."""
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self._reply(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else content)

    def _reset(self) -> None:
        """Close the connection by a reset, without the shutdown that would come first."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()


def _flipped(data: bytes, position: int) -> bytes:
    """Return bytes with one bit of one of them flipped."""
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
