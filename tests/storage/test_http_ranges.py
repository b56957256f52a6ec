"""Ranges by plain HTTP from servers that say what a test lets them say, byte by byte."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pipeline.storage.http_ranges import FAILURES, Patience, RangeClient, RefusedError

BODY = bytes(range(200))
# Long beside what the loopback takes, short beside a test.
QUICK = Patience(connect_s=5.0, read_s=0.3)


def head(status: str = "206 Partial Content", size: int = len(BODY), start: int = 0, more: str = "") -> bytes:
    content_range = f"Content-Range: bytes {start}-{start + size - 1}/9999\r\n"
    return f"HTTP/1.1 {status}\r\n{content_range}Content-Length: {size}\r\n{more}\r\n".encode()


class Scripted:
    """A server that answers each request by the next of its replies; None ends the connection.

    Attributes:
        requests: What it was asked, and by which connection.
    """

    def __init__(self, *replies: bytes | None, tls: ssl.SSLContext | None = None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._replies, self._tls = list(replies), tls
        self._open: list[socket.socket] = []
        self.requests: list[tuple[int, str]] = []
        self.url = urlsplit(f"http{'s' if tls else ''}://127.0.0.1:{self._listener.getsockname()[1]}/a%20b?x=1")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        number = 0
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                number += 1
                with suppress(OSError):
                    connection = self._tls.wrap_socket(connection, server_side=True) if self._tls else connection
                    self._open.append(connection)
                    self._answer(connection, number)

    def _answer(self, connection: socket.socket, number: int) -> None:
        while self._replies:
            asked = connection.recv(4096)
            if not asked:
                return
            self.requests.append((number, asked.decode()))
            reply = self._replies.pop(0)
            if reply is None:
                connection.close()
                return
            connection.sendall(reply)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            connection.close()
        self._thread.join(5)


@pytest.fixture
def client() -> Iterator[RangeClient]:
    made = RangeClient(QUICK, ssl.create_default_context)
    yield made
    made.close()


def fetched(
    client: RangeClient, server: Scripted, size: int = len(BODY), start: int = 0, limit_s: float = 5.0
) -> bytes:
    buffers = [bytearray(size // 3), bytearray(size - size // 3)]
    views = [memoryview(buffer) for buffer in buffers]
    got_bytes = client.read_into(server.url, start, views, time.monotonic() + limit_s)
    return b"".join(buffers)[:got_bytes]


def test_what_is_asked_and_that_a_connection_is_used_again(client: RangeClient) -> None:
    server = Scripted(head(start=50) + BODY, head() + BODY)
    assert fetched(client, server, start=50) == BODY
    assert fetched(client, server) == BODY
    assert [number for number, _ in server.requests] == [1, 1]
    lines = server.requests[0][1].split("\r\n")
    assert lines[0] == "GET /a%20b?x=1 HTTP/1.1"
    assert {f"Host: {server.url.netloc}", "Range: bytes=50-249", "Accept-Encoding: identity"} <= set(lines)
    server.close()


def test_a_reply_that_says_so_ends_its_connection(client: RangeClient) -> None:
    server = Scripted(head(more="Connection: close\r\n") + BODY)
    assert fetched(client, server) == BODY
    server.close()
    again = Scripted(head() + BODY)
    assert fetched(client, again) == BODY
    again.close()


def test_a_connection_that_the_server_ended_is_replaced(client: RangeClient) -> None:
    """Once it is known to be dead, and once only the request finds that out."""
    server = Scripted(head() + BODY, None, head() + BODY)
    assert fetched(client, server) == BODY
    assert fetched(client, server) == BODY
    assert [number for number, _ in server.requests] == [1, 1, 2]
    server.close()


def test_fewer_bytes_are_told(client: RangeClient) -> None:
    server = Scripted(head(size=70) + BODY[:70])
    assert fetched(client, server) == BODY[:70]
    server.close()


@pytest.mark.parametrize(
    "reply",
    [
        head("200 OK") + BODY,
        head(start=1) + BODY,
        head(size=len(BODY) + 1) + BODY + b"x",
        head(more="Transfer-Encoding: chunked\r\n") + b"c8\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 200\r\n\r\n" + BODY,
        b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-199/200\r\n\r\n" + BODY,
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\n\r\ndenied",
        b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_whatever_is_not_the_range_is_refused(client: RangeClient, reply: bytes) -> None:
    server = Scripted(reply, head() + BODY)
    with pytest.raises(RefusedError) as caught:
        fetched(client, server)
    assert caught.value.text in (b"", b"denied") or caught.value.text[:5] in (BODY[:5], b"c8\r\n\0")
    assert server.url.query not in str(caught.value)
    server.close()


@pytest.mark.parametrize(
    "reply",
    [
        None,
        b"",
        b"HTTP/1.1 206",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 206 Partial Content\r\nno header\r\n\r\n",
        b"x" * 100_000,
        head(),
        head() + BODY[:-1],
        b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_what_fails_is_an_error_in_time(client: RangeClient, reply: bytes | None) -> None:
    server = Scripted(reply, head() + BODY)
    begun = time.monotonic()
    with pytest.raises(FAILURES):
        fetched(client, server)
    # Two waits for a byte at most; thirty seconds is what the system would wait.
    assert time.monotonic() - begun < 15
    server.close()


def test_the_time_limit_holds_for_all_together(client: RangeClient) -> None:
    server = Scripted(head() + BODY)
    with pytest.raises(TimeoutError):
        fetched(client, server, limit_s=0.0)
    server.close()


def test_nobody_listens(client: RangeClient) -> None:
    server = Scripted()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        fetched(client, server)


def test_tls_and_the_certificate_that_it_asks_for(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    long = BODY * 1000
    server = Scripted(head(size=len(long)) + long, head(size=len(long)) + long, tls=context)
    client = RangeClient(QUICK, lambda: ssl.create_default_context(cafile=str(certificate)))
    for _ in range(2):
        assert fetched(client, server, size=len(long)) == long
    assert [number for number, _ in server.requests] == [1, 1]
    client.close()
    server.close()
    strangers = Scripted(head() + BODY, tls=context)
    wary = RangeClient(QUICK, ssl.create_default_context)
    with pytest.raises(ssl.SSLCertVerificationError):
        fetched(wary, strangers)
    wary.close()
    strangers.close()
