"""Keeping credentials out of what people read.

Owns the splitting of a URL into what may be shown and what may not. Must not know backends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote, urlsplit

_HIDDEN = "***"
# To the last @ before the path: a password may hold one, too.
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*://)[^/\s'\"]*@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*://[^\s?'\"]*)\?[^\s'\")]*")
_SECRET_OPTION = re.compile(r"secret|token|passw|key|credential|sas|sig|auth", re.IGNORECASE)
# Shorter values would blank out half of an innocent text.
_SHORTEST_SECRET = 4


def shown_url(url: str) -> str:
    """Return a URL without user, password, query and trailing slash; a path of this machine as it is."""
    if "://" not in url or url.lower().startswith("file://"):
        return url
    bare = _USER.sub(r"\1", url).partition("?")[0]
    return bare if bare.endswith("://") else bare.rstrip("/")


def bare_name(name: str) -> str:
    """Return a name that may be a URL without all that could be a credential in it, and perhaps more."""
    scheme, mark, rest = name.partition("://")
    if not mark:
        scheme, rest = "", name
    user, at, place = rest.rpartition("@")
    # Without a scheme an @ may also stand before a revision; a password has a colon before it.
    rest = place if at and (mark or ":" in user) else rest
    return scheme + mark + re.split(r"[?#]", rest, maxsplit=1)[0]


def secrets_of(url: str, options: Mapping[str, object]) -> tuple[str, ...]:
    """Return every text in a URL and in filesystem options that must not be shown, longest first."""
    # A chained URL ("simplecache::https://…") has its parts behind the last "::".
    parts = urlsplit(url.rpartition("::")[2])
    user = parts.netloc.rpartition("@")[0]
    found = {user, *user.split(":"), parts.query, *(pair.partition("=")[2] for pair in parts.query.split("&"))}
    found |= set(_secret_values(options))
    found |= {unquote(text) for text in found}
    return tuple(sorted((text for text in found if len(text) >= _SHORTEST_SECRET), key=lambda text: (-len(text), text)))


def redacted(text: str, secrets: tuple[str, ...]) -> str:
    """Return a text with the secrets, and whatever looks like credentials in a URL, blanked out."""
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


def _secret_values(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secret_values(value)
        elif isinstance(value, str) and _SECRET_OPTION.search(str(name)):
            yield value
