"""Ranges of S3 objects without s3fs in between, which takes thrice the processor time.

Owns the signed URLs and the decision when this way leads nowhere: whatever is not simply the range that was asked for
is left to s3fs, which asks anew and knows what errors mean. Must not know credentials, options or retries.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from pipeline.storage.counting import count
from pipeline.storage.http_ranges import FAILURES, Patience, RangeClient, RefusedError
from pipeline.storage.retrying import backend_errors

# A signed URL holds longer than it is used: a request may wait, and clocks differ.
SIGNED_S = 900
_USED_S = 300.0
# So many URLs refused one after the other: the server does not take them, or this process may not ask so.
_MOST_REFUSALS = 3
# The object is not there; s3fs could only ask once more to say the same.
_NO_SUCH_KEY = b"<Code>NoSuchKey</Code>"


class Signer(Protocol):
    """Who knows where objects are and may ask for them."""

    def signed_url(self, full: str, seconds: float) -> str | None:
        """Return a URL by which anyone may read an object for `SIGNED_S`, within so many seconds; None: there is none.

        Args:
            full: The object's full name.
            seconds: The time limit.
        """

    def patience(self) -> Patience:
        """Return how long to wait for a server."""

    def tls(self) -> ssl.SSLContext:
        """Return by what a server's certificate is checked."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Signed:
    """A URL, and until when it is used, by the monotonic clock."""

    url: SplitResult
    until_s: float


class DirectReader:
    """Reads ranges by signed URLs. Thread-safe; every request holds the thread that asks.

    Args:
        signer: Who signs.
    """

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self._client: RangeClient | None = None
        self._signed: dict[str, _Signed] = {}
        self._refusals = 0
        self._lock = threading.Lock()

    def read_into(self, full: str, start: int, buffers: Sequence[memoryview], seconds: float) -> int | None:
        """Fill buffers with an object's bytes from `start` on, one buffer behind the other.

        Args:
            full: The object's full name.
            start: The first byte.
            buffers: Writable bytes, more than none.
            seconds: The time limit.

        Returns:
            How many bytes came: fewer than asked for where the reply says that it has no more. None when this way did
            not lead to them, whatever the buffers hold now.

        Raises:
            FileNotFoundError: There is no such object.
        """
        end_s = time.monotonic() + seconds
        try:
            way = self._way(full, seconds)
        except _caught():
            # s3fs says it better.
            return None
        if way is None:
            return None
        client, signed = way
        try:
            got_bytes = client.read_into(signed.url, start, buffers, end_s)
        except RefusedError as refused:
            if _NO_SUCH_KEY in refused.text:
                raise FileNotFoundError(full) from None
            self._forget(full, signed)
            return None
        except FAILURES:
            # What is asked next asks for the same.
            count(retries=1)
            return None
        self._refusals = 0
        return got_bytes

    def close(self) -> None:
        """End connections that wait for another request; they are opened again as needed."""
        if self._client is not None:
            self._client.close()

    def _way(self, full: str, seconds: float) -> tuple[RangeClient, _Signed] | None:
        """Return the client, and a URL that holds long enough; None where there is no such way."""
        with self._lock:
            if self._refusals >= _MOST_REFUSALS:
                return None
            signed = self._signed.get(full)
            if signed is None or signed.until_s < time.monotonic():
                url = self._signer.signed_url(full, seconds)
                if url is None:
                    self._refusals = _MOST_REFUSALS
                    return None
                signed = _Signed(url=urlsplit(url), until_s=time.monotonic() + _USED_S)
                self._signed[full] = signed
            self._client = self._client or RangeClient(self._signer.patience(), self._signer.tls)
            return self._client, signed

    def _forget(self, full: str, signed: _Signed) -> None:
        """Use a URL no more; of many requests that were refused together, one counts."""
        with self._lock:
            if self._signed.get(full) is signed:
                del self._signed[full]
                self._refusals += 1


def _caught() -> tuple[type[BaseException], ...]:
    """Return what a signer may raise."""
    return (*backend_errors(), TypeError, ValueError)
