"""The header of a safetensors file, taken for hostile until proved otherwise.

Owns its parsing and every safety rule of the format. Must not know folders of files or what tensors mean.

Source: the safetensors format description and the attack notes in its README; the rules here are at least as strict as
those of the official reader, so that a header accepted here means the same there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.checkpoints.json_text import is_plain_text, parse_object, refusal, short
from pipeline.errors import CheckpointError, Problem
from pipeline.storage import MissingObject, Store

# The length of the JSON text, little-endian, comes first.
PREFIX_BYTES = 8
# The official reader's limit.
LARGEST_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"
# One request nearly always gets the whole header: 700 tensors of a 70B model need less than 100 KB.
_FIRST_READ_BYTES = 256 << 10
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
# Sizes must fit a signed 64-bit integer in every reader.
_TOO_MANY = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor's bytes are.

    Attributes:
        name: Its name.
        dtype: A key of `DTYPES`.
        shape: Its dimensions; () for a scalar.
        file: The path of its file inside the store.
        start: Offset of its first byte in the file.
        stop: Offset behind its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """The number of bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        tensors: Ordered by offset.
        metadata: Free text pairs.
        header_bytes: Offset of the first data byte.
        size_bytes: Size of the whole file.
        version: The object's version when the header was read; "" when parsed from memory.
    """

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    header_bytes: int
    size_bytes: int
    version: str


def read_header(store: Store, path: str) -> Header:
    """Return the header of a safetensors file: one small ranged read, seldom two.

    Args:
        store: Where the file is.
        path: Its path there.

    Raises:
        CheckpointError: The file is missing, damaged, or breaks a rule of the format.
        StorageError: It could not be read.
    """
    where = store.location(path)
    try:
        stat = store.stat(path)
        raw = store.read(path, 0, min(stat.size_bytes, _FIRST_READ_BYTES))
    except MissingObject as error:
        raise CheckpointError(Problem(what="does not exist", where=where, remedy="check the path")) from error
    header_bytes = _header_bytes(raw, stat.size_bytes, where)
    if header_bytes > len(raw):
        raw += store.read(path, len(raw), header_bytes)
    return parse_header(raw, stat.size_bytes, where, file=path, version=stat.version)


def parse_header(raw: bytes, file_bytes: int, where: str, *, file: str = "", version: str = "") -> Header:
    """Return the header at the beginning of a safetensors file.

    Args:
        raw: The file's first bytes, the header included.
        file_bytes: The size of the whole file.
        where: The file, for messages.
        file: What the entries say is their file.
        version: The file's version, passed on.

    Raises:
        CheckpointError: A rule of the format is broken; the text names file, tensor and rule.
    """
    header_bytes = _header_bytes(raw, file_bytes, where)
    text = raw[PREFIX_BYTES:header_bytes]
    if len(text) < header_bytes - PREFIX_BYTES:
        raise refusal(where, f"the header has {header_bytes} bytes, only {len(raw)} of them are there")
    if text[:1] != b"{":
        raise refusal(where, "is no safetensors file: the header does not begin with '{'")
    fields = parse_object(text, f"{where}: header", strict=True)
    metadata = _metadata(fields.pop(METADATA_KEY, {}), where)
    entries = [_entry(name, fields[name], header_bytes, file, where) for name in fields]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_layout(entries, header_bytes, file_bytes, where)
    return Header(
        tensors=tuple(entries),
        metadata=metadata,
        header_bytes=header_bytes,
        size_bytes=file_bytes,
        version=version,
    )


def _header_bytes(raw: bytes, file_bytes: int, where: str) -> int:
    """Return prefix plus text length, checked before anything of that size is read or allocated."""
    if file_bytes < PREFIX_BYTES or len(raw) < PREFIX_BYTES:
        raise refusal(where, f"is no safetensors file: {file_bytes} bytes, {PREFIX_BYTES} at least are needed")
    text_bytes = int.from_bytes(raw[:PREFIX_BYTES], "little")
    if text_bytes > LARGEST_HEADER_BYTES:
        raise refusal(where, f"claims a header of {text_bytes} bytes, {LARGEST_HEADER_BYTES} at most are allowed")
    if PREFIX_BYTES + text_bytes > file_bytes:
        raise refusal(
            where, f"is truncated: the header ends at byte {PREFIX_BYTES + text_bytes}, the file has {file_bytes} bytes"
        )
    return PREFIX_BYTES + text_bytes


def _metadata(found: object, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(is_plain_text(text) for pair in found.items() for text in pair):
        raise refusal(where, f"{METADATA_KEY} must map text to text")
    return found


def _entry(name: str, fields: Any, header_bytes: int, file: str, where: str) -> TensorEntry:
    """Return one tensor's entry, all rules checked that concern it alone."""
    if not is_plain_text(name):
        raise refusal(where, f"the tensor name {short(name)} is no valid text")
    where = f"{where}: tensor {short(name)}"
    if not isinstance(fields, dict):
        raise refusal(where, f"must be described by an object, not by {type(fields).__name__}")
    if fields.keys() != _FIELDS:
        missing, unknown = sorted(_FIELDS - fields.keys()), sorted(fields.keys() - _FIELDS)
        raise refusal(
            where, f"must have the fields dtype, shape, data_offsets; missing {missing}, unknown {short(unknown)}"
        )
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refusal(where, f"unknown dtype {short(dtype)}", f"known are {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise refusal(where, f"shape {short(shape)} must be a list of non-negative integers")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refusal(where, f"data_offsets {short(offsets)} must be two ascending non-negative integers")
    begin, end = offsets
    bits = _elements(shape, where) * DTYPES[dtype].bits
    if bits % 8 or bits // 8 != end - begin:
        raise refusal(where, f"{dtype} {short(shape)} needs {bits / 8:g} bytes, data_offsets give {end - begin}")
    start, stop = header_bytes + begin, header_bytes + end
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), file=file, start=start, stop=stop)


def _are_sizes(found: object) -> bool:
    """Return whether this is a list of non-negative integers; JSON's true is an int to Python."""
    return isinstance(found, list) and all(type(size) is int and size >= 0 for size in found)


def _elements(shape: list[int], where: str) -> int:
    """Return the product, refused as soon as it leaves 63 bits even if a zero follows: others would overflow."""
    elements = 1
    for size in shape:
        elements *= size
        if elements >= _TOO_MANY or size >= _TOO_MANY:
            raise refusal(where, f"shape {short(shape)} has more elements than 63 bits can count")
    return elements


def _check_layout(entries: list[TensorEntry], header_bytes: int, file_bytes: int, where: str) -> None:
    """Check that the tensors, ordered by offset, fill the file from the header's end to its own, once."""
    previous_stop = header_bytes
    for entry in entries:
        if entry.start != previous_stop:
            kind = "a hole" if entry.start > previous_stop else "an overlap"
            raise refusal(
                f"{where}: tensor {short(entry.name)}",
                f"{kind}: its data begins at byte {entry.start}, the data before it ends at byte {previous_stop}",
            )
        previous_stop = entry.stop
    expected_bytes = previous_stop
    if file_bytes < expected_bytes:
        raise refusal(where, f"is truncated: the header describes {expected_bytes} bytes, the file has {file_bytes}")
    if file_bytes > expected_bytes:
        raise refusal(
            where, f"has trailing bytes: the header describes {expected_bytes} bytes, the file has {file_bytes}"
        )
