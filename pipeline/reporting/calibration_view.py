"""The document of a calibration as text for people.

Owns its wording on standard output. Must not print.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.units import format_bytes, format_seconds


def calibrated_view(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield what statistics there are, and what it took to collect them."""
    facts = result["facts"]
    shared = f" and {result['shared']} that equal one of them" if result["shared"] else ""
    yield (
        f"{result['output']}: {facts['extra']['statistics']} statistics of {facts['examples']} examples,"
        f" {facts['tokens']:,} tokens; {result['stored']} stored{shared},"
        f" {result['outside']} tensors without; {format_bytes(result['bytes'])} in {result['files']} files,"
        f" {format_seconds(result['seconds'])}"
    )
