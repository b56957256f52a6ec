r"""How a model is written: the path or URL of a folder, or a base and an adapter joined by a plus sign.

Owns the notation "base+adapter" with its escape, the comparison of two spellings, and what of a reference may be shown.
Refuses nothing but what cannot be split, and asks no file system: values.py says what a recipe may contain.

A plus sign that belongs to a path is written "\+". Only backslashes in front of a plus sign count: each pair of them is
one backslash, and one that is left over makes the plus sign part of the path. So every pair of paths has one text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

_PLUS = re.compile(r"(\\*)\+")
_USER = re.compile(r"://[^/]*@")


def halves_of(model: str) -> list[str]:
    """Return the paths between the plus signs that separate; two at most in a model that can be read.

    Args:
        model: A model as written in the recipe.

    Returns:
        At least one text, without escapes, perhaps empty.
    """
    halves, end = [""], 0
    for found in _PLUS.finditer(model):
        pairs, left_over = divmod(len(found[1]), 2)
        halves[-1] += model[end : found.start()] + "\\" * pairs
        if left_over:
            halves[-1] += "+"
        else:
            halves.append("")
        end = found.end()
    halves[-1] += model[end:]
    return halves


def split_model(model: str) -> tuple[str, str | None]:
    """Return the paths that a model's text stands for.

    Args:
        model: A model as a parsed recipe has it.

    Returns:
        The path of the folder, and that of the adapter on top of it or None; both as storage takes them.

    Raises:
        ValueError: The text holds more than one separating plus sign, which no parsed recipe does.
    """
    halves = halves_of(model)
    if len(halves) > 2:
        raise ValueError(f"more than one adapter: {shown(model)}")
    return halves[0], halves[1] if len(halves) == 2 else None


def join_model(path: str, adapter: str | None = None) -> str:
    """Return the text that `split_model` takes apart again.

    Args:
        path: Path or URL of a folder, taken literally.
        adapter: The same of an adapter on top of it.

    Returns:
        The model as a recipe writes it.
    """
    return _join([path] if adapter is None else [path, adapter])


def _join(halves: Sequence[str]) -> str:
    escaped = [_PLUS.sub(r"\1\1\\+", half) for half in halves]
    # Backslashes that now stand in front of a separating plus sign.
    first = [re.sub(r"(\\+)\Z", r"\1\1", half) for half in escaped[:-1]]
    return "+".join([*first, escaped[-1]])


def model_key(model: str) -> str:
    """Return what two spellings of one model have in common: "./a/+b" and "a+./b" give "a+b".

    Args:
        model: A model as written in the recipe.

    Returns:
        A text to compare by; no file system is asked.
    """
    return _join([path.rstrip("/") if "://" in path else posixpath.normpath(path) for path in halves_of(model)])


def without_credentials(model: str) -> str:
    """Return a model with each URL in it bare of user, password and query; plain paths as they are.

    Args:
        model: A model as a parsed recipe has it.

    Returns:
        A text in the same notation.
    """
    return _join([shown(path) for path in halves_of(model)])


def shown(text: str) -> str:
    """Return any text without what could be credentials in it, whatever its plus signs mean.

    Args:
        text: A path, a URL, or anything else that stands in a recipe.

    Returns:
        The text, cut at the query and without users and passwords if there is a URL in it.
    """
    return _USER.sub("://", text.partition("?")[0]) if "://" in text else text
