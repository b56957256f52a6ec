"""The chunk grid: how every tensor is cut into the units of reading and reducing.

Owns chunk sizes. They depend on the family alone, never on workers or memory, so neither leaves a trace in the bits.
"""

from __future__ import annotations

from dataclasses import dataclass

# Elements of the largest chunk: 2 MiB of a 16-bit model, long enough for a disk or a ranged request to run at speed.
MAX_CHUNK_ELEMENTS = 1 << 20
# Elements of the smallest chunk, for families of a thousand models.
MIN_CHUNK_ELEMENTS = 1 << 14
# Elements of all models' chunks together that one worker thread should hold at a time: 64 MiB of float32.
CHUNK_SET_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Elements [start, stop) of the tensor at this index of the plan."""

    tensor: int
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """How many elements the chunk has."""
        return self.stop - self.start


def chunk_elements(inputs: int) -> int:
    """Return the chunk length for a family of that many checkpoints: a power of two, shorter for larger families."""
    share = max(1, CHUNK_SET_ELEMENTS // inputs)
    return max(MIN_CHUNK_ELEMENTS, min(MAX_CHUNK_ELEMENTS, 1 << (share.bit_length() - 1)))


def chunks_of(tensor: int, elements: int, length: int) -> tuple[Chunk, ...]:
    """Return the chunks of one tensor, in order; a tensor without elements has none."""
    return tuple(
        Chunk(tensor=tensor, start=start, stop=min(start + length, elements)) for start in range(0, elements, length)
    )
