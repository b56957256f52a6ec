"""Whether a cluster can be reached: asked in seconds, where Ray would wait for minutes and write about it.

Owns the form of an address, the question, and in which words a connection that failed is told of.
"""

from __future__ import annotations

import os
import socket
import time

from ray.exceptions import AuthenticationError

from pipeline.errors import Problem, WorkerError

# What Ray finds or starts by itself.
_BY_RAY = ("auto", "local")
# Of Ray's own client, which speaks to a proxy of the cluster.
_CLIENT = "ray://"
# Seconds for a head to answer: a network that drops a packet repeats it within three, and people wait for this.
_PATIENCE_S = 8.0
# Seconds between two attempts: a head that is just being replaced refuses for a moment.
_PAUSE_S = 0.5
# What opens a connection of HTTP/2, by which Ray speaks, with settings that say nothing; and what answers are known by:
# the type of the first frame, behind three bytes of length.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_TYPE, _SETTINGS = 3, 4


def require_reachable(address: str) -> None:
    """Make sure that something which may be Ray answers at an address, and that it lets this process in.

    Args:
        address: HOST:PORT of the cluster's head. "auto" and "local" are left to Ray.

    Raises:
        WorkerError: There is nothing, something else, or a cluster that wants a token; or it is no address.
    """
    if address in _BY_RAY:
        return
    host, port = _parsed(address)
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        trouble = _trouble(host, port, max(_PAUSE_S, deadline_s - time.monotonic()))
        if not trouble:
            break
        if time.monotonic() + _PAUSE_S > deadline_s:
            raise _unreachable(trouble, address)
        time.sleep(_PAUSE_S)
    if not address.startswith(_CLIENT):
        _require_welcome(f"{host}:{port}", address)


def refused(error: Exception, address: str) -> WorkerError:
    """Return an error of Ray's, met while connecting, as one of ours.

    Args:
        error: As Ray raised it.
        address: The cluster's.
    """
    if not isinstance(error, AuthenticationError):
        return _unreachable(str(error), address)
    if os.environ.get("RAY_AUTH_MODE") != "token":
        what, remedy = "wants a token", "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    elif "no authentication token" in str(error):
        what, remedy = "wants a token, and there is none here", "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    else:
        what, remedy = "wants another token", "correct RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    return WorkerError(
        Problem(what=f"cannot connect to Ray: the cluster {what}", where=f"address {address}", remedy=remedy)
    )


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix(_CLIENT).rpartition(":")
    if not host or "/" in address.removeprefix(_CLIENT) or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise WorkerError(
            Problem(
                what="is no address of a Ray cluster",
                where=f"address {address}",
                remedy="give HOST:PORT of its head, such as 10.0.0.7:6379; the dashboard's is not it",
            )
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _trouble(host: str, port: int, patience_s: float) -> str:
    """Return why nothing that may be Ray answers, or "" when it does."""
    try:
        with socket.create_connection((host, port), timeout=patience_s) as connection:
            # With certificates the first word is not ours to say.
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return ""
            connection.sendall(_HELLO)
            answer = b""
            while len(answer) <= _TYPE:
                piece = connection.recv(64)
                if not piece:
                    return "what answers there is no Ray"
                answer += piece
            return "" if answer[_TYPE] == _SETTINGS else "what answers there is no Ray"
    except TimeoutError:
        return "no answer"
    except (OSError, UnicodeError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _require_welcome(endpoint: str, address: str) -> None:
    """Ask the head for anything at all: Ray would repeat for 20 s what was refused for want of a token."""
    try:
        # Not public; the first steps of `ray.init`. Without the first of them a token that is missing ends the process.
        from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # of a module in C
    except ImportError:
        return
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        GcsClient(address=endpoint)
    except AuthenticationError as error:
        raise refused(error, address) from error
    except (RuntimeError, ValueError, TypeError):
        # Ray's own attempt comes next, and says what is wrong.
        return


def _unreachable(why: str, address: str) -> WorkerError:
    return WorkerError(
        Problem(
            what=f"cannot connect to Ray: {why}",
            where=f"address {address}",
            remedy="start the cluster, or correct --address (or RAY_ADDRESS): HOST:PORT of its head",
        )
    )
