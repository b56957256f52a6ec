"""Which failures of remote backends pass by themselves, and how long to wait for that.

Owns the retry loop, its deadline, and the words for backend errors. Must not know paths or file formats. No backend is
imported: an error can only come from one that is loaded.
"""

from __future__ import annotations

import errno
import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Base classes of errors that are no OSError, by the module that defines them.
_FOREIGN = (
    ("botocore.exceptions", ("BotoCoreError", "ClientError")),
    ("aiohttp", ("ClientError",)),
    ("fsspec.exceptions", ("FSTimeoutError",)),
    ("gcsfs.retry", ("HttpError",)),
    ("google.auth.exceptions", ("GoogleAuthError",)),
    ("azure.core.exceptions", ("AzureError",)),
    ("httpx", ("HTTPError",)),
    ("paramiko.ssh_exception", ("SSHException",)),
)
# Nothing that waiting could mend.
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
    RuntimeError,
)
# HTTP refusals other than "too slow" and "too many requests".
_REFUSALS = frozenset(range(400, 500)) - {408, 425, 429}
_PERMANENT_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "GoogleAuthError")


def backend_errors() -> tuple[type[BaseException], ...]:
    """Return the exception classes of everything loaded that a filesystem call may raise."""
    # RuntimeError: operations that a backend lacks, closed sessions, use after a fork.
    found: list[type[BaseException]] = [OSError, RuntimeError]
    for module, names in _FOREIGN:
        loaded = sys.modules.get(module)
        found += [getattr(loaded, name) for name in names if hasattr(loaded, name)]
    return tuple(found)


def is_permanent(error: BaseException) -> bool:
    """Return whether another attempt is bound to fail in the same way."""
    refused = getattr(error, "status", None) in _REFUSALS or getattr(error, "errno", None) == errno.EINVAL
    return refused or isinstance(error, _PERMANENT) or type(error).__name__ in _PERMANENT_NAMES


def cause_of(error: BaseException) -> str:
    """Return an error in words; credentials may still be in it."""
    name = type(error).__name__
    words = getattr(error, "strerror", None) or str(error)
    if isinstance(error, TimeoutError):
        return f"no answer in time ({name})"
    return f"{words} ({name})" if words else name


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long one request is tried.

    Attributes:
        deadline_s: For all attempts together, waiting included.
        attempt_s: For one attempt.
        attempts: At most so many.
        first_pause_s: Before the second attempt; doubled each time.
        longest_pause_s: The pause is never longer.
    """

    # Backends multiply their own retries and timeouts (216 s were seen for one request); this bounds the product.
    deadline_s: float = 180.0
    # Enough for the largest piece at 1 MB/s.
    attempt_s: float = 75.0
    # Each attempt is itself several of the backend's.
    attempts: int = 5
    # Long enough for a throttled store to breathe, short beside a chunk's transfer.
    first_pause_s: float = 0.25
    # A store that was restarted is back within such times.
    longest_pause_s: float = 8.0

    def run(self, request: Callable[[float], _Result]) -> _Result:
        """Return what the request returns, tried until it succeeds, fails for good, or time is up.

        Args:
            request: Called with the seconds it may take.

        Raises:
            BaseException: The last attempt's error, one of `backend_errors()`.
        """
        end = time.monotonic() + self.deadline_s
        for attempt in range(1, self.attempts + 1):
            try:
                return request(max(min(self.attempt_s, end - time.monotonic()), 1e-3))
            except backend_errors() as error:
                pause_s = min(self.first_pause_s * 2 ** (attempt - 1), self.longest_pause_s)
                # Workers that failed together must not come back together.
                pause_s *= random.uniform(0.5, 1.0)
                if attempt == self.attempts or is_permanent(error) or time.monotonic() + pause_s >= end:
                    raise
                _log.debug("attempt %d failed with %s, again in %.2f s", attempt, type(error).__name__, pause_s)
            time.sleep(pause_s)
        raise ValueError("a retry policy needs at least one attempt")
