"""How much memory a worker takes: a sum of named terms, and what the rest of the budget buys.

Owns the projection that is checked before work starts and measured in the tests. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.checkpoints.tables import GROUP_BYTES
from pipeline.errors import BudgetError, Problem
from pipeline.numerics.kernels import work_bytes
from pipeline.numerics.low_rank import low_rank_work_bytes, merged_factors_bytes
from pipeline.planning.plan import Plan, TensorPlan
from pipeline.planning.system import Statistic
from pipeline.planning.system_memory import chunk_bytes, largest_matrix
from pipeline.planning.traffic import (
    factor_bytes,
    kept_bytes,
    kept_inputs,
    measured_inputs,
    merged_inputs,
    one_read_bytes,
)
from pipeline.units import format_bytes

# A Python process with pyarrow, Ray and torch: 470 to 600 MB measured, rounded up. Without the last two it is half.
RUNTIME_BYTES = 650_000_000
# The plan itself: per tensor and input, with its object's overhead and its second form while it is handed to a worker.
PLAN_BYTES = 1500
# A kept chunk of one input: array, dictionary entry and the allocator's rounding.
KEPT_OVERHEAD_BYTES = 500
# A remote upload holds the part that grows and the one that is sent.
UPLOAD_BYTES = 64_000_000
# What fsspec, a backend such as s3fs, its threads and its connections take: 36 MB measured before the first byte.
CLIENT_BYTES = 80_000_000
# Copies of a row group of statistics alive at once: rows, Arrow's arrays and buffers, and what is compressed.
ROW_COPIES = 4
# Overhead of a row's object and its arrays.
ROW_OVERHEAD_BYTES = 600
# The digits of an exact sum and what carrying them takes: 24 measured for values of one kind, far more if they differ.
SUM_BYTES = 64
# A number of a tuple: pointer and object.
NUMBER_BYTES = 32
# One request of a remote read is at most this long: object stores are read fastest by 8 to 16 MB at a time.
REQUEST_BYTES = 8 << 20
# A response is held in pieces, then whole, until it is copied to where it belongs.
RESPONSE_COPIES = 2
# Bytes of local inputs that stay in a worker after it has looked at them in place, where there is room: fewer are taken
# out of it more often, which has to be told to all cores.
IN_PLACE_BYTES = 64_000_000
# Bytes of models that may always be kept: fresh memory for them costs some hundredths of a second.
CHEAP_BYTES = 64_000_000
# What making a Gram's factor takes beside it, per element of the matrix: itself in float64, and its triangle as read.
MAKING_BYTES = 8 + 4
# Requests that keep an object store busy: each alone is bound by latency; more only wait for the network or the CPU.
MOST_REQUESTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What one worker may hold.

    Attributes:
        terms: Named parts of the projection, in bytes.
        threads: Chunks that keep the cores busy; one more is read meanwhile.
        window: Chunks in flight. Any of them may be computed at a time, so each counts with its working memory.
        retained_bytes: Room for chunks kept from the measuring read; part of the terms.
        requests: Requests that may be in flight; 0 when all inputs are local and threads read for themselves.
        ahead_bytes: Room for what is read before a thread asks for it.
        in_place_bytes: Room for pages of local files that were looked at in place; 0 where everything is read.
        systems_bytes: Room for the matrices that are being solved.
    """

    terms: Mapping[str, int]
    threads: int
    window: int
    retained_bytes: int
    requests: int = 0
    ahead_bytes: int = 0
    in_place_bytes: int = 0
    systems_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The projection: the sum of its terms."""
        return sum(self.terms.values())


def slot_bytes(plan: Plan) -> int:
    """Return the bytes of one chunk in flight: every input's range, tied copies, and the merged chunk."""
    return max((_slot_bytes(plan, index) for index in range(len(plan.tensors))), default=0)


def _slot_bytes(plan: Plan, index: int) -> int:
    """Return the bytes that one chunk of a tensor takes in flight."""
    tensor = plan.tensors[index]
    read = sorted({*measured_inputs(plan, index), *merged_inputs(plan, index)})
    sources = [source for number in read if (source := tensor.sources[number]) is not None]
    inputs = sum(DTYPES[source.dtype].bits // 8 * (2 if source.copies else 1) for source in sources)
    length = max((chunk.elements for chunk in plan.written_chunks(index)[:1]), default=0)
    if tensor.merged_rank is not None:
        return length * inputs + tensor.stored_bytes
    # The kernels also make a copy of each point where they are not of one dtype; 8 bytes an element bounds it.
    copies = plan.settings.cast or plan.settings.non_finite == "base" or _is_mixed(tensor)
    # Values that adapters stand on are cast beside the points that are made of them.
    points = 1 if tensor.shared is not None else len(plan.points) + (len(read) if tensor.updates else 0)
    # In a metric all points are mapped, and one more is held as it is, with its difference and its image.
    mapped = 0 if tensor.metric is None else 8 * (len(plan.points) + 3)
    return length * (inputs + DTYPES[tensor.dtype].bits // 8 + (8 * points if copies else 0) + mapped) + chunk_bytes(
        plan, tensor, length
    )


def lease_bytes(plan: Plan) -> int:
    """Return the bytes of the largest chunk, all inputs that any pass reads of it together."""
    largest = 0
    for index, tensor in enumerate(plan.tensors):
        read = {*measured_inputs(plan, index), *merged_inputs(plan, index)}
        widths = (DTYPES[source.dtype].bits // 8 for number in read if (source := tensor.sources[number]) is not None)
        length = max((chunk.elements for chunk in plan.written_chunks(index)[:1]), default=0)
        largest = max(largest, length * sum(widths))
    return largest


def _is_mixed(tensor: TensorPlan) -> bool:
    """Return whether a tensor's points must be widened to one dtype before the kernels take them."""
    dtypes = {source.dtype for source in tensor.sources if source is not None}
    composed = bool(tensor.updates) and tensor.shared is None
    return tensor.group >= 0 and (composed or len(dtypes) > 1 or not dtypes <= {"BF16", "F32", "F64"})


def _work_bytes(plan: Plan) -> int:
    """Return the working memory of the kernels on one chunk, or on one tensor's factors."""
    points = max((1 if tensor.shared is not None else len(plan.points) for tensor in plan.tensors), default=1)
    largest = work_bytes(points)
    for index, tensor in enumerate(plan.tensors):
        if tensor.updates:
            ranks = [update.rank for update in tensor.updates]
            rows = tensor.rows
            if not tensor.factored:
                rows = max(1, plan.written_chunks(index)[0].elements // max(1, tensor.columns))
            largest = max(largest, low_rank_work_bytes(rows, tensor.columns, ranks))
            if tensor.merged_rank:
                largest = max(largest, merged_factors_bytes(rows, tensor.columns, ranks, plan.settings.rank))
    return largest


def _metric_bytes(plan: Plan, window: int) -> int:
    """Return what the factors of Grams take that a worker holds with so many chunks in flight, and one being made.

    Beside those of the chunks' tensors the one before them is still held.
    """
    largest = most = 0
    for file in plan.files:
        held = [(plan.tensors[index].metric, len(plan.measured_chunks(index))) for index in file.tensors]
        factors = [
            (found, chunks) for found, chunks in held if chunks and found is not None and found.kind != "diagonal"
        ]
        for first in range(len(factors)):
            sizes: dict[Statistic, int] = {}
            between = 0
            for found, chunks in factors[first:]:
                if between > window - 1 and len(sizes) > 1:
                    break
                between += chunks if sizes else 0
                sizes[found] = 8 * found.size**2
            most = max(most, sum(sizes.values()))
            largest = max(largest, *sizes.values())
    return most + largest // 8 * MAKING_BYTES


def _statistics_bytes(plan: Plan) -> int:
    """Return what the distances of one file's chunks and of all groups take, and the sums over what is written."""
    points = len(plan.points)
    pairs = points * (points - 1) // 2
    written = max((len(plan.chunks(number)) for number in range(len(plan.files))), default=0)
    sums = written * (2 * points + 1) * NUMBER_BYTES
    if not plan.settings.measured:
        return sums
    rows = max((sum(len(plan.measured_chunks(t)) for t in file.tensors) for file in plan.files), default=0)
    row_bytes = 8 * (pairs + points + len(plan.inputs)) + ROW_OVERHEAD_BYTES
    saved = ROW_COPIES * min(rows * row_bytes, GROUP_BYTES + row_bytes)
    checksums = rows * (8 * len(plan.inputs) + ROW_OVERHEAD_BYTES)
    # A group that is solved within a file is summed and forgotten; of each the table of distances stays, and its text.
    alone = {plan.tensors[index].group for file in plan.files if file.fused for index in file.tensors}
    solved = [number for number, group in enumerate(plan.groups) if group.coefficients is None]
    summed = max(1, sum(number not in alone for number in solved))
    return saved + checksums + sums + summed * pairs * SUM_BYTES + 3 * len(solved) * points * points * 8


def project_memory(
    plan: Plan, *, budget_bytes: int, threads: int, remote_output: bool = False, cache_bytes: int = 0
) -> Memory:
    """Return what a worker will hold at most, using the budget for read-ahead and retention.

    Args:
        plan: The plan.
        remote_output: Whether output files are uploaded in parts.
        budget_bytes: What one worker may take, `--memory`.
        threads: Chunks that a worker may compute at once.
        cache_bytes: Bytes of files that the operating system can hold in memory; 0 where that is not known.

    Raises:
        BudgetError: Not even one chunk in flight fits; names the budget that would.
    """
    remote = any("://" in item.url for item in (*plan.inputs, *plan.statistics))
    response = RESPONSE_COPIES * REQUEST_BYTES
    matrix = largest_matrix(plan)
    fixed = _fixed_terms(plan, remote=remote, remote_output=remote_output, matrix=matrix)
    request = {"one request in flight": response} if remote else {}
    in_flight = _InFlight(plan)
    one = in_flight.terms(1)
    _require(plan, {**fixed, "one chunk in flight": one.pop("chunks in flight"), **one, **request}, budget_bytes)
    # One chunk is read while the others are computed; more in flight than that only costs memory.
    window = in_flight.window(budget_bytes - sum(fixed.values()) - sum(request.values()), threads + 1)
    threads = max(1, window - 1)
    used = {**fixed, **in_flight.terms(window)}
    requests, ahead = _read_ahead(plan, budget_bytes - sum(used.values())) if remote else (0, 0)
    if remote:
        used |= {"requests in flight": requests * response, "read-ahead": ahead}
    left = max(0, budget_bytes - sum(used.values()))
    more = min(left, threads * largest_matrix(plan, resident=True) - matrix) if matrix else 0
    if more:
        used["more matrices"] = more
    in_place = IN_PLACE_BYTES if not remote and left - more >= IN_PLACE_BYTES else 0
    if in_place:
        used["files in place"] = in_place
    left = max(0, budget_bytes - sum(used.values()))
    if not plan.settings.measured or (not remote and _stays_cached(plan, cache_bytes - sum(used.values()))):
        left = 0
    retained, kept = _retention(plan, left)
    return Memory(
        terms={**used, "retained": retained},
        threads=threads,
        window=window,
        retained_bytes=kept,
        requests=requests,
        # Factors that were read ahead lie beside the buffer that chunks are read into.
        ahead_bytes=ahead // 2 if "factors" in used else ahead,
        in_place_bytes=in_place,
        systems_bytes=matrix + more,
    )


def _fixed_terms(plan: Plan, *, remote: bool, remote_output: bool, matrix: int) -> dict[str, int]:
    """Return what a worker takes whatever it has in flight."""
    places = sum(len(tensor.holders) + 2 * len(tensor.updates) for tensor in plan.tensors)
    return {
        "runtime": RUNTIME_BYTES,
        **({"storage client": CLIENT_BYTES} if remote or remote_output else {}),
        "plan": PLAN_BYTES * places,
        "statistics": _statistics_bytes(plan),
        **({"upload": UPLOAD_BYTES} if remote_output else {}),
        **({"matrix": matrix} if matrix else {}),
    }


class _InFlight:
    """What chunks in flight take.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._slot = slot_bytes(plan)
        self._work = _work_bytes(plan)
        self._factors = max(map(factor_bytes, plan.tensors), default=0)

    def terms(self, window: int) -> dict[str, int]:
        """Return the named bytes of so many chunks."""
        metric = _metric_bytes(self._plan, window)
        return {
            "chunks in flight": window * self._slot,
            "work": window * self._work,
            # Beside those of the chunks in flight, the factors that were used last are held for the next chunk.
            **({"factors": (window + 1) * self._factors} if self._factors else {}),
            **({"metric": metric} if metric else {}),
        }

    def window(self, room_bytes: int, most: int) -> int:
        """Return how many chunks fit into a room that fits one, up to `most`."""
        return next((window for window in range(most, 1, -1) if sum(self.terms(window).values()) <= room_bytes), 1)


def _require(plan: Plan, smallest: Mapping[str, int], budget_bytes: int) -> None:
    """Raise when the least that a worker can do with does not fit."""
    needed = sum(smallest.values())
    if needed > budget_bytes:
        raise BudgetError(
            Problem(
                what=f"a worker needs {format_bytes(needed)} ({_listed(smallest)}),"
                f" but may take {format_bytes(budget_bytes)}",
                where=f"{len(plan.inputs)} checkpoints, chunks of {plan.chunk_elements} elements",
                remedy=f"give at least --memory {-(-needed // 1_000_000)}MB",
            )
        )


def _stays_cached(plan: Plan, cache_bytes: int) -> bool:
    """Return whether the second read of local files comes from the operating system's memory, and keeping costs more.

    To read a page again that is cached takes a fifth of the time of fresh memory to keep it in. Not so where there are
    more reads than two, or many small ones: of factors.
    """
    if plan.settings.distances == "stream" or any(tensor.updates for tensor in plan.tensors):
        return False
    everything = sum(kept_bytes(plan, index) for index in range(len(plan.tensors)))
    touched = one_read_bytes(plan) + sum(file.size_bytes for file in plan.files)
    return everything > CHEAP_BYTES and touched <= cache_bytes


def _retention(plan: Plan, room_bytes: int) -> tuple[int, int]:
    """Return what keeping chunks for the second read takes of so much memory, and how many of their bytes it keeps."""
    everything = sum(kept_bytes(plan, index) for index in range(len(plan.tensors)))
    pieces = sum(
        len(plan.measured_chunks(index)) * len(kept_inputs(plan, index)) + 2 * len(tensor.updates)
        for index, tensor in enumerate(plan.tensors)
    )
    # Every kept piece costs its bytes and its overhead; the room that is handed out is for the bytes.
    whole = everything + pieces * KEPT_OVERHEAD_BYTES
    retained = min(room_bytes, whole)
    return retained, retained * everything // max(1, whole)


def _read_ahead(plan: Plan, room_bytes: int) -> tuple[int, int]:
    """Return how many requests to have in flight and how many bytes to read ahead, with so much memory left."""
    # A request's bytes are held twice: as a response, and where it is copied to.
    fitting = room_bytes // ((RESPONSE_COPIES + 1) * REQUEST_BYTES)
    # No more requests than there is to read, and one in any case: its response was set aside.
    everything = one_read_bytes(plan)
    requests = max(1, min(MOST_REQUESTS, fitting, -(-everything // REQUEST_BYTES)))
    rest = max(0, room_bytes - requests * RESPONSE_COPIES * REQUEST_BYTES)
    # A large request of each input at a time, and the next ones under way meanwhile.
    wanted = REQUEST_BYTES * max(requests, 2 * len(plan.inputs))
    return requests, min(rest, wanted, everything)


def _listed(terms: Mapping[str, int]) -> str:
    return " + ".join(f"{name} {format_bytes(size)}" for name, size in terms.items())
