"""Single values of a recipe: numbers, switches, words, sizes, data types and models.

Owns what each value may look like and why others are refused; knows neither lines nor keys. The notation of models is
references.py's, whose functions are offered here too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from pipeline.recipe.findings import nearest
from pipeline.recipe.references import halves_of, join_model, model_key, shown, split_model, without_credentials
from pipeline.units import parse_bytes

__all__ = [
    "DTYPES",
    "NUMBER_PATTERN",
    "RefusalError",
    "describe",
    "join_model",
    "model_key",
    "read_boolean",
    "read_count",
    "read_dtype",
    "read_model",
    "read_number",
    "read_size",
    "read_word",
    "split_model",
    "without_credentials",
]

DTYPES = ("float16", "bfloat16", "float32", "float64")
# What mergekit's users write by habit, and other libraries accept.
_DTYPE_NICKNAMES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
# Text that counts as a number: YAML 1.1 reads 1e-5, without a dot, as text.
NUMBER_PATTERN = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
# Long values are cut in messages.
_SHOWN_CHARACTERS = 80


class RefusalError(ValueError):
    """A value that cannot be used, and what to write instead.

    Args:
        what: The fact, as the end of a sentence that begins with the key.
        remedy: What to do.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy


def describe(raw: object) -> str:
    """Return a value as it is quoted in messages: short, and without credentials."""
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if raw is None:
        return "nothing"
    if isinstance(raw, (list, tuple)):
        return "a list"
    if isinstance(raw, dict):
        return "a mapping"
    text = shown(raw) if isinstance(raw, str) else str(raw)
    short = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
    return f'"{short}"' if isinstance(raw, str) else short


def read_number(raw: object) -> float:
    """Return a finite number; text such as "1e-5" counts as one, true and false do not.

    Args:
        raw: A YAML value.

    Returns:
        The number.

    Raises:
        RefusalError: It is no number, or is not finite.
    """
    if isinstance(raw, str) and re.fullmatch(NUMBER_PATTERN, raw.strip()):
        number = float(raw)
    elif isinstance(raw, (int, float)) and not isinstance(raw, bool):
        try:
            number = float(raw)
        except OverflowError:
            number = math.inf
    else:
        raise RefusalError(f"must be a number, not {describe(raw)}")
    if not math.isfinite(number):
        raise RefusalError(f"must be a finite number, not {describe(raw)}")
    return number


def read_boolean(raw: object) -> bool:
    """Return a switch; 0 and 1 count as one, as in mergekit.

    Args:
        raw: A YAML value.

    Returns:
        The switch.

    Raises:
        RefusalError: It is neither true nor false.
    """
    if isinstance(raw, (bool, int, float)) and raw in (0, 1):
        return bool(raw)
    raise RefusalError(f"must be true or false, not {describe(raw)}")


def read_word(raw: object, allowed: Sequence[str]) -> str:
    """Return one of the allowed words.

    Args:
        raw: A YAML value.
        allowed: The words.

    Returns:
        The word.

    Raises:
        RefusalError: It is another; the nearest is named.
    """
    if not isinstance(raw, str):
        raise RefusalError(f"must be one of {', '.join(allowed)}, not {describe(raw)}")
    if raw not in allowed:
        raise RefusalError(f"must be one of {', '.join(allowed)}, not {describe(raw)}", nearest(raw, allowed))
    return raw


def read_dtype(raw: object) -> str:
    """Return a data type's name; the prefix "torch." is dropped.

    Args:
        raw: A YAML value.

    Returns:
        One of `DTYPES`.

    Raises:
        RefusalError: It is another; the nearest is named.
    """
    if isinstance(raw, str):
        name = raw.removeprefix("torch.")
        if name in _DTYPE_NICKNAMES:
            what = f"must be one of {', '.join(DTYPES)}, not {describe(raw)}"
            raise RefusalError(what, f"did you mean `{_DTYPE_NICKNAMES[name]}`?")
        if name in DTYPES:
            return name
    return read_word(raw, DTYPES)


def read_size(raw: object) -> int:
    """Return a byte count.

    Args:
        raw: An integer, or text such as "5GB".

    Returns:
        Bytes, greater than zero.

    Raises:
        RefusalError: It is no size.
    """
    if not isinstance(raw, (int, str)) or isinstance(raw, bool):
        raise RefusalError(f"must be a size, not {describe(raw)}", "write for example 4GB, 512MiB or 1000000")
    try:
        return parse_bytes(raw)
    except (ValueError, OverflowError) as error:
        raise RefusalError(
            f"must be a size, not {describe(raw)}", "write for example 4GB, 512MiB or 1000000"
        ) from error


def read_count(raw: object) -> int:
    """Return a whole number of things.

    Args:
        raw: A YAML value.

    Returns:
        The number, greater than zero.

    Raises:
        RefusalError: It is something else; 8.0 and "8" are too.
    """
    if not isinstance(raw, int) or isinstance(raw, bool) or raw <= 0:
        raise RefusalError(f"must be a whole number greater than 0, not {describe(raw)}", "write for example 16")
    return raw


def read_model(raw: object) -> str:
    """Return a model in the notation that `split_model` takes apart.

    Args:
        raw: Text, "path" or "path+adapter"; or mergekit's object form {model: {path: ...}, lora: {path: ...}}, which
            takes any path literally.

    Returns:
        The model, text as written.

    Raises:
        RefusalError: A path is empty, there are two adapters or a revision, or it is no reference.
    """
    if isinstance(raw, dict):
        return _read_model_object(raw)
    if not isinstance(raw, str) or not raw.strip():
        raise RefusalError(f"must be the path or URL of a model, not {describe(raw)}")
    halves = halves_of(raw)
    if len(halves) > 2:
        what = f"has more than one plus sign: {describe(raw)}; a model is one base and one adapter"
        raise RefusalError(what, r"list each adapter as a model of its own; write a plus sign of a path as \+")
    if not all(half.strip() for half in halves):
        what = f"must have a path on both sides of the plus sign, not {describe(raw)}"
        raise RefusalError(what, r"write a plus sign of a path as \+")
    if len(halves) == 2 and _cuts_url(*halves):
        what = f"has a plus sign in the credentials or behind the query of a URL: {describe(raw)}"
        raise RefusalError(what, r"write it as \+, or use the form {model: {path: ...}, lora: {path: ...}}")
    # In a URL "@" ends the credentials or is part of a name; only a plain path can mean a hub revision.
    if any("@" in half and "://" not in half for half in halves):
        raise RefusalError(
            f"asks for a revision: {describe(raw)}; models are read from folders, which have none",
            'download that revision; for a path with "@" write model: {model: {path: ...}}',
        )
    return raw


def _cuts_url(path: str, adapter: str) -> bool:
    """Return whether what looks like an adapter may be the rest of a URL's password or query: it must not be shown."""
    _, is_url, rest = path.partition("://")
    return bool(is_url) and "://" not in adapter and ("?" in rest or ("@" in adapter and "/" not in rest))


def _read_model_object(raw: dict[str, object]) -> str:
    if raw.get("override_architecture") is not None:
        raise RefusalError("overrides the architecture; this is not supported", "leave `override_architecture` out")
    for key in (key for key in raw if key not in ("model", "lora", "override_architecture", "path")):
        raise RefusalError(f"has the unknown key `{key}`", nearest(key, ("model", "lora")))
    if "path" in raw or not isinstance(raw.get("model"), dict):
        what = "must be the path of a model or {model: {path: ...}}, with lora: {path: ...} for an adapter on it"
        raise RefusalError(what, 'for example "./experts/math"')
    adapter = None if raw.get("lora") is None else _read_path(raw["lora"], "lora")
    return join_model(_read_path(raw["model"], "model"), adapter)


def _read_path(raw: object, key: str) -> str:
    """Return the path of {path: ...}, which stands under `key` of a model."""
    fields = raw if isinstance(raw, dict) else {}
    if fields.get("revision") is not None:
        raise RefusalError("asks for a revision; models are read from folders, which have none", "download it")
    for name in (name for name in fields if name not in ("path", "revision")):
        raise RefusalError(f"has the unknown key `{name}`", nearest(name, ("path",)))
    path = fields.get("path")
    if not isinstance(path, str) or not path.strip():
        raise RefusalError(f"has no path under `{key}`", f"write {key}: {{path: ...}}")
    return path
