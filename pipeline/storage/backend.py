"""The filesystem behind a URL, and how requests to it are made.

Owns its opening, time limits, retries, error translation and the counting of requests. The only module that imports
fsspec. Must not know what is asked.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from pipeline.errors import Problem, SettingsError
from pipeline.storage.base import checked_path
from pipeline.storage.counting import count
from pipeline.storage.direct import DirectReader
from pipeline.storage.redaction import secrets_of, shown_url
from pipeline.storage.remote_errors import Translator
from pipeline.storage.retrying import RetryPolicy, backend_errors
from pipeline.storage.s3 import S3Bucket, s3_settings
from pipeline.storage.s3_options import environment_problems
from pipeline.storage.waiting import Waiting

_Result = TypeVar("_Result")

_S3 = frozenset({"s3", "s3a"})
# How HTTP servers say that there is nothing.
_ABSENT = (404, 410)


class Backend:
    """A prefix of a filesystem.

    Args:
        url: With its scheme. Credentials in it are used and never shown.
        options: What the filesystem takes beside the URL.
        retry: How long requests are tried.

    Raises:
        SettingsError: URL, options or environment cannot be used.
        StorageError: It cannot be opened for another reason.

    Attributes:
        url: Without credentials.
        scheme: In lower case.
        is_http: Whether it is http or https.
        fs: fsspec's filesystem.
        root: The prefix there.
        bucket: By which S3 is asked what fsspec has no words for; None elsewhere.
        direct: A faster way to ranges of S3 objects; None elsewhere.
    """

    def __init__(self, url: str, options: Mapping[str, object], retry: RetryPolicy) -> None:
        self.url = shown_url(url)
        self._retry = retry
        self._answered = False
        # "s3://bucket": all that one outage concerns, as far as a URL tells.
        self._server = "/".join(self.url.split("/")[:3])
        base, mark, query = url.partition("?")
        self.scheme = base.partition(":")[0].lower()
        self.is_http = self.scheme in ("http", "https")
        if mark and not self.is_http:
            raise SettingsError(Problem(what="a query has no meaning here", where=self.url, remedy="leave out '?…'"))
        # A signed HTTP URL carries its signature behind every path.
        self.suffix = mark + query
        is_s3 = self.scheme in _S3
        unusable = tuple(environment_problems(options, os.environ, self.url)) if is_s3 else ()
        if unusable:
            raise SettingsError(*unusable)
        self._translator = Translator(
            scheme=self.scheme, secrets=secrets_of(url, options), anonymous=options.get("anon") is True
        )
        self.fs: Any
        with self._translator.translated("open", self.url):
            self.fs, root = url_to_fs(base, **(s3_settings(options) if is_s3 else options))
        self.root = str(root).rstrip("/")
        self.bucket = S3Bucket(self.fs, self.root) if is_s3 else None
        self.direct = DirectReader(self.bucket) if self.bucket else None

    def location(self, path: str = "") -> str:
        """Return where a path is, for messages."""
        return f"{self.url.removesuffix('/')}/{path}" if path else self.url

    def full(self, path: str) -> str:
        """Return the filesystem's name of a path."""
        return f"{self.root}/{checked_path(path)}{self.suffix}"

    def key(self, path: str) -> str:
        """Return the name of a path in an S3 bucket."""
        prefix = self.bucket.prefix if self.bucket else ""
        return prefix + checked_path(path)

    def call(self, verb: str, *positional: object, seconds: float, **arguments: object) -> Any:
        """Call a method of the filesystem, with a time limit where it understands one."""
        if self.bucket is None:
            count(requests=1)
        else:
            self.bucket.watch()
        method = getattr(self.fs, verb)
        # Asynchronous backends wrap coroutines; the wrapper takes the limit and cancels the request.
        if inspect.iscoroutinefunction(getattr(method, "__wrapped__", None)):
            arguments["timeout"] = seconds
        try:
            return method(*positional, **arguments)
        except FileNotFoundError as error:
            raise (_behind(error) if self.is_http else error) from error.__cause__

    def attempt(self, verb: str, path: str, request: Callable[[float], _Result]) -> _Result:
        """Repeat a request while that may help; a `StorageError` with the last error's cause otherwise."""
        waiting = Waiting(self._server)
        with self.translated(verb, path):
            try:
                result = self._retry.run(
                    request,
                    known=self._answered,
                    repeats=lambda error: waiting.failed(self._translator.cause(error)),
                )
            except backend_errors():
                waiting.gave_up()
                raise
            self._answered = True
            waiting.succeeded()
            return result

    def translated(self, verb: str, path: str) -> AbstractContextManager[None]:
        """Return the context that turns the backend's errors into ours."""
        return self._translator.translated(verb, self.location(path), answered=self._answered)


def _behind(error: FileNotFoundError) -> BaseException:
    """Return what fsspec's HTTP met: it says that a file is not there when a server fails or cannot be reached, too."""
    cause = error.__cause__
    if isinstance(cause, backend_errors()) and getattr(cause, "status", None) not in _ABSENT:
        return cause
    return error
