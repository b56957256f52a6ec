"""Where chunks come from: ranges of the inputs' files, read into reused buffers, or kept from an earlier read.

Owns reading, retention and the checks that belong to a read: length, version, tied copies. Legend: I inputs,
E elements of a chunk.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import xxhash

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.errors import CheckpointError, Problem, VerificationError
from pipeline.planning.grid import Chunk
from pipeline.planning.memory import Memory, slot_bytes
from pipeline.planning.plan import Plan, Source, Update
from pipeline.planning.traffic import factor_bytes, merged_inputs
from pipeline.storage import MissingObject, ObjectStat, Store, open_store

# Tensors handed to the kernels start at multiples of a cache line, whatever their dtype.
_ALIGNMENT = 64


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


class ChunkSource:
    """Reads chunks of a plan's inputs.

    Args:
        plan: The plan.
        memory: How many chunks may be in flight and how many bytes may be kept.
    """

    def __init__(self, plan: Plan, memory: Memory) -> None:
        self._plan = plan
        self._stores = [open_store(item.url) for item in plan.inputs]
        self._slots: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for _ in range(memory.window):
            self._slots.put(np.empty(slot_bytes(plan) + _ALIGNMENT * 3 * len(plan.inputs), dtype=np.uint8))
        self._lock = threading.Lock()
        self._kept: dict[tuple[int, int], dict[int, np.ndarray]] = {}
        self._kept_factors: dict[int, LoadedFactors] = {}
        self._room_bytes = memory.retained_bytes
        self.read_bytes = 0
        self.reused_bytes = 0

    def check_versions(self, tensors: Sequence[int]) -> None:
        """Raise when a source file is not the one that was planned for.

        Args:
            tensors: Only the files that hold these tensors are looked at.

        Raises:
            CheckpointError: Names every changed file.
        """
        problems = []
        used = self._files(tensors)
        for index, (item, store) in enumerate(zip(self._plan.inputs, self._stores, strict=True)):
            for number in used[index]:
                file = item.files[number]
                stat = _stat(store, file.path)
                if stat is None or (stat.size_bytes, stat.version) != (file.size_bytes, file.version):
                    now = "absent now" if stat is None else f"{stat.size_bytes} now"
                    problems.append(
                        Problem(
                            what=f"changed since the merge was planned ({file.size_bytes} bytes then, {now})",
                            where=f"model {item.name}, file {file.path}",
                            remedy="let nothing write to the inputs during a merge; start again with --overwrite",
                        )
                    )
        if problems:
            raise CheckpointError(*problems)

    @contextmanager
    def lease(self, chunk: Chunk, inputs: Sequence[int], *, keep: bool = False, drop: bool = False) -> Iterator[Loaded]:
        """Hold one chunk's bytes of the given inputs.

        Args:
            chunk: What to read.
            inputs: Input indices, repetitions allowed.
            keep: Keep the bytes for a later lease if there is room.
            drop: Forget what was kept of this chunk afterwards.
        """
        key = (chunk.tensor, chunk.start)
        wanted = tuple(dict.fromkeys(inputs))
        with self._lock:
            raw = dict(self._kept.pop(key, {}) if drop else self._kept.get(key, {}))
        missing = [index for index in wanted if index not in raw]
        reused = sum(raw[index].nbytes for index in wanted if index in raw)
        sizes = {index: self._range(chunk, index)[2] for index in missing}
        # Room to give back at the end: of what is dropped, and of what was to be kept until it is.
        freed_bytes = sum(array.nbytes for array in raw.values()) if drop else 0
        slot = None
        try:
            # The base is kept only where the second read needs it.
            again = merged_inputs(self._plan, chunk.tensor) if keep else ()
            keepers = [index for index in missing if index in again]
            kept_bytes = sum(sizes[index] for index in keepers)
            kept = bool(keepers) and self._reserve(kept_bytes)
            freed_bytes += kept_bytes if kept else 0
            owned = {index: np.empty(sizes[index], np.uint8) for index in keepers if kept}
            borrowed = {index: size for index, size in sizes.items() if index not in owned}
            if borrowed:
                slot = self._slots.get()
            fresh = {**owned, **(_carve(slot, borrowed) if slot is not None else {})}
            for index, array in fresh.items():
                self._read(chunk, index, array)
            with self._lock:
                self.reused_bytes += reused
                if kept:
                    self._kept[key] = {**raw, **owned}
                    freed_bytes -= kept_bytes
            held = {**raw, **fresh}
            yield Loaded(chunk=chunk, raw={index: held[index] for index in wanted})
        finally:
            if slot is not None:
                self._slots.put(slot)
            with self._lock:
                self._room_bytes += freed_bytes

    def check_copies(self, loaded: Loaded) -> None:
        """Raise when a tied copy of this chunk does not hold the same bytes.

        Raises:
            CheckpointError: Names the model and the tensor.
        """
        chunk = loaded.chunk
        tensor = self._plan.tensors[chunk.tensor]
        for index, source in enumerate(tensor.sources):
            if source is None or not source.copies or index not in loaded.raw:
                continue
            width = DTYPES[source.dtype].bits // 8
            item = self._plan.inputs[index]
            again = np.empty(chunk.elements * width, dtype=np.uint8)
            for file, start in source.copies:
                self._stores[index].read_into(item.files[file].path, start + chunk.start * width, again.data)
                with self._lock:
                    self.read_bytes += again.nbytes
                if not np.array_equal(again, loaded.raw[index]):
                    raise CheckpointError(
                        Problem(
                            what="is stored twice, as input and output embedding that are tied, with different values",
                            where=f"model {item.name}, tensor {tensor.name}",
                            remedy="set tie_word_embeddings to false in every config.json if the head is another",
                        )
                    )

    def check_agreement(self, loaded: Loaded) -> None:
        """Raise when the inputs' bytes of a chunk are not all the same, as integers and booleans must be.

        Raises:
            CheckpointError: Names the first model that differs.
        """
        reference, *others = loaded.raw
        for index in others:
            if not np.array_equal(loaded.raw[reference], loaded.raw[index]):
                names = [self._plan.inputs[i].name for i in (index, reference)]
                tensor = self._plan.tensors[loaded.chunk.tensor]
                raise CheckpointError(
                    Problem(
                        what=f"differs from the same tensor of {names[1]}; {tensor.dtype} is copied, never averaged",
                        where=f"model {names[0]}, tensor {tensor.name}",
                        remedy="leave one of the models out",
                    )
                )

    def check_sums(self, loaded: Loaded, checksums: np.ndarray, factor_sums: Mapping[int, int]) -> None:
        """Raise when bytes differ from those of the first read.

        Args:
            loaded: The chunk as read now.
            checksums: I hashes of the first read, as `chunk_checksums` makes them.
            factor_sums: By input, hashes of the factors as read now.

        Raises:
            VerificationError: Names model, tensor and range.
        """
        chunk = loaded.chunk
        for index in loaded.raw:
            if loaded.checksum(index) ^ factor_sums.get(index, 0) != checksums[index]:
                what = f"elements {chunk.start} to {chunk.stop}"
                raise self._other_bytes(what, index, chunk.tensor, self._source(chunk.tensor, index))
        self.check_factor_sums(chunk.tensor, factor_sums, checksums, skip=tuple(loaded.raw))

    def check_factor_sums(
        self, tensor: int, factor_sums: Mapping[int, int], checksums: np.ndarray, *, skip: Sequence[int] = ()
    ) -> None:
        """Raise when factors differ from those of the first read.

        Args:
            tensor: Whose factors.
            factor_sums: By input, hashes of the factors as read now.
            checksums: I hashes of the first read.
            skip: Inputs whose hash holds more than their factors.

        Raises:
            VerificationError: Names model and tensor.
        """
        for update in self._plan.tensors[tensor].updates:
            if update.input not in skip and factor_sums[update.input] != checksums[update.input]:
                raise self._other_bytes("its adapter's factors", update.input, tensor, update.left)

    def _other_bytes(self, what: str, index: int, tensor: int, source: Source) -> VerificationError:
        item = self._plan.inputs[index]
        name, file = self._plan.tensors[tensor].name, item.files[source.file].path
        return VerificationError(
            Problem(
                what=f"{what} are not the bytes of the first read",
                where=f"model {item.name}, tensor {name}, file {file}",
                remedy="the source changed or was read wrongly: check disk and memory,"
                " then start again with --overwrite",
            )
        )

    def factors(self, tensor: int, *, keep: bool = False, drop: bool = False) -> LoadedFactors:
        """Return the factors of all updates of a tensor.

        Args:
            tensor: Its index.
            keep: Keep the bytes for a later call if there is room.
            drop: Forget what was kept.
        """
        with self._lock:
            found = self._kept_factors.pop(tensor, None) if drop else self._kept_factors.get(tensor)
            if found is not None:
                self.reused_bytes += found.nbytes
                self._room_bytes += found.nbytes if drop else 0
                return found
        planned = self._plan.tensors[tensor]
        raw = {}
        for update in planned.updates:
            sides = [(update.left, planned.rows * update.rank), (update.right, planned.columns * update.rank)]
            raw[update.input] = tuple(
                self._read_factor(update, source, elements) for source, elements in sides if source is not None
            )
        loaded = LoadedFactors(tensor=tensor, raw=raw)
        if keep and self._reserve(factor_bytes(planned)):
            with self._lock:
                self._kept_factors[tensor] = loaded
        return loaded

    def _read_factor(self, update: Update, source: Source, elements: int) -> np.ndarray:
        array = np.empty(elements * (DTYPES[source.dtype].bits // 8), dtype=np.uint8)
        file = self._plan.inputs[update.input].files[source.file]
        self._stores[update.input].read_into(file.path, source.start, array.data)
        with self._lock:
            self.read_bytes += array.nbytes
        return array

    def count_reused(self, size_bytes: int) -> None:
        """Note that a lease served a second read too."""
        with self._lock:
            self.reused_bytes += size_bytes

    def close(self) -> None:
        """Release buffers and files."""
        self._kept.clear()
        self._kept_factors.clear()
        for store in self._stores:
            store.close()

    def _range(self, chunk: Chunk, index: int) -> tuple[Source, int, int]:
        """Return the source of a chunk in one input, its absolute byte offset and its length."""
        source = self._source(chunk.tensor, index)
        width = DTYPES[source.dtype].bits // 8
        return source, source.start + chunk.start * width, chunk.elements * width

    def _read(self, chunk: Chunk, index: int, array: np.ndarray) -> None:
        source, start, _ = self._range(chunk, index)
        self._stores[index].read_into(self._plan.inputs[index].files[source.file].path, start, array.data)
        with self._lock:
            self.read_bytes += array.nbytes

    def _source(self, tensor: int, index: int) -> Source:
        """Return where an input holds a tensor whole."""
        source = self._plan.tensors[tensor].sources[index]
        if source is None:
            raise ValueError(f"input {index} does not hold tensor {self._plan.tensors[tensor].name} whole")
        return source

    def _files(self, tensors: Sequence[int]) -> list[list[int]]:
        """Return, by input, the numbers of the files that hold anything of these tensors."""
        used: list[set[int]] = [set() for _ in self._plan.inputs]
        for planned in (self._plan.tensors[tensor] for tensor in tensors):
            for index in planned.holders:
                used[index].add(planned.sources[index].file)  # type: ignore[union-attr]
            for update in planned.updates:
                used[update.input].add(update.left.file)
                if update.right is not None:
                    used[update.input].add(update.right.file)
        return [sorted(numbers) for numbers in used]

    def _reserve(self, size_bytes: int) -> bool:
        """Return whether there is room to keep that much, and take it."""
        with self._lock:
            fits = size_bytes <= self._room_bytes
            self._room_bytes -= size_bytes if fits else 0
        return fits


def _stat(store: Store, path: str) -> ObjectStat | None:
    """Return a file's size and version, or None when it is gone."""
    try:
        return store.stat(path)
    except MissingObject:
        return None


def _signed(value: int) -> int:
    """Return an unsigned 64-bit number as the signed one of the same bits, which is what tables hold."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _carve(slot: np.ndarray, sizes: dict[int, int]) -> dict[int, np.ndarray]:
    """Return aligned, disjoint views of a buffer."""
    views = {}
    position = -slot.ctypes.data % _ALIGNMENT
    for index, size in sizes.items():
        views[index] = slot[position : position + size]
        position += -(-size // _ALIGNMENT) * _ALIGNMENT
    return views
