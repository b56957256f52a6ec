"""JSON from files that may be damaged or hostile.

Owns turning bytes into an object or a `CheckpointError`. Must not know what the object means.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from pipeline.errors import CheckpointError, Problem

REMEDY = "fetch the file again from a source you trust"
# 64 bits have 20 decimal digits; longer numbers only cost time.
_LONGEST_INTEGER = 20
# Longer than any sensible tensor name or shape, short enough to read.
_LONGEST_QUOTE = 160


def refusal(where: str, what: str, remedy: str = REMEDY) -> CheckpointError:
    """Return the error for a file that breaks a rule of its format."""
    return CheckpointError(Problem(what=what, where=where, remedy=remedy))


def short(found: object) -> str:
    """Return a value as text of bounded length: it comes from a file."""
    text = repr(found)
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."


def parse_object(raw: bytes, where: str, *, strict: bool) -> dict[str, Any]:
    """Return the JSON object in a file's bytes.

    Args:
        raw: UTF-8 text.
        where: The file, for messages.
        strict: Refuse what two readers could understand differently: repeated keys, NaN and Infinity, negative and
            overlong integers, lone surrogates. Headers and indices are strict, configuration files are not.

    Raises:
        CheckpointError: The bytes are no such object.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(where, f"is not UTF-8 text: byte {error.start} is wrong") from error

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            twice = Counter(name for name, _ in items).most_common(1)[0][0]
            raise refusal(where, f"has the key {short(twice)} twice in one object")
        return found

    def constant(name: str) -> float:
        raise refusal(where, f"contains {name}, which is no JSON")

    def integer(digits: str) -> int:
        if digits.startswith("-") or len(digits) > _LONGEST_INTEGER:
            raise refusal(where, f"contains {digits[: _LONGEST_INTEGER + 1]!r}, which is no size or offset")
        return int(digits)

    hooks: dict[str, Any] = {"object_pairs_hook": pairs, "parse_constant": constant, "parse_int": integer}
    try:
        found = json.loads(text, **(hooks if strict else {}))
    except RecursionError as error:
        raise refusal(where, "is JSON nested too deeply") from error
    except ValueError as error:
        raise refusal(where, f"is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise refusal(where, f"must be a JSON object, is {type(found).__name__}")
    return found


def is_plain_text(text: object) -> bool:
    """Return whether this is a string that UTF-8 can write: JSON's escapes can spell lone surrogates."""
    if not isinstance(text, str):
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
