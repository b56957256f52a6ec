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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pipeline.storage.counting import count

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
    ("httpx2", ("HTTPError",)),
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
_BEYOND_END = 416
_REFUSALS = frozenset(range(400, 500)) - {408, 425, 429}
# What only another configuration mends, by the names of the classes.
_PERMANENT_NAMES = frozenset(
    {"GoogleAuthError", "NoCredentialsError", "OfflineModeIsEnabled", "SSOTokenLoadError", "UnauthorizedSSOTokenError"}
)
# The same, where it is the user who must write something else: options, environment, profile or URL.
_MISTAKE_NAMES = frozenset(
    {
        "ConfigNotFound",
        "ConfigParseError",
        "EndpointResolutionError",
        "InfiniteLoopConfigError",
        "InvalidConfigError",
        "InvalidDefaultsMode",
        "InvalidMaxRetryAttemptsError",
        "InvalidProxiesConfigError",
        "InvalidRegionError",
        "InvalidRetryConfigurationError",
        "InvalidRetryModeError",
        "InvalidS3AddressingStyleError",
        "InvalidS3UsEast1RegionalEndpointConfigError",
        "NoRegionError",
        "ParamValidationError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "UnknownSignatureVersionError",
    }
)
# What lies behind an HTTP client's failure that no network has caused: values of wrong types, certificates' files.
_CAUSED_BY_VALUES = (TypeError, ValueError, FileNotFoundError)
# What botocore and aiohttp call a server that is not there, or went away, where that is no ConnectionError.
_OUTAGES = frozenset(
    {
        "ClientConnectionError",
        "ClientConnectorError",
        "ConnectTimeoutError",
        "ConnectionClosedError",
        "EndpointConnectionError",
        "HTTPClientError",
        "ServerDisconnectedError",
    }
)
# S3's words for bytes that were damaged or cut on their way up: the same bytes may arrive the next time.
_DAMAGED = frozenset(
    {"BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
)


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
    if code_of(error) in _DAMAGED:
        return False
    refused = getattr(error, "status", None) in _REFUSALS or getattr(error, "errno", None) == errno.EINVAL
    named = type(error).__name__ in _PERMANENT_NAMES | _MISTAKE_NAMES
    return refused or named or isinstance(error, _PERMANENT)


def is_mistake(error: BaseException) -> bool:
    """Return whether only other options, another environment or another URL mend an error of a store.

    Args:
        error: Of a request to a store that has not answered before: one that has may cause such errors itself.
    """
    name = type(error).__name__
    if name == "HTTPClientError":
        behind = error.__cause__ or error.__context__
        return isinstance(behind, _CAUSED_BY_VALUES) or type(behind).__name__ in _MISTAKE_NAMES
    return name in _MISTAKE_NAMES or code_of(error) == "InvalidBucketName"


def is_outage(error: BaseException) -> bool:
    """Return whether nobody answered: the server is down, restarting, or cut off."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__name__ in _OUTAGES


def is_beyond_end(error: BaseException) -> bool:
    """Return whether a server refuses a range because it begins beyond the object's end."""
    invalid = getattr(error, "errno", None) == errno.EINVAL and code_of(error) in ("", "416", "InvalidRange")
    return invalid or getattr(error, "status", None) == _BEYOND_END


def code_of(error: BaseException) -> str:
    """Return the code by which S3 names an error ("SlowDown"); "" for the errors of others."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, Mapping):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


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
    # Each is up to three of botocore's: a store that throttles is waited for about twenty seconds.
    attempts: int = 7
    # Long enough for a throttled store to breathe, short beside a chunk's transfer.
    first_pause_s: float = 0.25
    # A store that was restarted is back within such times.
    longest_pause_s: float = 8.0

    def run(
        self,
        request: Callable[[float], _Result],
        *,
        known: bool = False,
        repeats: Callable[[BaseException], None] = lambda _: None,
    ) -> _Result:
        """Return what the request returns, tried until it succeeds, fails for good, or time is up.

        Args:
            request: Called with the seconds it may take.
            known: The store has answered before: while it cannot be reached it is waited for until the deadline,
                however many attempts that takes. A wrong address is not.
            repeats: Told each error after which another attempt follows.

        Raises:
            BaseException: The last attempt's error, one of `backend_errors()`.
        """
        end = time.monotonic() + self.deadline_s
        attempt = failures = 0
        while True:
            attempt += 1
            count(retries=int(attempt > 1))
            try:
                return request(max(min(self.attempt_s, end - time.monotonic()), 1e-3))
            except backend_errors() as error:
                pause_s = min(self.first_pause_s * 2 ** (attempt - 1), self.longest_pause_s)
                # Workers that failed together must not come back together.
                pause_s *= random.uniform(0.5, 1.0)
                failures += not (known and is_outage(error))
                lasting = is_permanent(error) or (not known and is_mistake(error))
                if failures >= self.attempts or lasting or time.monotonic() + pause_s >= end:
                    raise
                repeats(error)
                _log.debug("attempt %d failed with %s, again in %.2f s", attempt, type(error).__name__, pause_s)
            time.sleep(pause_s)
