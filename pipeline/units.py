"""Byte counts and durations as people write them.

Owns the translation between "4GB" and bytes; decimal units (GB = 10⁹) and binary ones (GiB = 2³⁰) are both understood.
"""

from __future__ import annotations

import re

_FACTORS = {
    "": 1,
    **{unit + "B": 1000**power for power, unit in enumerate(("", "K", "M", "G", "T", "P"))},
    **{unit: 1000**power for power, unit in enumerate(("", "K", "M", "G", "T", "P")) if unit},
    **{unit + "IB": 1024**power for power, unit in enumerate(("", "K", "M", "G", "T", "P")) if unit},
}
_SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Return a byte count written as "4GB", "512 MiB", "1e9"-free plain digits, or an integer.

    Args:
        text: The number with an optional unit: B, KB, MB, GB, TB, PB (powers of 1000), KiB … PiB (powers of 1024).

    Returns:
        Bytes, rounded to the nearest integer.

    Raises:
        ValueError: The text is no such number, or is not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    else:
        match = _PATTERN.fullmatch(str(text))
        factor = _FACTORS.get(match[2].upper()) if match else None
        if match is None or factor is None:
            raise ValueError(f"{text!r} is no size; write for example 4GB, 512MiB or 1000000")
        count = round(float(match[1]) * factor)
    if count <= 0:
        raise ValueError(f"{text!r} is not a positive size")
    return count


def parse_seconds(text: str) -> float:
    """Return a duration written as "90s", "30min", "1h", "2 d", or as plain seconds; "0" is one.

    Raises:
        ValueError: The text is no such duration.
    """
    match = _PATTERN.fullmatch(text)
    factor = _SECONDS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is no duration; write for example 90s, 30min, 1h or 2d")
    return float(match[1]) * factor


def format_bytes(count: float) -> str:
    """Return a byte count for people, in decimal units with three significant digits: 1 234 567 → "1.23 MB"."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def format_seconds(seconds: float) -> str:
    """Return a duration for people: "0.42 s", "12 s", "3 min 05 s", "2 h 07 min"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
