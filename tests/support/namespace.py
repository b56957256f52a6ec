"""A network of the tests' own: only the loopback interface, which nothing outside can reach and no other run shares."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys

# From linux/sched.h, linux/sockios.h and linux/if.h.
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1


def enter_namespace() -> str:
    """Move this process, and what it starts from now on, into a network namespace with only `lo`.

    Threads that run already stay where they are, so it comes before anything opens a socket.

    Returns:
        "" when done, or why it is not possible.
    """
    if sys.platform != "linux":
        return f"{sys.platform} has no network namespaces"
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        error = os.strerror(ctypes.get_errno())
        # A container without a network is as good.
        return "" if _only_loopback() else f"no network namespace for the tests (it takes root): {error}"
    _bring_up("lo")
    return ""


def _only_loopback() -> bool:
    return [name for _, name in socket.if_nameindex()] == ["lo"] and bool(_flags("lo") & _IFF_UP)


def _bring_up(name: str) -> None:
    flags = _flags(name) | _IFF_UP
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", name.encode(), flags))


def _flags(name: str) -> int:
    with socket.socket() as any_socket:
        reply = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sh14x", name.encode(), 0))
    return int(struct.unpack("16sh14x", reply)[1])
