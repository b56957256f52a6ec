"""From a URL to the store that serves it, and what of a URL may be shown.

Owns the choice between local and remote, and the stripping of credentials. Must not load fsspec for a local path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import Problem, StorageError
from pipeline.storage.base import Store
from pipeline.storage.local import LocalStore

# "s3://", and fsspec's chains such as "simplecache::s3://".
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(::|://)")


def open_store(url: str, options: Mapping[str, object] | None = None) -> Store:
    """Return the store of a URL prefix; nothing is read yet.

    Args:
        url: A folder ("path", "~/x", "file:///x") or any fsspec URL ("s3://bucket/prefix").
        options: What fsspec's filesystem takes beside the URL; without meaning for a folder.

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


def _file_path(url: str) -> Path:
    """Return the path of a file: URL, which may name this host only."""
    parts = urlsplit(url.replace("?", "%3F").replace("#", "%23"))
    if parts.netloc not in ("", "localhost"):
        problem = Problem(what=f"names the host {parts.netloc!r}", where=url, remedy="write file:///absolute/path")
        raise StorageError(problem)
    return Path(unquote(parts.path))
