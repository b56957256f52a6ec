"""What a remote backend's error means to a user.

Owns the translation into `StorageError`: the cause in words, the remedy, and no credentials. Must not know requests,
nor import a backend: errors are told apart by their codes and the names of their classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.errors import Problem, SettingsError, StorageError
from pipeline.storage.base import MissingObject
from pipeline.storage.redaction import redacted
from pipeline.storage.retrying import backend_errors, cause_of, code_of, is_mistake

# What wrong options raise, some backends only when they first connect.
_MISTAKES = (TypeError, ValueError, AttributeError)

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile, or give the machine a role; a public bucket "
    "needs anon: true"
)
_PROFILE = "set AWS_PROFILE, or profile in the storage options, to one that `aws configure list-profiles` shows"
_CONFIGURATION = (
    "correct the file (AWS_CONFIG_FILE or ~/.aws/config, AWS_SHARED_CREDENTIALS_FILE or ~/.aws/credentials)"
)
_OPTIONS = "correct the storage options, or the environment and the profile that they come from"
_BUSY = "the store is overloaded or limits the rate: run again later, or with fewer workers"
_CONNECTION = "check the address, the network and proxies, then run again"
_S3_CONNECTION = "check the address (AWS_ENDPOINT_URL or endpoint_url), the network and proxies, then run again"
_DAMAGED = "bytes are damaged on their way: check the network, proxies and memory, then run again"
_BUCKET_NAME = "correct the bucket's name: 3 to 63 of a-z, 0-9, '-' and '.'"
_BY_CODE = {
    "SlowDown": _BUSY,
    "ServiceUnavailable": _BUSY,
    "RequestLimitExceeded": _BUSY,
    "TooManyRequests": _BUSY,
    "503": _BUSY,
    "429": _BUSY,
    "BadDigest": _DAMAGED,
    "XAmzContentChecksumMismatch": _DAMAGED,
    "XAmzContentSHA256Mismatch": _DAMAGED,
    "InvalidBucketName": _BUCKET_NAME,
    "NoSuchUpload": "something removed the unfinished upload: let no other run or cleaning use this place, run again",
    "ExpiredToken": "the credentials have expired: renew them and run again",
}
_BY_NAME = {
    "ConfigNotFound": _CONFIGURATION,
    "ConfigParseError": _CONFIGURATION,
    "ProfileNotFound": _PROFILE,
    "NoCredentialsError": _CREDENTIALS,
    "PartialCredentialsError": _CREDENTIALS,
    "EndpointConnectionError": _S3_CONNECTION,
    "ConnectTimeoutError": _S3_CONNECTION,
    "ClientConnectorError": _CONNECTION,
    "ClientConnectorDNSError": _CONNECTION,
    "ConnectError": _CONNECTION,
    "OfflineModeIsEnabled": "unset HF_HUB_OFFLINE, or give a folder or an object store",
}
# By scheme, what fsspec needs to be installed.
_PACKAGES = {
    "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs", "gcs": "gcsfs", "gs": "gcsfs", "hf": "huggingface_hub",
    "s3": "s3fs", "s3a": "s3fs", "sftp": "paramiko", "ssh": "paramiko", "webdav": "webdav4",
}  # fmt: skip
_BAD_BUCKET = re.compile(r"Invalid bucket name \"([^\"]*)\"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Translator:
    """Turns what a backend raises into one clear `StorageError`.

    Attributes:
        scheme: Of the URL.
        secrets: What no text may show.
        anonymous: Whether requests go unsigned.
    """

    scheme: str
    secrets: tuple[str, ...] = ()
    anonymous: bool = False

    @contextmanager
    def translated(self, verb: str, where: str, *, answered: bool = False) -> Iterator[None]:
        """Raise a `StorageError` for what the body raises; `MissingObject` when a read finds nothing.

        Whoever has only to correct options, environment or URL gets a `SettingsError`.

        Args:
            verb: What is tried: "open", "read", "write", "delete" or "list".
            where: The place, for the text.
            answered: The store has answered before: it is opened as it should be.
        """
        try:
            yield
        except _caught() as error:
            # The error's own text could give credentials away.
            raise self._error(verb, where, error, answered) from (None if self.secrets else error)

    def cause(self, error: BaseException) -> str:
        """Return an error in words, without credentials."""
        return redacted(cause_of(error), self.secrets)

    def _error(self, verb: str, where: str, error: BaseException, answered: bool) -> StorageError:
        code = code_of(error)
        if code == "NoSuchBucket":
            remedy = "create it, or correct the URL, the endpoint or the region"
            return StorageError(Problem(what=f"cannot {verb}: there is no such bucket", where=where, remedy=remedy))
        absent = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        if absent and verb != "write":
            return MissingObject(Problem(what="does not exist", where=where, remedy="check the path"))
        bucket = _BAD_BUCKET.search(str(error))
        cause = f"{bucket[1]!r} is no bucket's name" if bucket else self.cause(error)
        mistaken = not answered and (is_mistake(error) or isinstance(error, (*_MISTAKES, ImportError)))
        remedy = _BUCKET_NAME if bucket else self._remedy(error, code, mistaken)
        kind = SettingsError if mistaken or bucket else StorageError
        return kind(Problem(what=f"cannot {verb}: {cause}", where=where, remedy=remedy))

    def _remedy(self, error: BaseException, code: str, mistaken: bool) -> str:
        known = _BY_CODE.get(code) or _BY_NAME.get(type(error).__name__)
        if known:
            return known
        if isinstance(error, PermissionError) and self.anonymous:
            return "anonymous access is refused: leave out anon: true and give credentials"
        if isinstance(error, PermissionError):
            return "check the credentials and what they allow"
        unknown = isinstance(error, ImportError) or "Protocol not known" in str(error)
        if unknown and self.scheme in _PACKAGES:
            return f"install the package {_PACKAGES[self.scheme]}"
        if isinstance(error, RuntimeError):
            return "this kind of URL may not support it: use a folder or an object store"
        if isinstance(error, (*_MISTAKES, ImportError)):
            return "check the URL's scheme, the storage options, and that the backend's package is installed"
        if mistaken:
            return _OPTIONS
        return "check the address, the network and the credentials, then run again"


def _caught() -> tuple[type[BaseException], ...]:
    return (*backend_errors(), *_MISTAKES, ImportError)
