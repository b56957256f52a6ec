"""From a URL to the store that serves it, and from its folder to its objects.

Owns the choice between local and remote, and where an object's folder ends. Must not load fsspec for a local path.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import Problem, StorageError
from pipeline.storage.base import Store
from pipeline.storage.local import LocalStore

# "s3://", and fsspec's chains such as "simplecache::s3://".
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(::|://)")

_HTTP = re.compile(r"https?://", re.IGNORECASE)


def open_store(url: str, options: Mapping[str, object] | None = None) -> Store:
    """Return the store of a URL prefix; nothing is read yet.

    Args:
        url: A folder ("path", "~/x", "file:///x") or any fsspec URL ("s3://bucket/prefix").
        options: What fsspec's filesystem takes beside the URL, `region` for S3 too; without meaning for a folder.

    Raises:
        StorageError: The URL is empty, its scheme unknown, or the backend's package is not installed.
    """
    if not url.strip():
        raise StorageError(Problem(what="the URL is empty", remedy="give a folder or a URL such as s3://bucket/prefix"))
    scheme = _SCHEME.match(url)
    if scheme is None:
        return LocalStore(Path(url).expanduser())
    if scheme[1].lower() == "file" and scheme[2] == "://":
        return LocalStore(_file_path(url))
    # Imported here: fsspec and its backends take long to load and a local run needs none of it.
    from pipeline.storage.remote import FsspecStore

    return FsspecStore(url, options or {})


def split_url(url: str) -> tuple[str, str]:
    """Return folder and name of an object; the query of an HTTP URL stays with the folder, as `open_store` takes it."""
    base, query = _query_apart(url)
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


def _file_path(url: str) -> Path:
    """Return the path of a file: URL, which may name this host only."""
    parts = urlsplit(url.replace("?", "%3F").replace("#", "%23"))
    if parts.netloc not in ("", "localhost"):
        problem = Problem(what=f"names the host {parts.netloc!r}", where=url, remedy="write file:///absolute/path")
        raise StorageError(problem)
    return Path(unquote(parts.path))
