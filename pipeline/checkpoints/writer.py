"""Safetensors files written as a stream, of sizes known beforehand.

Owns the header's text, the byte count and the checksum. Must not know where the bytes come from or go to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.checkpoints.header import LARGEST_HEADER_BYTES, METADATA_KEY, PREFIX_BYTES
from pipeline.errors import CheckpointError, PipelineError, Problem, VerificationError
from pipeline.storage import ObjectWriter

# Name, a key of DTYPES, shape.
TensorSpec = tuple[str, str, tuple[int, ...]]
# Data begins at a multiple of the widest element, as the official writer has it.
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A file that was committed.

    Attributes:
        size_bytes: Header included.
        sha256: Of the whole file, in hexadecimal.
    """

    size_bytes: int
    sha256: str


def header_size(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> int:
    """Return the bytes before the first tensor's data: length prefix, JSON and padding; raises as the writer does."""
    return len(_header(tensors, metadata)[0])


class SafetensorsWriter:
    """Writes one file: the header at once, then the data in the order of the tensors.

    Args:
        writer: Where to; owned from now on.
        tensors: In file order.
        metadata: Text pairs for the header; left out when empty.

    Raises:
        CheckpointError: A name occurs twice or is reserved, a dtype is unknown, or the header is too large.
    """

    def __init__(self, writer: ObjectWriter, tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        self._writer = writer
        self._written_bytes = 0
        self._digest = hashlib.sha256()
        try:
            header, data_bytes = _header(tensors, metadata)
            self._expected_bytes = len(header) + data_bytes
            self.write(header)
        except PipelineError:
            self.abort()
            raise

    def write(self, data: bytes | memoryview) -> None:
        """Append data of the tensors, in pieces of any size.

        Raises:
            VerificationError: It is more than the header says; the file is aborted.
        """
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        self._written_bytes += view.nbytes
        if self._written_bytes > self._expected_bytes:
            self._refuse("or more")
        self._digest.update(view)
        self._writer.write(view)

    def finish(self) -> WrittenFile:
        """Commit the file and return its size and checksum.

        Raises:
            VerificationError: Fewer bytes were written than the header says; the file is aborted.
        """
        if self._written_bytes != self._expected_bytes:
            self._refuse("in all")
        self._writer.commit()
        return WrittenFile(size_bytes=self._written_bytes, sha256=self._digest.hexdigest())

    def abort(self) -> None:
        """Leave nothing behind; does nothing after `finish`."""
        self._writer.abort()

    def _refuse(self, extent: str) -> None:
        self.abort()
        raise VerificationError(
            Problem(
                what=f"{self._written_bytes} bytes {extent} were written, the header says {self._expected_bytes}",
                remedy="this is a fault of the program: please report it",
            )
        )


def _header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Return the header with prefix and padding, and the bytes of data that follow."""
    fields: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    data_bytes = 0
    for name, dtype, shape, size_bytes in _sized(tensors):
        if name in fields or name == METADATA_KEY:
            raise CheckpointError(Problem(what="the name occurs twice or is reserved", where=f"tensor {name!r}"))
        offsets = [data_bytes, data_bytes + size_bytes]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data_bytes += size_bytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    if len(text) > LARGEST_HEADER_BYTES:
        raise CheckpointError(
            Problem(
                what=f"the header of {len(tensors)} tensors has {len(text)} bytes", remedy="write more, smaller files"
            )
        )
    return len(text).to_bytes(PREFIX_BYTES, "little") + text, data_bytes


def _sized(tensors: Sequence[TensorSpec]) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    for name, dtype, shape in tensors:
        bits = DTYPES[dtype].bits if dtype in DTYPES and min(shape, default=0) >= 0 else -1
        for size in shape:
            bits *= size
        if bits < 0 or bits % 8:
            raise CheckpointError(
                Problem(what=f"{dtype} {list(shape)} cannot be stored in whole bytes", where=f"tensor {name!r}")
            )
        yield name, dtype, tuple(shape), bits // 8
