"""From a URL to the store that serves it, and from its folder to its objects.

Owns the choice between local and remote, and where an object's folder ends. Must not load fsspec for a local path.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

from pipeline.storage.base import Store
from pipeline.storage.local import LocalStore
from pipeline.storage.urls import checked_url, file_path

_HTTP = re.compile(r"https?://", re.IGNORECASE)


def open_store(url: str, options: Mapping[str, object] | None = None) -> Store:
    """Return the store of a URL prefix; nothing is read yet.

    Args:
        url: A folder ("path", "~/x", "file:///x") or any fsspec URL ("s3://bucket/prefix").
        options: What fsspec's filesystem takes beside the URL, `region` for S3 too; without meaning for a folder.

    Raises:
        UrlError: The URL cannot mean a place.
        StorageError: Its scheme is unknown, or the backend's package is not installed.
    """
    url = checked_url(url)
    path = file_path(url)
    if path is not None:
        return LocalStore(path)
    # Imported here: fsspec and its backends take long to load and a local run needs none of it.
    from pipeline.storage.remote import FsspecStore

    return FsspecStore(url, options or {})


def split_url(url: str) -> tuple[str, str]:
    """Return folder and name of an object; the query of an HTTP URL stays with the folder, as `open_store` takes it.

    Raises:
        UrlError: The URL cannot mean a place; cutting it would hide that.
    """
    base, query = _query_apart(checked_url(url))
    folder, name = posixpath.split(base)
    return (folder or ".") + query, name


def join_url(folder: str, name: str) -> str:
    """Return the URL of an object or folder in a folder; the query of an HTTP URL stays behind it."""
    base, query = _query_apart(folder)
    return posixpath.join(base, name) + query


def _query_apart(url: str) -> tuple[str, str]:
    """Return what comes before "?" and the rest; elsewhere than on HTTP a question mark is part of a name."""
    base, mark, query = url.partition("?") if _HTTP.match(url) else (url, "", "")
    return base, mark + query
