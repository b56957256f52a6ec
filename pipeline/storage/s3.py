"""What S3 can do beyond fsspec's interface.

Owns the settings of s3fs, conditional writes, unfinished uploads, signed URLs, and the counting of its requests. Must
not import s3fs or know about retries: it is handed a filesystem, and each request the seconds it may take.
"""

from __future__ import annotations

import ssl
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from pipeline.storage.counting import count
from pipeline.storage.direct import SIGNED_S
from pipeline.storage.http_ranges import Patience
from pipeline.storage.retrying import code_of

# s3fs's own defaults hang for minutes on a dead connection.
_S3_CONFIG: Mapping[str, object] = {
    "connect_timeout": 5,
    "read_timeout": 30,
    "retries": {"max_attempts": 2, "mode": "standard"},
    "max_pool_connections": 64,
}
# One try: botocore's three and ours are enough layers, and these are the ones that count.
_S3FS_TRIES = 1
# How servers say that an object exists already.
_EXISTS = frozenset({"PreconditionFailed", "412"})
# How servers say that they have no such operation.
_UNKNOWN = frozenset({"NotImplemented", "MethodNotAllowed", "501", "405"})
# And that they do not take a condition, some by refusing the whole request; then the same is asked without it.
_UNCONDITIONAL = _UNKNOWN | {"InvalidArgument", "InvalidRequest", "NotSupported", "UnsupportedOperation"}
# What servers list at once at most.
_PAGE_UPLOADS = 1000
# By this a writer whose reply was lost knows its object again.
_MARK = "geomerge-writer"
_register = threading.Lock()
# Headers of requests that write; any other that an option adds to requests, a signed URL would lack.
_OF_WRITES = frozenset({"ACL", "Metadata", "SSEKMSKeyId", "ServerSideEncryption", "StorageClass", "Tagging"})
# Ways to a server that only botocore goes.
_BY_OTHERS = frozenset({"client_cert", "proxies", "proxies_config"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """An unfinished multipart upload.

    Attributes:
        key: Of the object, in the bucket.
        upload_id: By which the server knows it.
        started: When it began.
    """

    key: str
    upload_id: str
    started: datetime | None


def s3_settings(options: Mapping[str, object]) -> dict[str, object]:
    """Return the options for s3fs: our defaults below them, `region` where botocore expects it.

    Args:
        options: What s3fs takes, and `region`.
    """
    rest = dict(options)
    region, config, client = rest.pop("region", None), rest.get("config_kwargs"), rest.get("client_kwargs")
    # Listings change under other workers.
    settings: dict[str, object] = {"use_listings_cache": False, **rest}
    settings["config_kwargs"] = {**_S3_CONFIG, **(config if isinstance(config, Mapping) else {})}
    if region is not None:
        settings["client_kwargs"] = {"region_name": region, **(client if isinstance(client, Mapping) else {})}
    return settings


class S3Bucket:
    """The part of a bucket below a prefix, by S3's own requests.

    Args:
        fs: s3fs's filesystem.
        root: Bucket and prefix.
    """

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        fs.retries = _S3FS_TRIES
        self.name, prefix, _ = fs.split_path(root)
        self.prefix = f"{prefix}/" if prefix else ""
        self._watched: object = None
        self._conditions = True

    def watch(self) -> None:
        """Connect if need be, and count every request that goes out from now on, botocore's repetitions included."""
        client = self._fs.s3
        if client is not self._watched:
            with _register:
                # Stores that share the client register the same name once; what botocore registered later may raise.
                client.meta.events.register_first("needs-retry.s3", _count_request, unique_id="geomerge-counters")
                client.meta.events.register_first("choose-signer.s3", _newest_signature, unique_id="geomerge-signer")
            self._watched = client

    def call(self, verb: str, seconds: float, **arguments: object) -> Any:
        """Send one request about this bucket, in at most so many seconds."""
        self.watch()
        return self._fs.call_s3(verb, timeout=seconds, Bucket=self.name, **arguments)

    def signed_url(self, full: str, seconds: float) -> str | None:
        """See `direct.Signer`: None where options or the environment ask for more than a plain request."""
        fs = self._fs
        added = {**fs.req_kw, **fs.s3_additional_kwargs}.keys() - _OF_WRITES
        if added or _BY_OTHERS & fs.config_kwargs.keys() or fs.client_kwargs.get("verify") is False:
            return None
        self.watch()
        url = str(fs.url(full, expires=SIGNED_S, timeout=seconds))
        parts = urlsplit(url)
        proxied = {parts.scheme, "all"} & urllib.request.getproxies().keys()
        return None if proxied and not urllib.request.proxy_bypass(parts.netloc) else url

    def patience(self) -> Patience:
        """See `direct.Signer`."""
        config = self._fs.s3.meta.config
        return Patience(connect_s=float(config.connect_timeout), read_s=float(config.read_timeout))

    def tls(self) -> ssl.SSLContext:
        """See `direct.Signer`: certificates as AWS_CA_BUNDLE, the profile or the options name them, or the system."""
        named = self._fs.client_kwargs.get("verify") or self._fs.session.get_config_variable("ca_bundle")
        return ssl.create_default_context(cafile=named if isinstance(named, str) else None)

    def marked(self, token: str) -> dict[str, str]:
        """Return the metadata of an object that only the writer with this token puts."""
        extra = getattr(self._fs, "s3_additional_kwargs", {}).get("Metadata") or {}
        return {**extra, _MARK: token}

    def is_marked(self, key: str, token: str, seconds: float) -> bool:
        """Return whether the object that is there now was put with this token."""
        try:
            reply = self.call("head_object", seconds, Key=key)
        except FileNotFoundError:
            return False
        return bool(reply.get("Metadata", {}).get(_MARK) == token)

    def create(self, key: str, data: bytes, token: str, seconds: float) -> bool:
        """Put an object unless there is one; a repetition after a lost reply finds its own and is True.

        On a server that refuses the condition it is put in any case: the caller has looked before.
        """
        metadata = self.marked(token)
        if self._conditions:
            try:
                self.call("put_object", seconds, Key=key, Body=data, IfNoneMatch="*", Metadata=metadata)
            except OSError as error:
                if code_of(error) in _EXISTS:
                    return self.is_marked(key, token, seconds)
                if code_of(error) not in _UNCONDITIONAL:
                    raise
                self._conditions = False
            else:
                return True
        self.call("put_object", seconds, Key=key, Body=data, Metadata=metadata)
        return True

    def uploads_page(self, after: Mapping[str, str], seconds: float) -> tuple[tuple[Upload, ...], Mapping[str, str]]:
        """Return some unfinished uploads below the prefix and where the next page begins, which is {} for the last one.

        Args:
            after: Where this page begins: {} for the first.
            seconds: The time limit.
        """
        try:
            reply = self.call("list_multipart_uploads", seconds, Prefix=self.prefix, MaxUploads=_PAGE_UPLOADS, **after)
        except OSError as error:
            if code_of(error) not in _UNKNOWN:
                raise
            return (), {}
        found = tuple(
            Upload(key=entry["Key"], upload_id=entry["UploadId"], started=entry.get("Initiated"))
            for entry in reply.get("Uploads") or ()
        )
        # Only what the server names: SeaweedFS counts by ids alone and takes a key for a filter.
        markers = (("KeyMarker", "NextKeyMarker"), ("UploadIdMarker", "NextUploadIdMarker"))
        following = {name: reply[source] for name, source in markers if reply.get(source)}
        return found, following if reply.get("IsTruncated") and following != after else {}

    def uploaded_bytes(self, upload: Upload, seconds: float) -> int | None:
        """Return the size of the parts that an upload has; None when that may not be asked.

        Raises:
            FileNotFoundError: The upload is gone.
        """
        try:
            return sum(int(part["Size"]) for part in self._parts(upload, seconds))
        except PermissionError:
            # A permission of its own, which those who list and abort need not have.
            return None

    def _parts(self, upload: Upload, seconds: float) -> Iterator[Mapping[str, Any]]:
        marker: dict[str, object] = {}
        while True:
            reply = self.call("list_parts", seconds, Key=upload.key, UploadId=upload.upload_id, **marker)
            parts = reply.get("Parts") or ()
            yield from parts
            if not reply.get("IsTruncated") or not parts:
                return
            marker = {"PartNumberMarker": parts[-1]["PartNumber"]}

    def abort(self, key: str, upload_id: str, seconds: float) -> None:
        """Forget an unfinished upload; no error when it is gone."""
        try:
            self.call("abort_multipart_upload", seconds, Key=key, UploadId=upload_id)
        except FileNotFoundError:
            return


def _count_request(attempts: int, **_: object) -> None:
    """Count what botocore has sent; it asks after every request whether to repeat it."""
    count(requests=1, retries=int(attempts > 1))


def _newest_signature(signature_version: object, **_: object) -> str | None:
    """Keep botocore from signing URLs by the second version, which it takes by habit and newer buckets refuse."""
    return "s3v4-query" if signature_version in ("v4-query", "s3v4-query") else None
