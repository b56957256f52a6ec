"""The projected memory of a worker."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import BudgetError
from pipeline.numerics.kernels import work_bytes
from pipeline.planning.layout import lay_out
from pipeline.planning.memory import RUNTIME_BYTES, project_memory, slot_bytes
from pipeline.planning.plan import Plan, Source, TensorPlan
from pipeline.units import format_bytes
from tests.planning.plans import plan_by_hand, tensor

LENGTH = 1 << 18


def plan(inputs: int = 9, tensors: int = 20, elements: int = 3 << 18, **words: object) -> Plan:
    items = [tensor(f"t{number}", elements, dtype="BF16", inputs=("BF16",) * inputs) for number in range(tensors)]
    files = lay_out(items, file_size_bytes=8 * elements, solve_in_file=False)
    return plan_by_hand(items, files, inputs=inputs, chunk_elements=LENGTH, **words)


def smallest(of: Plan) -> int:
    """The budget that the refusal of almost none names."""
    with pytest.raises(BudgetError) as caught:
        project_memory(of, budget_bytes=1, threads=4)
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
    for word in ("runtime 450 MB", "statistics ", f"one chunk in flight {format_bytes(slot_bytes(of))}", "work "):
        assert word in problem.what
    assert problem.what.endswith("but may take 1 MB")
    assert problem.where == f"9 checkpoints, chunks of {LENGTH} elements"
    assert caught.value.exit_code == 4


@settings(max_examples=150, deadline=None)
@given(st.integers(450, 20_000), st.integers(1, 32), st.integers(2, 30), st.booleans())
def test_the_sum_of_the_terms_never_exceeds_the_budget(
    megabytes: int, threads: int, inputs: int, measured: bool
) -> None:
    of = plan(inputs, tensors=3, measured=measured)
    budget = megabytes * 1_000_000
    try:
        memory = project_memory(of, budget_bytes=budget, threads=threads)
    except BudgetError:
        assert budget < smallest(of)
        return
    assert memory.total_bytes == sum(memory.terms.values()) <= budget
    assert set(memory.terms) == {"runtime", "statistics", "chunks in flight", "work", "retained"}
    assert min(memory.terms.values()) >= 0
    assert memory.terms["runtime"] == RUNTIME_BYTES
    assert memory.terms["chunks in flight"] == memory.window * slot_bytes(of)
    # Each chunk in flight may be in a kernel: the worker has that many threads.
    assert memory.terms["work"] == memory.window * work_bytes(inputs)
    assert memory.terms["retained"] == memory.retained_bytes
    assert 1 <= memory.threads <= threads
    assert memory.window in (memory.threads, memory.threads + 1)
    assert measured or memory.retained_bytes == 0


def test_more_memory_never_buys_less() -> None:
    of = plan()
    steps = [project_memory(of, budget_bytes=budget * 50_000_000, threads=6) for budget in range(12, 200)]
    for less, more in itertools.pairwise(steps):
        assert more.threads >= less.threads
        assert more.window >= less.window
        assert more.total_bytes >= less.total_bytes
    assert steps[-1].threads == 6
    assert steps[-1].window == 7


def test_retention_is_bounded_by_what_there_is_to_keep() -> None:
    of = plan()
    memory = project_memory(of, budget_bytes=10**13, threads=2)
    everything = sum(item.elements for item in of.tensors) * 2 * 9
    assert everything <= memory.retained_bytes <= 2 * everything
    assert memory.total_bytes < 2 * 10**9
    tight = project_memory(of, budget_bytes=smallest(of) + 100_000_000, threads=1)
    assert 0 < tight.retained_bytes <= 100_000_000


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
    assert slot_bytes(of) == 1000 * ((4 + 4 + 8) + 4 + 4)
    assert slot_bytes(plan_by_hand([wide, narrow], [], chunk_elements=100)) == 100 * 24
    # A cast copy of every point.
    assert slot_bytes(plan_by_hand([wide, narrow], [], chunk_elements=100, cast="F32")) == 100 * (24 + 24)
    assert slot_bytes(plan_by_hand([wide, narrow], [], chunk_elements=100, non_finite="base")) == 100 * (24 + 24)
    assert slot_bytes(plan_by_hand([], [])) == 0


def test_statistics_grow_with_the_chunks_of_the_largest_file_only() -> None:
    few, many = (project_memory(plan(tensors=n), budget_bytes=10**12, threads=1) for n in (4, 40))
    assert few.terms["statistics"] == many.terms["statistics"] > 0
    longer = project_memory(plan(tensors=4, elements=30 << 18), budget_bytes=10**12, threads=1)
    assert longer.terms["statistics"] == 10 * few.terms["statistics"]
