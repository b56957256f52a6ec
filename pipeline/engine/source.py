"""Where chunks come from: ranges of the inputs' files, read into reused buffers, or kept from an earlier read.

Owns reading, retention and the checks that belong to a read: length, version, tied copies. Legend: I inputs,
E elements of a chunk.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pipeline.engine.fetch import Fetcher, Want
from pipeline.engine.in_place import InPlace
from pipeline.engine.loaded import Loaded, LoadedFactors
from pipeline.engine.read_ahead import ALIGNMENT, Held, Key, Need, ReadAhead, Ring
from pipeline.errors import CheckpointError, Problem
from pipeline.planning.grid import Chunk
from pipeline.planning.memory import Memory, lease_bytes, slot_bytes
from pipeline.planning.places import ByteRange, chunk_range, copy_ranges, factor_ranges
from pipeline.planning.plan import Plan
from pipeline.planning.traffic import merged_inputs
from pipeline.storage import MissingObject, ObjectStat, Store, open_store
from pipeline.storage.mapped import Look


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Room:
    """A buffer that one need may use until it gives it back."""

    buffer: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    give_back: Callable[[], None] | None = None


class ChunkSource:
    """Reads chunks of a plan's inputs.

    Local files are read by the thread that asks. As soon as one input is remote, all are read by a worker's own reading
    threads, many ranges at a time, and ahead of the tasks that announced themselves.

    Args:
        plan: The plan.
        memory: How many chunks may be in flight, how many bytes may be kept, and how far to read ahead.
    """

    def __init__(self, plan: Plan, memory: Memory) -> None:
        self._plan = plan
        self._stores = [open_store(item.url, plan.storage.of(item.url)) for item in plan.inputs]
        self._fetcher = Fetcher(memory.requests) if memory.requests else None
        self._in_place = InPlace(plan, self._stores, memory.in_place_bytes)
        self._slots: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        for _ in range(0 if memory.requests else memory.window):
            self._slots.put(np.empty(slot_bytes(plan) + ALIGNMENT * 3 * len(plan.inputs), dtype=np.uint8))
        self._ahead_bytes = memory.ahead_bytes
        room = memory.window * lease_bytes(plan) + memory.ahead_bytes if memory.requests else 0
        self._ring = Ring(room + ALIGNMENT * len(plan.inputs) * (memory.window + 1))
        self._ahead: ReadAhead | None = None
        self._lock = threading.Lock()
        self._kept: dict[Key, dict[int, tuple[np.ndarray, ...]]] = {}
        self._room_bytes = memory.retained_bytes
        self.read_bytes = 0
        self.reused_bytes = 0

    def read_ahead(self, needs: Iterable[Need]) -> None:
        """Announce what the coming tasks will ask for, in their order; remote inputs are read ahead of them.

        Args:
            needs: Each is asked for once. The announcement before this one must have been stopped.
        """
        if self._fetcher is not None:
            self._ahead = ReadAhead(needs, holder=self, fetcher=self._fetcher, most_bytes=self._ahead_bytes)

    def stop_reading_ahead(self) -> None:
        """Read nothing more ahead; tasks that still wait for a read that has not begun fail."""
        if self._ahead is not None:
            self._ahead.stop()

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
        need = Need(tensor=chunk.tensor, chunk=chunk, inputs=tuple(dict.fromkeys(inputs)), keep=keep, drop=drop)
        held = self._taken(need)
        try:
            self._fill(held)
            yield Loaded(chunk=chunk, raw={index: held.raw[index][0] for index in need.inputs})
            if held.in_place and self._in_place.lost():
                # Which file it was, mostly; otherwise any of these.
                self.check_versions([chunk.tensor])
                raise self._in_place.refusal(held.in_place)
        finally:
            self.let_go(held)

    def factors(self, tensor: int, *, keep: bool = False, drop: bool = False) -> LoadedFactors:
        """Return the factors of all updates of a tensor.

        Args:
            tensor: Its index.
            keep: Keep the bytes for a later call if there is room.
            drop: Forget what was kept.
        """
        held = self._taken(Need(tensor=tensor, keep=keep, drop=drop))
        try:
            self._fill(held)
            order = [update.input for update in self._plan.tensors[tensor].updates]
            return LoadedFactors(tensor=tensor, raw={index: held.raw[index] for index in order})
        finally:
            self.let_go(held)

    def missing_bytes(self, need: Need) -> dict[int, int]:
        """Return, by input, the bytes of a need that are not kept."""
        return {index: _bytes_of(places) for index, places in self._missing(need).items()}

    def fits(self, size_bytes: int) -> bool:
        """Return whether there is room to read so many bytes ahead."""
        return self._ring.fits(size_bytes)

    def hold(self, need: Need) -> Held | None:
        """Return arrays for a need that was announced; None when there is no room to read it ahead."""
        return self._hold(need, self._ring_room)

    def let_go(self, held: Held) -> None:
        """Take back what a need held."""
        for look in held.in_place.values():
            look.let_go()
        if held.give_back is not None:
            held.give_back()
        with self._lock:
            self._room_bytes += held.freed_bytes
        if self._ahead is not None:
            self._ahead.go_on()

    def _taken(self, need: Need) -> Held:
        """Return a need's arrays, being read already if it was announced."""
        held = self._ahead.take(need.key) if self._ahead is not None else None
        if held is None:
            held = self._hold(need, self._slot_room)
        if held is None or held.need != need:
            raise ValueError(f"{need} was announced otherwise")
        return held

    def _fill(self, held: Held) -> None:
        """Return when a need's arrays hold their bytes; keep them where that was decided."""
        if held.fetch is not None:
            held.fetch.wait(held.wants)
            self._count(held.wants)
        else:
            self._read(held.wants)
        with self._lock:
            self.reused_bytes += held.reused_bytes
            self.read_bytes += sum(look.bytes.nbytes for look in held.in_place.values())
            if held.kept:
                self._kept.setdefault(held.need.key, {}).update(held.kept)
                held.freed_bytes -= _size(held.kept)

    def _read(self, wants: Sequence[Want]) -> None:
        """Fill buffers now: by this thread, or many at a time where an input is remote."""
        if self._fetcher is not None:
            self._fetcher.fetch(wants)
        else:
            for want in wants:
                want.store.read_into(want.path, want.start, want.buffer.data)
        self._count(wants)

    def _count(self, wants: Sequence[Want]) -> None:
        with self._lock:
            self.read_bytes += sum(want.buffer.nbytes for want in wants)

    def _hold(self, need: Need, room: Callable[[int], _Room | None]) -> Held | None:
        """Return a need's arrays, nothing read yet; None when `room` has none."""
        missing = self._missing(need)
        sizes = {index: _bytes_of(places) for index, places in missing.items()}
        # The base is kept only where the second read needs it.
        again = (*merged_inputs(self._plan, need.tensor), *(missing if need.chunk is None else ())) if need.keep else ()
        keepers = {index: size for index, size in sizes.items() if index in again}
        kept_bytes = sum(keepers.values())
        if not keepers or not self._reserve(kept_bytes):
            keepers, kept_bytes = {}, 0
        looked_at = self._looked_at(need, {i: places[0] for i, places in missing.items() if i not in keepers})
        borrowed = (
            {}
            if need.chunk is None
            else {index: size for index, size in sizes.items() if index not in keepers and index not in looked_at}
        )
        found = room(sum(-(-size // ALIGNMENT) * ALIGNMENT for size in borrowed.values())) if borrowed else _Room()
        with self._lock:
            if found is None:
                self._room_bytes += kept_bytes
                return None
            before = dict(self._kept.pop(need.key, {}) if need.drop else self._kept.get(need.key, {}))
        carved = {
            index: (array,)
            for index, array in (
                *_carve(found.buffer, borrowed).items(),
                *((index, look.bytes) for index, look in looked_at.items()),
            )
        }
        fresh = {
            index: carved.get(index) or tuple(np.empty(place.size_bytes, dtype=np.uint8) for place in places)
            for index, places in missing.items()
        }
        wants = [
            self._want(index, place, array)
            for index, places in missing.items()
            if index not in looked_at
            for place, array in zip(places, fresh[index], strict=True)
        ]
        wanted = need.inputs if need.chunk is not None else tuple(before)
        return Held(
            need=need,
            raw={**before, **fresh},
            wants=wants,
            reused_bytes=_size({index: before[index] for index in wanted if index in before}),
            kept={index: fresh[index] for index in keepers},
            # Room to give back at the end: of what is dropped, and of what was to be kept until it is.
            freed_bytes=kept_bytes + (_size(before) if need.drop else 0),
            give_back=found.give_back,
            in_place=looked_at,
        )

    def _looked_at(self, need: Need, places: Mapping[int, ByteRange]) -> dict[int, Look]:
        """Return, by input, what need not be read."""
        if need.chunk is None or self._fetcher is not None:
            return {}
        found = {index: self._in_place.look_at(index, place) for index, place in places.items()}
        return {index: look for index, look in found.items() if look is not None}

    def _ring_room(self, size_bytes: int) -> _Room | None:
        """Return room to read ahead into, if there is any."""
        place = self._ring.take(size_bytes)
        if place is None:
            return None
        return _Room(buffer=self._ring.view(place), give_back=partial(self._ring.give_back, place))

    def _slot_room(self, size_bytes: int) -> _Room:
        """Return room for a need that nobody announced, as soon as there is any."""
        if self._fetcher is not None:
            return _Room(buffer=np.empty(size_bytes + ALIGNMENT, dtype=np.uint8))
        slot = self._slots.get()
        return _Room(buffer=slot, give_back=partial(self._slots.put, slot))

    def _missing(self, need: Need) -> dict[int, tuple[ByteRange, ...]]:
        """Return, by input, the ranges of a need that are not kept."""
        with self._lock:
            kept = self._kept.get(need.key, {}).keys()
        plan, chunk = self._plan, need.chunk
        if chunk is not None:
            return {index: (chunk_range(plan, chunk, index),) for index in need.inputs if index not in kept}
        updates = [update for update in plan.tensors[need.tensor].updates if update.input not in kept]
        return {update.input: factor_ranges(plan, need.tensor, update) for update in updates}

    def _want(self, index: int, place: ByteRange, buffer: np.ndarray) -> Want:
        """Return the wish for a range of an input."""
        return Want(store=self._stores[index], path=place.path, start=place.start, buffer=buffer)

    def check_copies(self, loaded: Loaded) -> None:
        """Raise when a tied copy of this chunk does not hold the same bytes.

        Raises:
            CheckpointError: Names the model and the tensor.
        """
        chunk = loaded.chunk
        copies = [(index, place) for index in loaded.raw for place in copy_ranges(self._plan, chunk, index)]
        wants = [self._want(index, place, np.empty(place.size_bytes, dtype=np.uint8)) for index, place in copies]
        if not wants:
            return
        self._read(wants)
        for (index, _), want in zip(copies, wants, strict=True):
            if not np.array_equal(want.buffer, loaded.raw[index]):
                raise CheckpointError(
                    Problem(
                        what="is stored twice, as input and output embedding that are tied, with different values",
                        where=f"model {self._plan.inputs[index].name}, tensor {self._plan.tensors[chunk.tensor].name}",
                        remedy="set tie_word_embeddings to false in every config.json if the head is another",
                    )
                )

    def count_reused(self, size_bytes: int) -> None:
        """Note that a lease served a second read too."""
        with self._lock:
            self.reused_bytes += size_bytes

    def close(self) -> None:
        """Release buffers and files."""
        self.stop_reading_ahead()
        if self._fetcher is not None:
            self._fetcher.close()
        self._kept.clear()
        self._in_place.close()
        for store in self._stores:
            store.close()

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


def _bytes_of(places: Iterable[ByteRange]) -> int:
    """Return the bytes of several ranges."""
    return sum(place.size_bytes for place in places)


def _size(arrays: Mapping[int, tuple[np.ndarray, ...]]) -> int:
    """Return the bytes of all arrays."""
    return sum(array.nbytes for members in arrays.values() for array in members)


def _carve(slot: np.ndarray, sizes: dict[int, int]) -> dict[int, np.ndarray]:
    """Return aligned, disjoint views of a buffer."""
    views = {}
    position = -slot.ctypes.data % ALIGNMENT
    for index, size in sizes.items():
        views[index] = slot[position : position + size]
        position += -(-size // ALIGNMENT) * ALIGNMENT
    return views
