"""Files to workers."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.planning.assignment import assign
from pipeline.planning.plan import FilePlan
from tests.planning.plans import plan_by_hand


def plan(sizes: list[int]):  # type: ignore[no-untyped-def]
    files = [FilePlan(name=f"f{index}", tensors=(), size_bytes=size, fused=False) for index, size in enumerate(sizes)]
    return plan_by_hand([], files)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 12))
def test_every_file_has_one_worker_and_loads_are_balanced(sizes: list[int], workers: int) -> None:
    shards = assign(plan(sizes), workers)
    assert len(shards) == workers
    assert sorted(index for shard in shards for index in shard) == list(range(len(sizes)))
    assert all(list(shard) == sorted(shard) for shard in shards)
    loads = [sum(sizes[index] for index in shard) for shard in shards]
    # The fullest worker was the lightest before it got its last file.
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert assign(plan(sizes), workers) == shards


def test_one_worker_has_all_and_idle_ones_have_none() -> None:
    assert assign(plan([5, 1, 3]), 1) == ((0, 1, 2),)
    assert assign(plan([5, 1, 3]), 5) == ((0,), (2,), (1,), (), ())
    assert assign(plan([5, 5, 5, 5]), 2) == ((0, 2), (1, 3))
