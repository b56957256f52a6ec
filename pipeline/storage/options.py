"""How stores are opened: options by scheme or URL prefix.

Owns the choice of the options that hold for a URL, what may stand in them, and the refusal of credentials. Must not
know backends, nor what they make of an option.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.storage.s3_options import s3_faults
from pipeline.storage.urls import UrlError, checked_url

# A path to the wrong place, what is wrong there, and what to do.
_Fault = tuple[tuple[str, ...], str, str]

_SCHEME = re.compile(r"[a-z][a-z0-9+.\-]*")
_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)
# Parts of names: "aws_secret_access_key", "sasToken", "SSEKMSKeyId".
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")
_CREDENTIAL_WORDS = frozenset(
    {
        *("auth", "authorization", "bearer", "cookie", "cookies", "cred", "creds", "jwt", "key", "keys", "login"),
        *("pass", "pwd", "sas", "signature", "user", "username", "userpwd"),
        # Whole mappings of texts in which credentials are usual.
        *("headers", "proxies"),
    }
)
# Long enough to be meant wherever they stand in a name.
_CREDENTIAL_PARTS = (
    *("accesskey", "apikey", "connectionstring", "connstr", "credential", "passphrase", "passw", "secret", "token"),
)
# Values that are credentials whatever they are called: "user:password@host", "Bearer abc".
_USER_VALUE = re.compile(r"[^\s:@]*:\S*@")
_SCHEME_VALUE = re.compile(r"\s*(basic|bearer)\s", re.IGNORECASE)
# Names of public things that sound like credentials.
_HARMLESS = frozenset({"SSEKMSKeyId", "BucketKeyEnabled", "signature_version"})
_NO_CREDENTIALS = "use environment variables, a profile or the instance's role"
# What fsspec's filesystems take from programs, and cannot be written in a recipe.
_OF_PROGRAMS = frozenset({"asynchronous", "loop", "session"})


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """Options of filesystems, as a recipe's storage block has them.

    Attributes:
        by_prefix: By scheme ("s3") or URL prefix ("s3://bucket/prefix"), what the filesystem takes.
    """

    by_prefix: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def of(self, url: str) -> dict[str, object]:
        """Return the options of the longest key that holds for a URL; none for a folder.

        Args:
            url: A folder or URL; a prefix holds for it when it ends where a part of the URL's path does.
        """
        match = _PREFIX.match(url)
        if match is None:
            return {}
        bare = f"{match[1].lower()}://{match[2]}".partition("?")[0].rstrip("/") + "/"
        holding = [key for key in self.by_prefix if bare.startswith(_canonical(key))]
        if not holding:
            return {}
        best = max(holding, key=lambda key: len(_canonical(key)))
        return {name: copy.deepcopy(value) for name, value in self.by_prefix[best].items()}

    def to_json(self) -> dict[str, dict[str, object]]:
        """Return the options as JSON values; `StorageOptions` takes them back."""
        plain = {key: dict(options) for key, options in self.by_prefix.items()}
        result: dict[str, dict[str, object]] = json.loads(json.dumps(plain))
        return result


NO_OPTIONS = StorageOptions()


def check_storage_options(raw: object) -> Iterator[_Fault]:
    """Yield what is wrong with a storage block: the keys that lead there, the fact, and what to do.

    Args:
        raw: What a recipe has for it, of any type.
    """
    if not isinstance(raw, Mapping):
        yield (), "is no mapping", "write the scheme or URL prefix, and below it the options"
        return
    for key, options in raw.items():
        faults = tuple(_key_faults(key))
        yield from faults
        if faults:
            continue
        if not isinstance(options, Mapping):
            yield (key,), "is no mapping", "write options below it, such as endpoint_url: ..."
            continue
        yield from _option_faults((key,), options)
        for name in sorted(_OF_PROGRAMS & options.keys()):
            yield (key, name), "is for programs, and has no meaning in a recipe", "leave it out"
        if key.partition(":")[0].lower() in ("s3", "s3a"):
            yield from (((key, *place), what, remedy) for place, what, remedy in s3_faults(options))


def _canonical(key: str) -> str:
    """Return a key in the form by which a URL begins: "s3://" or "s3://bucket/prefix/"."""
    scheme, mark, rest = key.partition("://")
    rest = rest.strip("/") if mark else ""
    return f"{scheme.lower()}://{rest}/" if rest else f"{scheme.lower()}://"


def _key_faults(key: object) -> Iterator[_Fault]:
    match = _PREFIX.fullmatch(key) if isinstance(key, str) else None
    # What follows may be a credential and is not shown.
    place = (str(key).partition("?")[0],)
    if match is not None and "@" in match[2].partition("/")[0]:
        yield (f"{match[1]}://...",), "may hold a credential: it is a URL with a user", _NO_CREDENTIALS
    elif key == "":
        yield ("''",), "is neither a scheme nor a URL prefix", "write s3 or s3://bucket/prefix"
    elif match is None and not (isinstance(key, str) and _SCHEME.fullmatch(key)):
        yield place, "is neither a scheme nor a URL prefix", "write s3 or s3://bucket/prefix"
    elif str(key).partition(":")[0].lower() in ("file", "local"):
        yield place, "options have no meaning for folders", "leave it out"
    elif match is not None and "?" in match[2]:
        yield place, "a query has no meaning here", "leave out '?...'"
    elif match is not None and match[2]:
        try:
            checked_url(str(key))
        except UrlError as error:
            # No URL that this could hold for is ever opened.
            yield from (((problem.where,), problem.what, problem.remedy) for problem in error.problems)


def _option_faults(place: tuple[str, ...], options: Mapping[object, object]) -> Iterator[_Fault]:
    for name, value in options.items():
        here = (*place, str(name))
        if not isinstance(name, str):
            yield here, "is no name of an option", "write a name"
        elif _sounds_like_a_credential(name):
            yield here, "may be a credential, which no recipe and no plan may hold", _NO_CREDENTIALS
        else:
            yield from _value_faults(here, value)


def _value_faults(place: tuple[str, ...], value: object) -> Iterator[_Fault]:
    if isinstance(value, Mapping):
        yield from _option_faults(place, value)
    elif isinstance(value, list | tuple):
        for number, element in enumerate(value):
            yield from _value_faults((*place, str(number)), element)
    elif isinstance(value, str):
        match = _PREFIX.match(value)
        if match is not None and ("@" in match[2].partition("/")[0] or "?" in match[2]):
            yield place, "may hold a credential: it is a URL with a user or a query", _NO_CREDENTIALS
        elif _USER_VALUE.search(match[2] if match else value) or _SCHEME_VALUE.match(value):
            yield place, "may be a credential, which no recipe and no plan may hold", _NO_CREDENTIALS
    elif value is not None and not isinstance(value, bool | int | float):
        yield place, f"is a {type(value).__name__}", "write text, a number, true, false, a list or a mapping"


def _sounds_like_a_credential(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    whole = "".join(words)
    sounds = not _CREDENTIAL_WORDS.isdisjoint(words) or any(part in whole for part in _CREDENTIAL_PARTS)
    return sounds and name not in _HARMLESS
