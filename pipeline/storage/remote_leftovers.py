"""What unfinished writers leave on a remote store: multipart uploads on S3, objects under temporary names elsewhere.

Owns finding and removing them. Must not know writers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from pipeline.storage.backend import Backend
from pipeline.storage.base import Leftover, MissingObject
from pipeline.storage.s3 import Upload

# Where backends say when an object was written.
_TIME_FIELDS = ("LastModified", "last_modified", "mtime", "updated", "created")


def temporaries(backend: Backend, paths: Iterable[str]) -> Iterator[Leftover]:
    """Yield the objects at temporary names; one whose writer has finished meanwhile is left out."""
    for path in paths:
        try:
            info = backend.attempt("list", path, partial(_info, backend, path))
        except MissingObject:
            continue
        when = next((info[field] for field in _TIME_FIELDS if info.get(field)), None)
        yield Leftover(kind="temporary", path=path, size_bytes=info.get("size"), started_s=_seconds(when))


def _info(backend: Backend, path: str, seconds: float) -> dict[str, Any]:
    info: dict[str, Any] = backend.call("info", backend.full(path), seconds=seconds)
    return info


def uploads(backend: Backend) -> tuple[Upload, ...]:
    """Return the unfinished uploads below the prefix; none where they cannot be listed, as on GCS."""
    found: tuple[Upload, ...] = ()
    bucket = backend.bucket
    if bucket is None:
        return found
    after: Mapping[str, str] = {}
    while True:
        page, after = backend.attempt("list", "", partial(bucket.uploads_page, after))
        found += page
        if not after:
            return found


def as_leftover(backend: Backend, upload: Upload) -> Leftover | None:
    """Return an upload with its size; None when its writer has finished meanwhile."""
    bucket = backend.bucket
    if bucket is None:
        return None
    path = upload.key.removeprefix(bucket.prefix)
    try:
        size_bytes = backend.attempt("list", path, partial(bucket.uploaded_bytes, upload))
    except MissingObject:
        return None
    started_s = _seconds(upload.started)
    return Leftover(kind="upload", path=path, size_bytes=size_bytes, started_s=started_s, handle=upload.upload_id)


def abort(backend: Backend, path: str, upload_id: str) -> None:
    """Forget an upload; no error when it is gone.

    Args:
        backend: One with a bucket; without one there is nothing to forget.
        path: Of the object that it was for.
        upload_id: By which the server knows it.
    """
    bucket = backend.bucket
    if bucket is not None:
        backend.attempt("delete", path, partial(bucket.abort, backend.key(path), upload_id))


def _seconds(when: object) -> float | None:
    """Return a backend's time in seconds since 1970; None when it has another form."""
    if isinstance(when, datetime):
        return when.timestamp()
    return float(when) if isinstance(when, int | float) else None
