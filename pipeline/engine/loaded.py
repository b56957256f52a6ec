"""The bytes of inputs while someone holds them, and their hashes.

Owns nothing but these two records. Legend: I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from pipeline.planning.grid import Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The bytes of one chunk by input index; valid while the `lease` it came from is open."""

    chunk: Chunk
    raw: dict[int, np.ndarray]

    @property
    def nbytes(self) -> int:
        """The bytes of all inputs."""
        return sum(array.nbytes for array in self.raw.values())

    def checksum(self, index: int) -> int:
        """Return the signed 64-bit XXH3 of one input's bytes."""
        return _signed(xxhash.xxh3_64_intdigest(self.raw[index].data))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedFactors:
    """The bytes of the factors of one tensor's updates by input index: left, and right where there is one."""

    tensor: int
    raw: dict[int, tuple[np.ndarray, ...]]

    @property
    def nbytes(self) -> int:
        """The bytes of all factors."""
        return sum(array.nbytes for arrays in self.raw.values() for array in arrays)

    def checksum(self, index: int) -> int:
        """Return the signed 64-bit XXH3 of one adapter's factors, the left one's bytes before the right one's."""
        digest = xxhash.xxh3_64()
        for array in self.raw[index]:
            digest.update(array.data)
        return _signed(digest.intdigest())


def _signed(value: int) -> int:
    """Return an unsigned 64-bit number as the signed one of the same bits, which is what tables hold."""
    return value - (1 << 64) if value >= 1 << 63 else value
