"""Tensors into files."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.planning.layout import lay_out
from pipeline.planning.plan import FilePlan, TensorPlan
from tests.planning.plans import tensor

WORDS = ("F64", "I64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "U8", "BOOL")


def size(item: TensorPlan) -> int:
    return item.elements * DTYPES[item.dtype].bits // 8


def solvable_in_one_go(file: FilePlan, tensors: list[TensorPlan], files: tuple[FilePlan, ...]) -> bool:
    """What a worker needs to measure, solve and write group after group: each in one run, and nowhere else."""
    open_group, closed = None, set()
    for index in file.tensors:
        group = tensors[index].group
        if group == open_group:
            continue
        if open_group is not None:
            closed.add(open_group)
        if group in closed and group >= 0:
            return False
        open_group = group
    mine = {tensors[index].group for index in file.tensors} - {-1}
    elsewhere = {tensors[index].group for other in files if other is not file for index in other.tensors}
    return bool(mine) and not mine & elsewhere


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[TensorPlan]:
    def one(number: int) -> TensorPlan:
        word = draw(st.sampled_from(WORDS))
        group = draw(st.integers(0, 3)) if word.startswith(("F", "B")) and word != "BOOL" else -1
        return tensor(f"t{number}", draw(st.integers(0, 40)), dtype=word, group=group)

    return [one(number) for number in range(draw(st.integers(1, 14)))]


@settings(max_examples=200, deadline=None)
@given(tensor_lists(), st.integers(1, 800), st.booleans())
def test_the_rules_of_a_layout(tensors: list[TensorPlan], limit: int, fuse: bool) -> None:
    files = lay_out(tensors, file_size_bytes=limit, solve_in_file=fuse)
    assert sorted(index for file in files for index in file.tensors) == list(range(len(tensors)))
    count = len(files)
    assert [file.name for file in files] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for file in files:
        offset = 0
        for index in file.tensors:
            assert offset % (DTYPES[tensors[index].dtype].bits // 8) == 0
            offset += size(tensors[index])
        assert file.size_bytes == offset
        sizes = [size(tensors[index]) for index in file.tensors]
        # Only a tensor that is larger by itself may break the limit, and only with nothing but empty ones beside it.
        assert offset <= limit or sum(map(bool, sizes)) == 1
        assert file.fused == (fuse and solvable_in_one_go(file, tensors, files))
    for group in {item.group for item in tensors} - {-1}:
        members = [index for index, item in enumerate(tensors) if item.group == group]
        if sum(size(tensors[index]) for index in members) <= limit:
            assert sum(bool(set(members) & set(file.tensors)) for file in files) == 1


def test_groups_stay_whole_and_files_are_filled_in_order() -> None:
    tensors = [tensor(f"t{number}", 25, group=number // 2) for number in range(8)]  # 200 bytes a group
    files = lay_out(tensors, file_size_bytes=500, solve_in_file=True)
    assert [file.tensors for file in files] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [file.size_bytes for file in files] == [400, 400]
    assert all(file.fused for file in files)


def test_a_group_larger_than_a_file_is_torn_and_then_not_solved_in_one_go() -> None:
    tensors = [*(tensor(f"a{number}", 25, group=0) for number in range(3)), tensor("b", 10, group=1)]
    files = lay_out(tensors, file_size_bytes=200, solve_in_file=True)
    assert [file.tensors for file in files] == [(0, 1), (2, 3)]
    assert [file.fused for file in files] == [False, False]
    assert [file.fused for file in lay_out(tensors, file_size_bytes=400, solve_in_file=True)] == [True]
    assert [file.fused for file in lay_out(tensors, file_size_bytes=400, solve_in_file=False)] == [False]


def test_the_widest_types_come_first_whatever_their_order() -> None:
    tensors = [
        tensor("mask", 3, dtype="BOOL", group=-1),
        tensor("half", 3, dtype="BF16"),
        tensor("ids", 1, dtype="I64", group=-1),
        tensor("norm", 3, dtype="F32"),
    ]
    (file,) = lay_out(tensors, file_size_bytes=1000, solve_in_file=True)
    assert file.tensors == (2, 3, 1, 0)
    assert file.size_bytes == 8 + 12 + 6 + 3
    assert file.fused


def test_a_copied_tensor_between_two_of_a_group_forbids_one_go() -> None:
    """The worker solves a group when its run of tensors ends, so the run must be the whole group."""
    tensors = [tensor("a", 4), tensor("ids", 4, dtype="I32", group=-1), tensor("z", 4)]
    (file,) = lay_out(tensors, file_size_bytes=1000, solve_in_file=True)
    assert not file.fused
    mixed = [tensor("a", 4), tensor("b", 4, group=1), tensor("a half", 4, dtype="BF16")]
    assert not lay_out(mixed, file_size_bytes=1000, solve_in_file=True)[0].fused


def test_a_file_of_copied_tensors_has_nothing_to_solve() -> None:
    (file,) = lay_out([tensor("ids", 4, dtype="I64", group=-1)], file_size_bytes=100, solve_in_file=True)
    assert not file.fused
