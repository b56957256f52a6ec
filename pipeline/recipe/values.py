"""Single values of a recipe: numbers, switches, words, sizes, data types and references to models.

Owns what each value may look like and why others are refused; knows neither lines nor keys.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Sequence

from pipeline.recipe.findings import nearest
from pipeline.units import parse_bytes

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


def without_credentials(url: str) -> str:
    """Return a URL without user, password and query; a plain path as it is."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    authority, slash, path = rest.partition("?")[0].partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


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
    text = without_credentials(raw) if isinstance(raw, str) else str(raw)
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


def read_model(raw: object) -> str:
    """Return a model's path or URL, as written.

    Args:
        raw: Text, or mergekit's object form {model: {path: ...}}, which takes any path literally.

    Returns:
        The path.

    Raises:
        RefusalError: It is empty, names an adapter or a revision, or is no reference.
    """
    if isinstance(raw, dict):
        return _read_model_object(raw)
    if not isinstance(raw, str) or not raw.strip():
        raise RefusalError(f"must be the path or URL of a model, not {describe(raw)}")
    _, is_url, rest = raw.rpartition("://")
    if "+" in rest:
        raise RefusalError(
            f"asks for an adapter: {describe(raw)}; adapters are not supported",
            "merge the adapter into its base first; for a path with a plus sign write model: {model: {path: ...}}",
        )
    # In a URL "@" ends the credentials or is part of a name; only a plain path can mean a hub revision.
    if "@" in rest and not is_url:
        raise RefusalError(
            f"asks for a revision: {describe(raw)}; models are read from folders, which have none",
            'download that revision; for a path with "@" write model: {model: {path: ...}}',
        )
    return raw


def _read_model_object(raw: dict[str, object]) -> str:
    refused = {
        "lora": "asks for an adapter; adapters are not supported",
        "override_architecture": "overrides the architecture; this is not supported",
        "revision": "asks for a revision; models are read from folders, which have none",
    }
    inner = raw.get("model")
    fields = {**raw, **inner} if isinstance(inner, dict) else raw
    for key, reason in refused.items():
        if fields.get(key) is not None:
            raise RefusalError(reason, "only {model: {path: ...}} is read")
    unknown = [key for key in fields if key not in refused and key not in ("model", "path")]
    if unknown:
        raise RefusalError(f"has the unknown key `{unknown[0]}`", nearest(unknown[0], ("model", "path")))
    path = inner.get("path") if isinstance(inner, dict) else None
    if not isinstance(path, str) or not path.strip() or "path" in raw:
        raise RefusalError("must be the path of a model or {model: {path: ...}}", 'for example "./experts/math"')
    return path


def model_key(model: str) -> str:
    """Return what two spellings of one model's path have in common: "./a/" and "a" give "a".

    Args:
        model: A path or URL as written in the recipe.

    Returns:
        A text to compare by; no file system is asked.
    """
    return model.rstrip("/") if "://" in model else posixpath.normpath(model)
