"""What one thread does with one chunk, or with the factors of one tensor: read, check, compute.

Owns which bytes a chunk needs and which checks belong to which read. Knows nothing of order, groups' solutions or
output files. Thread-safe. The arithmetic of factors, and torch with it, is imported where a tensor has some.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.engine.chunk_math import (
    MergedChunk,
    Updates,
    chunk_checksums,
    measure_chunk,
    non_finite_error,
    probe_chunk,
    write_chunk,
)
from pipeline.engine.loaded import Loaded
from pipeline.engine.read_ahead import Need
from pipeline.engine.read_checks import check_agreement, check_factor_sums, check_sums
from pipeline.engine.run_folder import ChunkRow
from pipeline.engine.solutions import Solution
from pipeline.engine.source import ChunkSource
from pipeline.numerics.devices import kernels_of
from pipeline.planning.grid import Chunk
from pipeline.planning.plan import Plan
from pipeline.planning.traffic import (
    dense_inputs,
    factor_bytes,
    measured_inputs,
    merged_inputs,
    metric_bytes,
    probed_points,
)

if TYPE_CHECKING:
    from pipeline.engine.metric import MetricSource
    from pipeline.numerics.low_rank.output import LowRankCombination
    from pipeline.numerics.metric import GramMetric, Metric

# By tensor and start, the hashes (I, int64) of a chunk's first read.
Checksums = Mapping[tuple[int, int], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the chunks of one tensor share: its updates, their checksums, and their combination.

    Attributes:
        checksums: By input index.
        combination: Of a tensor whose points differ by updates alone; None for others.
        metric: What all its chunks are mapped by before they are measured; None without a metric of matrices.
    """

    updates: Updates
    checksums: dict[int, int]
    combination: LowRankCombination | None
    metric: GramMetric | None = None


_NOTHING = Prepared(updates={}, checksums={}, combination=None)


class ChunkTasks:
    """The tasks of a worker's threads.

    Args:
        plan: The plan.
        source: Where chunks and factors come from.
        device: Where they are computed on: "cpu", or torch's name of another device.
        metric: What distances are measured in; None for Euclidean ones.
    """

    def __init__(self, plan: Plan, source: ChunkSource, device: str, metric: MetricSource | None = None) -> None:
        self._plan = plan
        self._source = source
        self._device = device
        self._kernels = kernels_of(device)
        self._metric = metric
        self._lock = threading.Lock()
        self.done_bytes = 0

    def read(self, tensor: int, *, keep: bool = True) -> Prepared:
        """Return a tensor's updates, read for measuring; most tensors of most families have none.

        Args:
            tensor: Its index.
            keep: Keep the factors for a second read, if there is room.
        """
        prepared = self._read(tensor, keep=keep) if self._plan.tensors[tensor].updates else _NOTHING
        return self._with_metric(tensor, prepared)

    def read_again(self, tensor: int, solution: Solution | None, checksums: Checksums) -> Prepared:
        """Return a tensor's updates, read for merging, and their combination.

        Args:
            tensor: Its index.
            solution: Of its group.
            checksums: What the first read left; nothing for a method that measures nothing.

        Raises:
            VerificationError: The factors are not those of the first read.
        """
        planned = self._plan.tensors[tensor]
        if not planned.updates:
            return self._with_metric(tensor, _NOTHING)
        prepared = self._with_metric(tensor, self._read(tensor, drop=True))
        if self._plan.settings.measured and planned.factored:
            check_factor_sums(self._plan, tensor, prepared.checksums, checksums[tensor, 0])
        return self.combined(tensor, prepared, solution)

    def combined(self, tensor: int, prepared: Prepared, solution: Solution | None, *, reused: bool = False) -> Prepared:
        """Return the updates with their combination, where that is added to the base.

        Args:
            tensor: Its index.
            prepared: What was read.
            solution: Of its group.
            reused: Whether it was read for measuring, and a second read is saved.
        """
        planned = self._plan.tensors[tensor]
        if reused:
            self._source.count_reused(factor_bytes(planned))
        if solution is None or not planned.factored or planned.merged_rank is not None:
            return prepared
        points = [prepared.updates.get(index) for index in self._plan.points]
        from pipeline.numerics.low_rank.output import LowRankCombination

        combination = LowRankCombination(points, solution.factors)
        return replace(prepared, combination=combination)

    def measure(self, chunk: Chunk, prepared: Prepared) -> tuple[ChunkRow, dict[int, int]]:
        """Return a chunk's statistics and, by input index, how many values are not finite."""
        plan = self._plan
        if plan.tensors[chunk.tensor].factored:
            from pipeline.engine.factor_math import measure_factors

            sums = chunk_checksums(plan, None, prepared.checksums)
            return measure_factors(plan, chunk.tensor, prepared.updates, sums), {}
        with self._source.lease(chunk, measured_inputs(plan, chunk.tensor), keep=True) as loaded:
            return self._measured(loaded, prepared)

    def measure_and_merge(
        self, chunk: Chunk, prepared: Prepared, solve: Callable[[ChunkRow], Solution | None]
    ) -> tuple[ChunkRow, MergedChunk]:
        """Return the statistics of a chunk that is all of its group, and the merged chunk, by one read.

        Args:
            chunk: Which.
            prepared: The tensor's updates.
            solve: Makes the group's solution from its only row.

        Raises:
            CheckpointError: A model is not finite.
        """
        plan = self._plan
        again = merged_inputs(plan, chunk.tensor)
        with self._source.lease(chunk, (*measured_inputs(plan, chunk.tensor), *again)) as loaded:
            row, bad = self._measured(loaded, prepared)
            if bad:
                raise non_finite_error(plan, {(chunk.tensor, index): count for index, count in bad.items()})
            solution = solve(row)
            self._source.count_reused(sum(loaded.raw[index].nbytes for index in again))
            return row, self._merged(loaded, solution, prepared)

    def probe(self, chunk: Chunk, prepared: Prepared, coefficients_QN: np.ndarray) -> np.ndarray:
        """Return Q·N squared distances and Q·Q products of one chunk, in one row."""
        plan = self._plan
        if plan.tensors[chunk.tensor].factored:
            from pipeline.engine.factor_math import probe_factors

            return probe_factors(plan, prepared.updates, coefficients_QN)
        with self._source.lease(chunk, dense_inputs(plan, chunk.tensor, probed_points(plan)), keep=True) as loaded:
            self.advance(loaded.nbytes)
            metric = self._metric_of(chunk, prepared)
            return probe_chunk(plan, loaded, prepared.updates, coefficients_QN, self._kernels, metric)

    def merge(
        self,
        chunk: Chunk,
        solution: Solution | None,
        checksums: Checksums,
        prepared: Prepared,
    ) -> MergedChunk:
        """Return a merged chunk.

        Args:
            chunk: Which.
            solution: Of its group; None for a tensor that is copied.
            checksums: What the first read left.
            prepared: The tensor's updates, combined.

        Raises:
            VerificationError: Bytes differ from the first read, or a merged value overflows the output dtype.
        """
        plan = self._plan
        tensor = plan.tensors[chunk.tensor]
        if solution is not None and tensor.merged_rank is not None:
            from pipeline.engine.factor_math import write_factors

            return write_factors(plan, chunk.tensor, prepared.updates, solution)
        with self._source.lease(chunk, merged_inputs(plan, chunk.tensor), drop=True) as loaded:
            if plan.settings.measured and tensor.shared is None and plan.is_weighed(chunk.tensor):
                check_sums(plan, loaded, checksums[chunk.tensor, chunk.start], prepared.checksums)
            else:
                self._source.check_copies(loaded)
            if solution is None:
                check_agreement(plan, loaded)
            return self._merged(loaded, solution, prepared)

    def is_one_read(self, tensor: int) -> bool:
        """Return whether a tensor is measured and merged by one lease of its only chunk, if one task does both."""
        measured, written = self._plan.measured_chunks(tensor), self._plan.written_chunks(tensor)
        return bool(measured) and measured == written and not self._plan.tensors[tensor].factored

    def needs_to_measure(self, chunk: Chunk) -> Iterator[Need]:
        """Yield what `measure` will ask for, and `read` before a tensor's first chunk."""
        if chunk.start == 0:
            yield from self._factor_needs(chunk.tensor, keep=True)
        if not self._plan.tensors[chunk.tensor].factored:
            yield from _chunk_needs(chunk, measured_inputs(self._plan, chunk.tensor), keep=True)

    def needs_to_probe(self, chunk: Chunk) -> Iterator[Need]:
        """Yield what `probe` will ask for, and `read` before a tensor's first chunk."""
        if chunk.start == 0:
            yield from self._factor_needs(chunk.tensor, keep=True)
        if not self._plan.tensors[chunk.tensor].factored:
            inputs = dense_inputs(self._plan, chunk.tensor, probed_points(self._plan))
            yield from _chunk_needs(chunk, inputs, keep=True)

    def needs_to_merge(self, chunk: Chunk) -> Iterator[Need]:
        """Yield what `merge` will ask for, and `read_again` before a tensor's first chunk."""
        if chunk.start == 0:
            yield from self._factor_needs(chunk.tensor, drop=True)
        yield from _chunk_needs(chunk, merged_inputs(self._plan, chunk.tensor), drop=True)

    def needs_of_all(self, tensor: int) -> Iterator[Need]:
        """Yield what a tensor that is done by one task will ask for: `read`, then all of `measure` and `merge`."""
        plan = self._plan
        measured, written = plan.measured_chunks(tensor), plan.written_chunks(tensor)
        yield from self._factor_needs(tensor)
        if self.is_one_read(tensor):
            inputs = (*measured_inputs(plan, tensor), *merged_inputs(plan, tensor))
            yield from _chunk_needs(measured[0], inputs)
            return
        if not plan.tensors[tensor].factored:
            for chunk in measured:
                yield from _chunk_needs(chunk, measured_inputs(plan, tensor), keep=True)
        for chunk in written:
            yield from _chunk_needs(chunk, merged_inputs(plan, tensor), drop=True)

    def _factor_needs(self, tensor: int, *, keep: bool = False, drop: bool = False) -> Iterator[Need]:
        if self._plan.tensors[tensor].updates:
            yield Need(tensor=tensor, keep=keep, drop=drop)

    def _measured(self, loaded: Loaded, prepared: Prepared) -> tuple[ChunkRow, dict[int, int]]:
        self._source.check_copies(loaded)
        if self._plan.tensors[loaded.chunk.tensor].group < 0:
            check_agreement(self._plan, loaded)
        sums = chunk_checksums(self._plan, loaded, prepared.checksums)
        metric = self._metric_of(loaded.chunk, prepared)
        row = measure_chunk(self._plan, loaded, prepared.updates, sums, self._kernels, metric)
        self.advance(loaded.nbytes + self._metric_bytes(loaded.chunk))
        return row

    def _merged(self, loaded: Loaded, solution: Solution | None, prepared: Prepared) -> MergedChunk:
        read = sum(loaded.raw[index].nbytes for index in merged_inputs(self._plan, loaded.chunk.tensor))
        self.advance(read + self._metric_bytes(loaded.chunk))
        if prepared.combination is not None:
            from pipeline.engine.factor_math import write_panel

            return write_panel(self._plan, loaded, prepared.combination, self._device)
        metric = self._metric_of(loaded.chunk, prepared)
        return write_chunk(self._plan, loaded, prepared.updates, solution, self._kernels, metric)

    def _with_metric(self, tensor: int, prepared: Prepared) -> Prepared:
        metric = None if self._metric is None else self._metric.of_tensor(tensor)
        return prepared if metric is None else replace(prepared, metric=metric)

    def _metric_bytes(self, chunk: Chunk) -> int:
        """Return what a chunk counts of its tensor's metric: its part of a diagonal; the last one, of a matrix all."""
        planned = self._plan.tensors[chunk.tensor]
        if planned.metric is None or planned.metric.kind != "diagonal":
            return metric_bytes(planned) if chunk.stop == planned.elements else 0
        return metric_bytes(planned) // planned.elements * chunk.elements

    def _metric_of(self, chunk: Chunk, prepared: Prepared) -> Metric | None:
        return None if self._metric is None else self._metric.of_chunk(chunk, prepared.metric)

    def _read(self, tensor: int, *, keep: bool = False, drop: bool = False) -> Prepared:
        from pipeline.engine.factor_math import low_ranks

        loaded = self._source.factors(tensor, keep=keep, drop=drop)
        updates = low_ranks(self._plan, loaded, self._device)
        checksums = {index: loaded.checksum(index) for index in loaded.raw}
        self.advance(loaded.nbytes)
        return Prepared(updates=updates, checksums=checksums, combination=None)

    def advance(self, size_bytes: int) -> None:
        """Count input bytes as done, for progress."""
        with self._lock:
            self.done_bytes += size_bytes


def _chunk_needs(chunk: Chunk, inputs: Sequence[int], *, keep: bool = False, drop: bool = False) -> Iterator[Need]:
    """Yield the need of a lease; none where no input is read."""
    if inputs:
        distinct = tuple(dict.fromkeys(inputs))
        yield Need(tensor=chunk.tensor, chunk=chunk, inputs=distinct, keep=keep, drop=drop)
