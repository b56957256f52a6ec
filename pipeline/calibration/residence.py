"""What the process holds of the machine's memory.

Owns the platform calls. Must not know what the memory is for.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

from pipeline.engine.process import peak_memory_bytes


def resident_bytes() -> int:
    """Return what this process holds now; where the system does not say, the most it ever held."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return peak_memory_bytes()


def give_back() -> None:
    """Give freed memory back to the system.

    glibc keeps what lies between pieces that are still in use: a layer's weights, freed and allocated anew for every
    layer, would grow to several layers' without this.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
