"""What may stand in the options and in the environment of S3, as far as its libraries would notice it late or never.

Owns the types of options and the refusal of variables that no request can be made with. Must not know s3fs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from pipeline.errors import Problem

# A path to the wrong place, what is wrong there, and what to do.
_Fault = tuple[tuple[str, ...], str, str]

_TYPES: Mapping[str, tuple[type, str]] = {
    "endpoint_url": (str, "a URL such as https://storage.example"),
    "region": (str, "a region's name"),
    "profile": (str, "a profile's name"),
    "anon": (bool, "true or false"),
    "config_kwargs": (Mapping, "a mapping"),
    "client_kwargs": (Mapping, "a mapping"),
    "s3_additional_kwargs": (Mapping, "a mapping"),
}
# Which botocore takes as they are; by them requests hang, or fail as if the network did.
_TIMES = ("connect_timeout", "read_timeout")
_ENDPOINT = re.compile(r"https?://[^/\s]+(/\S*)?")
# Usual at the end of what a file or a secret of Kubernetes gives; requests with it fail as if the network did.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
# The first that is set decides.
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


def s3_faults(options: Mapping[object, object]) -> Iterator[_Fault]:
    """Yield what is wrong with the options of S3: the keys that lead there, the fact, and what to do.

    Args:
        options: By name, of any type.
    """
    for name, (kind, words) in _TYPES.items():
        value = options.get(name)
        if value is not None and (not isinstance(value, kind) or value == ""):
            yield (name,), f"is not {words}", f"write {words}"
    endpoint = options.get("endpoint_url")
    if isinstance(endpoint, str) and endpoint and not _is_endpoint(endpoint):
        yield ("endpoint_url",), "is no http or https URL", "write https://host or https://host:port"
    if options.get("anon") is True and options.get("profile") is not None:
        yield ("anon",), "anonymous access takes no profile", "leave out one of anon and profile"
    if not _is_count(options.get("max_concurrency", 1)):
        yield ("max_concurrency",), "is no whole number above 0", "write how many requests may run at a time"
    config = options.get("config_kwargs")
    if isinstance(config, Mapping):
        yield from ((("config_kwargs", *place), what, remedy) for place, what, remedy in _config_faults(config))


def environment_problems(
    options: Mapping[str, object], environment: Mapping[str, str], where: str
) -> Iterator[Problem]:
    """Yield the variables by which no request can be made; what they hold is not shown.

    Args:
        options: Of the store: what they say comes before the environment.
        environment: By name.
        where: The place, for the text.
    """
    if options.get("anon") is not True and options.get("profile") is None:
        for name in _CREDENTIALS:
            if _CONTROL.search(environment.get(name, "")):
                what = f"{name} holds a line break or another control character, which no request can carry"
                yield Problem(what=what, where=where, remedy=f"set {name} again without it")
    client = options.get("client_kwargs")
    chosen = {**(client if isinstance(client, Mapping) else {}), **options}.get("endpoint_url")
    name = next((name for name in _ENDPOINTS if environment.get(name)), "")
    if chosen is not None or not name:
        return
    if "@" in environment[name]:
        what = f"{name} has a user, which requests to S3 cannot have"
        remedy = f"leave http(s)://host:port in {name}; set {' and '.join(_CREDENTIALS[:2])} instead"
        yield Problem(what=what, where=where, remedy=remedy)
    elif not _is_endpoint(environment[name]):
        remedy = f"write https://host or https://host:port into {name}"
        yield Problem(what=f"{name} is no http or https URL", where=where, remedy=remedy)


def _config_faults(config: Mapping[object, object]) -> Iterator[_Fault]:
    for name in _TIMES:
        if not _is_time(config.get(name, 1)):
            yield (name,), "is no number of seconds above 0", "write a number"
    if not _is_count(config.get("max_pool_connections", 1)):
        yield ("max_pool_connections",), "is no whole number above 0", "write how many may be open at a time"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_endpoint(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    return _ENDPOINT.fullmatch(text) is not None and bool(parts.hostname) and port != 0
