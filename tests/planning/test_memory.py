"""The projected memory of a worker."""

import dataclasses
import itertools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import BudgetError
from pipeline.numerics.kernels import work_bytes
from pipeline.planning.layout import lay_out
from pipeline.planning.memory import (
    CHEAP_BYTES,
    CLIENT_BYTES,
    IN_PLACE_BYTES,
    KEPT_OVERHEAD_BYTES,
    MOST_REQUESTS,
    PLAN_BYTES,
    REQUEST_BYTES,
    RESPONSE_COPIES,
    RUNTIME_BYTES,
    UPLOAD_BYTES,
    lease_bytes,
    project_memory,
    slot_bytes,
)
from pipeline.planning.plan import Plan, Source, TensorPlan
from pipeline.units import format_bytes
from tests.planning.plans import plan_by_hand, tensor

LENGTH = 1 << 18


def plan(inputs: int = 9, tensors: int = 20, elements: int = 3 << 18, **words: object) -> Plan:
    items = [tensor(f"t{number}", elements, dtype="BF16", inputs=("BF16",) * inputs) for number in range(tensors)]
    files = lay_out(items, file_size_bytes=8 * elements, solve_in_file=False)
    return plan_by_hand(items, files, inputs=inputs, chunk_elements=LENGTH, **words)


def smallest(of: Plan, *, remote_output: bool = False) -> int:
    """The budget that the refusal of almost none names."""
    with pytest.raises(BudgetError) as caught:
        project_memory(of, budget_bytes=1, threads=4, remote_output=remote_output)
    found = re.fullmatch(r"give at least --memory (\d+)MB", caught.value.problems[0].remedy)
    assert found is not None
    return int(found[1]) * 1_000_000


@pytest.mark.parametrize("inputs", [2, 3, 9, 21, 100])
@pytest.mark.parametrize("threads", [1, 4, 64])
def test_the_budget_that_a_refusal_names_fits_and_less_does_not(inputs: int, threads: int) -> None:
    of = plan(inputs)
    named = smallest(of)
    memory = project_memory(of, budget_bytes=named, threads=threads)
    assert memory.total_bytes <= named
    assert (memory.threads, memory.window) == (1, 1)
    with pytest.raises(BudgetError):
        project_memory(of, budget_bytes=named - 1_000_000, threads=threads)


def test_a_refusal_names_its_terms() -> None:
    of = plan()
    with pytest.raises(BudgetError) as caught:
        project_memory(of, budget_bytes=1_000_000, threads=4)
    (problem,) = caught.value.problems
    terms = ("runtime 650 MB", "plan 270 KB", "statistics ", f"one chunk in flight {format_bytes(slot_bytes(of))}")
    for word in (*terms, "work "):
        assert word in problem.what
    assert "upload" not in problem.what
    with pytest.raises(BudgetError, match=r"upload 64 MB"):
        project_memory(of, budget_bytes=1_000_000, threads=4, remote_output=True)
    assert problem.what.endswith("but may take 1 MB")
    assert problem.where == f"9 checkpoints, chunks of {LENGTH} elements"
    assert caught.value.exit_code == 4


@settings(max_examples=150, deadline=None)
@given(st.integers(650, 20_000), st.integers(1, 32), st.integers(2, 30), st.booleans(), st.booleans())
def test_the_sum_of_the_terms_never_exceeds_the_budget(
    megabytes: int, threads: int, inputs: int, measured: bool, remote: bool
) -> None:
    of = plan(inputs, tensors=3, measured=measured)
    budget = megabytes * 1_000_000
    try:
        memory = project_memory(of, budget_bytes=budget, threads=threads, remote_output=remote)
    except BudgetError:
        assert budget < smallest(of, remote_output=remote)
        return
    assert memory.total_bytes == sum(memory.terms.values()) <= budget
    names = {"runtime", "plan", "statistics", "chunks in flight", "work", "retained"}
    # There is room for files in place, or there is not.
    assert memory.terms.get("files in place", 0) == memory.in_place_bytes in (0, IN_PLACE_BYTES)
    assert set(memory.terms) - {"files in place"} == (names | {"upload", "storage client"} if remote else names)
    left = budget - memory.total_bytes + memory.terms["retained"]
    assert memory.in_place_bytes or left < IN_PLACE_BYTES
    assert min(memory.terms.values()) >= 0
    assert memory.terms["runtime"] == RUNTIME_BYTES
    assert memory.terms["plan"] == PLAN_BYTES * 3 * inputs
    assert memory.terms.get("upload", 0) == (UPLOAD_BYTES if remote else 0)
    assert memory.terms["chunks in flight"] == memory.window * slot_bytes(of)
    # Each chunk in flight may be in a kernel: the worker has that many threads.
    assert memory.terms["work"] == memory.window * work_bytes(inputs)
    # All pieces are of one size here: the room is as large as the term allows with the overhead of each, to the byte.
    piece = 2 * LENGTH
    assert memory.retained_bytes == memory.terms["retained"] * piece // (piece + KEPT_OVERHEAD_BYTES)
    assert 1 <= memory.threads <= threads
    assert memory.window in (memory.threads, memory.threads + 1)
    assert measured or memory.retained_bytes == 0


def test_more_memory_never_buys_less() -> None:
    of = plan()
    steps = [project_memory(of, budget_bytes=budget * 50_000_000, threads=6) for budget in range(14, 200)]
    for less, more in itertools.pairwise(steps):
        assert more.threads >= less.threads
        assert more.window >= less.window
        assert more.total_bytes >= less.total_bytes
    assert (steps[0].threads, steps[0].window) < (6, 7)
    assert steps[-1].threads == 6
    assert steps[-1].window == 7


def test_retention_is_bounded_by_what_there_is_to_keep() -> None:
    of = plan()
    memory = project_memory(of, budget_bytes=10**13, threads=2)
    # The base is not read again.
    everything = sum(item.elements for item in of.tensors) * 2 * 8
    assert memory.retained_bytes == everything
    assert memory.terms["retained"] == everything + 20 * 3 * 8 * KEPT_OVERHEAD_BYTES
    assert memory.total_bytes < 2 * 10**9
    tight = project_memory(of, budget_bytes=smallest(of) + 100_000_000, threads=1)
    assert 0 < tight.retained_bytes < tight.terms["retained"] <= 100_000_000


def test_nothing_is_kept_that_the_system_holds_in_memory_anyway() -> None:
    of = plan()
    plain = project_memory(of, budget_bytes=10**10, threads=2)
    assert plain.retained_bytes > CHEAP_BYTES
    read = sum(item.elements for item in of.tensors) * 2 * 9
    touched = read + sum(file.size_bytes for file in of.files) + plain.total_bytes - plain.terms["retained"]
    cached = project_memory(of, budget_bytes=10**10, threads=2, cache_bytes=touched)
    assert (cached.retained_bytes, cached.terms["retained"]) == (0, 0)
    assert dict(cached.terms) == {**plain.terms, "retained": 0}
    assert (cached.threads, cached.window) == (plain.threads, plain.window)
    # A byte less would be read from the disk.
    assert project_memory(of, budget_bytes=10**10, threads=2, cache_bytes=touched - 1) == plain
    # Each further pass is worth the memory.
    stream = plan(distances="stream")
    kept = project_memory(stream, budget_bytes=10**10, threads=2, cache_bytes=10**12)
    assert kept.retained_bytes == plain.retained_bytes


def test_what_is_small_is_kept_all_the_same() -> None:
    of = plan(tensors=1, elements=3 << 18)
    memory = project_memory(of, budget_bytes=10**10, threads=2, cache_bytes=10**12)
    assert 0 < memory.retained_bytes == 3 * 2 * 8 * LENGTH <= CHEAP_BYTES


@pytest.mark.parametrize(("place", "keeps"), [("s3://bucket/m0", True), ("/models/m0", False)])
def test_what_comes_from_an_object_store_is_kept(place: str, keeps: bool) -> None:
    of = plan()
    inputs = (dataclasses.replace(of.inputs[0], url=place), *of.inputs[1:])
    memory = project_memory(dataclasses.replace(of, inputs=inputs), budget_bytes=10**10, threads=2, cache_bytes=10**12)
    assert (memory.retained_bytes > 0) is keeps


def test_many_small_pieces_leave_less_room_for_their_bytes() -> None:
    """Of a piece as small as its overhead only half the term is bytes."""
    items = [tensor(f"t{number}", KEPT_OVERHEAD_BYTES // 4, inputs=("F32",) * 3) for number in range(100)]
    of = plan_by_hand(items, lay_out(items, file_size_bytes=10**9, solve_in_file=False), inputs=3)
    memory = project_memory(of, budget_bytes=10**9, threads=1)
    everything = 100 * 2 * KEPT_OVERHEAD_BYTES
    assert (memory.retained_bytes, memory.terms["retained"]) == (everything, 2 * everything)
    tight = project_memory(of, budget_bytes=memory.total_bytes - everything, threads=1)
    assert (tight.retained_bytes, tight.terms["retained"]) == (everything // 2, everything)


def test_the_plan_itself_counts_by_tensor_and_input() -> None:
    few, more, wider = (
        project_memory(of, budget_bytes=10**10, threads=1) for of in (plan(9, 20), plan(9, 40), plan(18, 20))
    )
    assert few.terms["plan"] == 20 * 9 * PLAN_BYTES
    assert more.terms["plan"] == wider.terms["plan"] == 2 * few.terms["plan"]


def test_an_upload_is_held_beside_the_rest() -> None:
    of = plan()
    local = project_memory(of, budget_bytes=10**10, threads=2)
    remote = project_memory(of, budget_bytes=10**10, threads=2, remote_output=True)
    assert dict(remote.terms) == {**local.terms, "upload": UPLOAD_BYTES, "storage client": CLIENT_BYTES}
    named = smallest(of, remote_output=True)
    assert named == smallest(of) + UPLOAD_BYTES + CLIENT_BYTES  # all are whole megabytes
    with pytest.raises(BudgetError):
        project_memory(of, budget_bytes=named - 1_000_000, threads=1, remote_output=True)
    assert project_memory(of, budget_bytes=named, threads=1, remote_output=True).total_bytes <= named


def remote(inputs: int = 9, **words: Any) -> Plan:
    """The same plan with one input in a bucket."""
    of = plan(inputs, **words)
    far = dataclasses.replace(of.inputs[0], url="s3://bucket/m0")
    return dataclasses.replace(of, inputs=(far, *of.inputs[1:]))


@settings(max_examples=150, deadline=None)
@given(st.integers(650, 8_000), st.integers(1, 32), st.integers(2, 100), st.booleans())
def test_read_ahead_stays_within_the_budget(megabytes: int, threads: int, inputs: int, measured: bool) -> None:
    of = remote(inputs, tensors=3, measured=measured)
    budget = megabytes * 1_000_000
    try:
        memory = project_memory(of, budget_bytes=budget, threads=threads)
    except BudgetError:
        assert budget < smallest(of)
        return
    assert memory.total_bytes == sum(memory.terms.values()) <= budget
    assert 1 <= memory.requests <= MOST_REQUESTS
    assert memory.terms["requests in flight"] == memory.requests * RESPONSE_COPIES * REQUEST_BYTES
    assert memory.terms["read-ahead"] == memory.ahead_bytes >= 0
    assert memory.terms["storage client"] == CLIENT_BYTES
    assert memory.window >= 1
    # A chunk's ranges are part of what a chunk in flight counts.
    assert lease_bytes(of) < slot_bytes(of)


def test_a_remote_input_needs_one_response_and_a_client_more() -> None:
    named = smallest(remote())
    assert 0 <= named - smallest(plan()) - CLIENT_BYTES - RESPONSE_COPIES * REQUEST_BYTES <= 1_000_000
    memory = project_memory(remote(), budget_bytes=named, threads=4)
    assert (memory.requests, memory.window, memory.threads) == (1, 1, 1)
    assert memory.ahead_bytes < 1_000_000
    local = project_memory(plan(), budget_bytes=named, threads=4)
    assert (local.requests, local.ahead_bytes) == (0, 0)


def test_more_memory_reads_further_ahead_up_to_what_a_store_can_use() -> None:
    of = remote(tensors=400)
    steps = [project_memory(of, budget_bytes=budget * 50_000_000, threads=2) for budget in range(20, 60)]
    for less, more in itertools.pairwise(steps):
        assert more.requests >= less.requests
        assert more.ahead_bytes >= less.ahead_bytes
    assert steps[0].requests < MOST_REQUESTS == steps[-1].requests
    assert steps[-1].ahead_bytes == MOST_REQUESTS * REQUEST_BYTES
    # Two large requests of each input, however many there are.
    assert project_memory(remote(100, tensors=400), budget_bytes=10**10, threads=2).ahead_bytes == 200 * REQUEST_BYTES


def test_no_more_is_read_ahead_than_there_is() -> None:
    of = remote(3, tensors=2, elements=1000)
    memory = project_memory(of, budget_bytes=10**10, threads=2)
    assert (memory.requests, memory.ahead_bytes) == (1, 3 * 2 * 1000 * 2)


def test_a_chunk_in_flight_is_every_input_and_the_output() -> None:
    wide = TensorPlan(
        name="w",
        shape=(1000,),
        elements=1000,
        dtype="F32",
        group=0,
        sources=(
            Source(file=0, start=0, dtype="BF16"),
            Source(file=0, start=0, dtype="F32", copies=((0, 9),)),
            Source(file=0, start=0, dtype="F64"),
        ),
    )
    narrow = tensor("n", 10, dtype="BF16", inputs=("F32", "BF16", "BF16"))
    of = plan_by_hand([wide, narrow], [], chunk_elements=LENGTH)
    # Each input, its tied copy, the output, and a copy of each point in one dtype, of the tensor that takes most.
    assert slot_bytes(of) == 1000 * ((2 + 4 + 8) + 4 + 4 + 3 * 8)
    assert slot_bytes(plan_by_hand([wide, narrow], [], chunk_elements=100)) == 100 * (22 + 24)
    # The copy is made once, whatever the reason.
    assert slot_bytes(plan_by_hand([wide, narrow], [], chunk_elements=100, cast="F32")) == 100 * (22 + 24)
    assert slot_bytes(plan_by_hand([wide, narrow], [], chunk_elements=100, non_finite="base")) == 100 * (22 + 24)
    assert slot_bytes(plan_by_hand([], [])) == 0


@pytest.mark.parametrize(
    ("dtypes", "group", "copies"),
    [
        (("BF16", "BF16", "BF16"), 0, 0),
        (("F32", "F32", "F32"), 0, 0),
        (("F64", "F64", "F64"), 0, 0),
        (("F16", "F16", "F16"), 0, 3),  # no kernel takes float16 as it is
        (("BF16", "BF16", "F32"), 0, 3),
        (("F32", "BF16", "BF16"), 0, 3),
        (("I64", "I64", "I64"), -1, 0),
        (("I8", "I64", "I64"), -1, 0),  # a copied tensor never reaches the kernels
    ],
)
def test_points_that_must_be_widened_count_a_copy(dtypes: tuple[str, ...], group: int, copies: int) -> None:
    widths = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "I64": 8}
    plain = tensor("p", 1000, dtype="F64", inputs=("F64", "F64", "F64"))
    item = tensor("t", 1000, dtype=dtypes[0], group=group, inputs=dtypes)
    alone = 1000 * (sum(widths[word] for word in dtypes) + widths[dtypes[0]] + 8 * copies)
    assert slot_bytes(plan_by_hand([item], [])) == alone
    # The tensor that takes most counts.
    assert slot_bytes(plan_by_hand([plain, item], [])) == max(1000 * 4 * 8, alone)
    for words in ({"cast": "F32"}, {"non_finite": "base"}):
        assert slot_bytes(plan_by_hand([plain, item], [], **words)) == 1000 * (4 * 8 + 8 * 3)


def test_statistics_grow_with_the_chunks_of_the_largest_file_only() -> None:
    few, many = (project_memory(plan(tensors=n), budget_bytes=10**12, threads=1) for n in (4, 40))
    assert few.terms["statistics"] == many.terms["statistics"] > 0
    longer = project_memory(plan(tensors=4, elements=30 << 18), budget_bytes=10**12, threads=1)
    assert few.terms["statistics"] < longer.terms["statistics"] <= 10 * few.terms["statistics"]
    # Distances go to storage in groups of rows: of a thousand chunks only the checksums and sums of distances stay.
    longest = project_memory(plan(tensors=4, elements=3000 << 18), budget_bytes=10**12, threads=1)
    assert longest.terms["statistics"] < 100 * longer.terms["statistics"]
