"""What a URL of a folder may look like, and which URLs are one place.

Owns the refusal of URLs that no store would take as their writer means them, before anything is asked, and the aliases
of schemes. Shows no credential. Must not know backends, nor open anything.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import Problem, RecipeError

# Schemes of one place: fsspec takes each pair to the same filesystem.
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "local": "file"}
_HTTP = frozenset({"http", "https"})
_FILE = frozenset({"file", "local"})
# What stands behind "://" is a bucket or container, and all below is a flat list of keys.
_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"})
# Whose single slash is a typing mistake; any other word before a colon may be a folder's name.
_KNOWN = "|".join(sorted(_BUCKETS | _HTTP | _FILE | {"memory", "hf"}))
_TYPO = re.compile(rf"\s*({_KNOWN}):(?:/(?!/)|\Z)", re.IGNORECASE)
# "s3://", and fsspec's chains such as "simplecache::s3://".
_SCHEME = re.compile(r"(\s*)([A-Za-z][A-Za-z0-9+.\-]*)(::|://)")
_ENVIRONMENT = "credentials belong in the environment"


class UrlError(RecipeError):
    """A URL cannot mean a place: the user's mistake, which no repetition mends."""


def checked_url(url: str, *, user: bool = True) -> str:
    """Return a URL with its scheme in lower case; a path of this machine as it is.

    Args:
        url: Of a folder or an object.
        user: Whether a web server's may hold a user; what plans keep of a URL has none.

    Raises:
        UrlError: It is empty, has a user, no bucket, empty, "." or ".." parts, or is a chain of filesystems.
    """
    if not url.strip():
        raise UrlError(Problem(what="the URL is empty", remedy="give a folder or a URL such as s3://bucket/prefix"))
    typo = _TYPO.match(url)
    if typo is not None:
        remedy = f"write {typo[1].lower()}://..., or ./{typo[1]}:... for a folder of that name"
        raise _error("has not two slashes behind its scheme", f"{typo[1]}:...", remedy)
    found = _SCHEME.match(url)
    if found is None:
        return url
    if found[1]:
        raise _error("begins with a blank", _without_user(url.strip()), "leave it out")
    scheme, rest = found[2].lower(), url[found.end() :]
    if scheme in _FILE and found[3] == "://":
        return f"{scheme}://{rest}"
    if "::" in url.partition("?")[0]:
        what = "joins filesystems by '::', which is not supported"
        raise _error(what, f"{scheme}...", "name the store itself; write ./ before a folder of that name")
    host = rest.partition("?")[0].partition("/")[0]
    if scheme not in _HTTP:
        _check_rest(scheme, rest)
    elif not host.rpartition("@")[2]:
        raise _error("names no host", f"{scheme}://...", f"write {scheme}://host/path")
    elif "@" in host and not user:
        raise _error("a user has no meaning here", _without_user(f"{scheme}://{rest}"), "use an object store or a copy")
    return f"{scheme}://{rest}"


def file_path(url: str) -> Path | None:
    """Return the path that a checked URL of this machine means; None for a store's.

    Args:
        url: As `checked_url` returns it.

    Raises:
        UrlError: A file: or local: URL names a host or no folder, or "~" somebody who is not known here.
    """
    scheme, mark, rest = url.partition("://")
    if not mark or _SCHEME.match(url) is None:
        try:
            return Path(url).expanduser()
        except RuntimeError as error:
            raise _error("has no home folder to begin in", url, "write the folder's whole path") from error
    if scheme not in _FILE:
        return None
    parts = urlsplit(f"file://{rest}".replace("?", "%3F").replace("#", "%23"))
    if parts.netloc not in ("", "localhost"):
        where = _without_user(url)
        host = parts.netloc.rpartition("@")[2]
        raise _error(f"names the host {host!r}", where, f"write {scheme}:///absolute/path")
    # fsspec, whose word "local" is, knows no escapes.
    path = unquote(parts.path) if scheme == "file" else rest.removeprefix("localhost")
    if not path:
        raise _error("names no folder", url, f"write {scheme}:///absolute/path")
    return Path(path)


def place_of(url: str) -> str:
    """Return what all spellings of one place have in common, with one slash at its end.

    Args:
        url: Of a folder. Links and spellings of a local one are resolved on this machine.

    Raises:
        UrlError: As `checked_url` and `file_path`.
    """
    url = checked_url(url)
    path = file_path(url)
    if path is not None:
        return os.path.realpath(path).rstrip("/") + "/"
    scheme, _, rest = url.partition("?")[0].partition("://")
    host, _, below = rest.strip("/").partition("/")
    if scheme in _HTTP:
        host = host.rpartition("@")[2].lower()
    return f"{_ALIASES.get(scheme, scheme)}://{host}/{below}".rstrip("/") + "/"


def is_writable(url: str) -> bool:
    """Return whether a scheme can be written at all."""
    return url.partition("://")[0].lower() not in _HTTP


def _check_rest(scheme: str, rest: str) -> None:
    """Raise for what cannot stand behind the scheme of an object store."""
    base, query, _ = rest.partition("?")
    host, _, path = base.partition("/")
    where = _without_user(f"{scheme}://{rest}")
    if "@" in host:
        remedy = f"leave it out; {_ENVIRONMENT}"
        if scheme in ("abfs", "abfss"):
            remedy = "write az://container/path; the account and its credentials belong in the environment"
        raise _error("a user has no meaning here", where, remedy)
    if scheme in _BUCKETS and not host:
        raise _error("names no bucket", where, f"write {scheme}://bucket/prefix")
    if scheme in _BUCKETS and ":" in host and not host.startswith("arn:"):
        # Perhaps a password with a slash in it.
        raise _error("has a colon in the bucket's name", f"{scheme}://...", f"write {scheme}://bucket/prefix")
    if query:
        raise _error("a query has no meaning here", where, "leave out '?...'")
    parts = path.removesuffix("/").split("/") if path else []
    if any(part in ("", ".", "..") for part in parts) or host in (".", ".."):
        remedy = "write it with single slashes, without '.' and '..'"
        raise _error("has an empty, '.' or '..' part in its path", where, remedy)


def _without_user(url: str) -> str:
    """Return a URL to show: without user and query, and without its rest where that may hold a password, too."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    place = host.rpartition("@")[2] + slash + path
    # What stands before an @ that is left may be a password with a slash or a question mark in it.
    hidden = "@" in place or (not host and ":" in place)
    return f"{scheme}://..." if hidden else f"{scheme}://{place.partition('?')[0]}"


def _error(what: str, where: str, remedy: str) -> UrlError:
    return UrlError(Problem(what=what, where=where, remedy=remedy))
