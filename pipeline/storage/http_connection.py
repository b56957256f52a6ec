"""One HTTP/1.1 connection: a request's bytes go out, the head of the reply comes back, its body into given memory.

Owns the socket and its time limits. Must not know what is asked. The standard library's client reads a body through
three layers, piece by piece as the network delivers it; here the system fills the memory, and no thread of Python runs
meanwhile.
"""

from __future__ import annotations

import socket
import ssl
import struct
from dataclasses import dataclass

# Heads are a few hundred bytes; what comes along of the body is copied once more.
_HEAD_BYTES = 4 << 10
# A head is no longer, or it is none.
_LONGEST_HEAD_BYTES = 64 << 10
_HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The head of a reply.

    Attributes:
        status: HTTP's number.
        headers: By name in lower case.
        keeps_alive: Whether the connection can be used again once the body was read.
    """

    status: int
    headers: dict[str, str]
    keeps_alive: bool


class Connection:
    """A connection to a server. Not thread-safe.

    Args:
        host: The server.
        port: Its port.
        connect_s: How long to wait for the connection, in seconds.
        read_s: How long to wait for the next byte.
        tls: By what its certificate is checked; None: not encrypted.

    Raises:
        OSError: There is no connection.
    """

    def __init__(self, host: str, port: int, *, connect_s: float, read_s: float, tls: ssl.SSLContext | None) -> None:
        self._read_s = read_s
        self._rest = memoryview(b"")
        plain = socket.create_connection((host, port), timeout=connect_s)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = plain if tls is None else tls.wrap_socket(plain, server_hostname=host)
            # For reads that the system carries out alone, see below.
            timeval = struct.pack("ll", int(read_s), int(read_s % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        except BaseException:
            plain.close()
            raise
        self._flags = socket.MSG_WAITALL if tls is None else 0

    @property
    def descriptor(self) -> int:
        """The socket's, to see whether anything comes."""
        return self._socket.fileno()

    def ask(self, request: bytes) -> Reply:
        """Send a request and return the head of the reply.

        Raises:
            ConnectionError: The server ended the connection.
            OSError: No answer in time, or another failure.
            ValueError: What came is no HTTP.
        """
        self._socket.settimeout(self._read_s)
        self._socket.sendall(request)
        data = bytearray()
        while (end := data.find(_HEAD_END)) < 0:
            got = self._socket.recv(_HEAD_BYTES)
            if not got:
                raise ConnectionResetError("the server ended the connection")
            data += got
            if len(data) > _LONGEST_HEAD_BYTES:
                raise ValueError("no head of an HTTP reply")
        self._rest = memoryview(bytes(data[end + len(_HEAD_END) :]))
        return _reply(bytes(data[:end]).decode("latin-1"))

    def read_into(self, buffer: memoryview) -> int:
        """Read of a body what comes, all that fits as a rule, and return how many bytes that was: more than none.

        Raises:
            ConnectionError: The body ends here.
            OSError: Nothing came in time, or another failure.
        """
        if self._rest:
            part = self._rest[: len(buffer)]
            buffer[: len(part)] = part
            self._rest = self._rest[len(part) :]
            return len(part)
        if self._flags:
            # A time limit of Python's own would make the socket one that never waits; the system has its limit too.
            self._socket.setblocking(True)
        try:
            got_bytes = self._socket.recv_into(buffer, 0, self._flags)
        except BlockingIOError as error:
            raise TimeoutError from error
        if not got_bytes:
            raise ConnectionResetError("the reply ended early")
        return got_bytes

    def close(self) -> None:
        """End it."""
        self._socket.close()


def _reply(head: str) -> Reply:
    """Return what the head of a reply says."""
    first, *lines = head.split("\r\n")
    version, _, rest = first.partition(" ")
    status = rest[:3]
    if not version.startswith("HTTP/1.") or not status.isdecimal():
        raise ValueError("no head of an HTTP reply")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise ValueError("no head of an HTTP reply")
        headers[name.lower()] = value.strip()
    if "transfer-encoding" in headers:
        # Nobody sends a range so, and its length is not known.
        headers.pop("content-length", None)
    keeps_alive = version != "HTTP/1.0" and headers.get("connection", "").lower() != "close"
    return Reply(status=int(status), headers=headers, keeps_alive=keeps_alive)
