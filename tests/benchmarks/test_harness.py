"""The benchmark's own parts do what its figures say: floors move what they are told, ratios divide the right things."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.benchmarks import caches, compare, floor
from tests.benchmarks.ratios import Ratio, ratios
from tests.benchmarks.rounds import Clock
from tests.benchmarks.tuning import Amounts, Settings, take_floor

INPUT_BYTES, BLOCK_BYTES = 3_000_001, 1 << 20


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.write_bytes(os.urandom(INPUT_BYTES))
    return paths


@pytest.mark.parametrize("reader", ["pread", "mmap"])
@pytest.mark.parametrize("writer", ["late", "early", "direct"])
def test_the_floor_writes_as_much_as_it_is_told(inputs: list[Path], tmp_path: Path, reader: str, writer: str) -> None:
    amounts = (2 * INPUT_BYTES, INPUT_BYTES, INPUT_BYTES)
    floor.run(("2", str(BLOCK_BYTES), reader, writer), amounts, str(tmp_path / "out"), list(map(str, inputs)))
    assert (tmp_path / "out").stat().st_size == INPUT_BYTES


def test_the_floor_as_a_program_takes_time_and_leaves_nothing(inputs: list[Path], tmp_path: Path) -> None:
    settings = Settings(threads=2, block=BLOCK_BYTES, reader="pread", writer="late")
    figures = take_floor(settings, Amounts(first=5, last=INPUT_BYTES, writes=9), inputs, tmp_path / "out")
    assert figures.wall_s > 0
    assert figures.peak_bytes > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("total", [1, BLOCK_BYTES, INPUT_BYTES + 5, 5 * INPUT_BYTES])
def test_blocks_of_a_read_add_up(total: int) -> None:
    sizes = (INPUT_BYTES, 2 * INPUT_BYTES)
    tasks = list(floor._reads(sizes, BLOCK_BYTES, total))
    assert sum(length for _, _, length in tasks) == total
    assert all(offset + length <= sizes[at] for at, offset, length in tasks)
    # Nothing is read twice before everything was read once.
    first = [
        (at, offset) for at, offset, _ in tasks[: -(-INPUT_BYTES // BLOCK_BYTES) - (-2 * INPUT_BYTES // BLOCK_BYTES)]
    ]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize(("reads", "writes"), [(10, 3), (3, 10), (0, 4), (4, 0)])
def test_writes_lie_evenly_between_reads(reads: int, writes: int) -> None:
    tasks = list(floor._spread([(0, number, 1) for number in range(reads)], [(-1, n, 1) for n in range(writes)]))
    assert sum(at == 0 for at, _, _ in tasks) == reads
    assert sum(at == -1 for at, _, _ in tasks) == writes
    seen = 0
    for position, (at, _, _) in enumerate(tasks):
        seen += at == -1
        if reads and writes:
            assert abs(seen / writes - (position + 1 - seen) / reads) <= 1 / writes + 1 / reads


def test_a_dropped_file_leaves_the_page_cache_and_a_warmed_one_lies_there(inputs: list[Path]) -> None:
    caches.drop(inputs)
    if caches.resident_share(inputs):
        pytest.skip("this file system keeps its files in memory")
    with caches.Residency(inputs[0]) as residency:
        descriptor = os.open(inputs[0], os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(descriptor, 10, 2 * BLOCK_BYTES)
        os.close(descriptor)
        assert residency.beyond(2 * BLOCK_BYTES)
        assert 0 < residency.share() < 1
    caches.warm(inputs)
    assert caches.resident_share(inputs) == 1


def test_no_round_begins_when_the_time_is_up() -> None:
    assert list(Clock(minutes=0, weights={"some": 1}, most=5).rounds("some")) == []
    assert list(Clock(minutes=1, weights={"some": 1}, most=5).rounds("some")) == [0, 1, 2, 3, 4]


def program(name: str, walls: dict[int, float], **others: Any) -> dict[str, Any]:
    runs = [
        {"round": number, "wall_s": wall_s, "cpu_s": wall_s, "peak_bytes": wall_s, "anonymous_bytes": 1.0, **others}
        for number, wall_s in walls.items()
    ]
    return {"name": name, "runs": runs}


def whole(large: bool) -> dict[str, Any]:
    floor = {"wall_s": 2.0, "cpu_s": 1.0}
    planned = {"seconds": {"start": 1.0, "write": 2.0}, "memory_bytes": 10.0}
    ours = program("linear", {0: 3.0, 1: 2.0, 2: 4.0}, floor=floor, plan=planned, seconds={"write": 1.5})
    programs = [ours, program("mergekit linear", {0: 30.0, 2: 12.0}, floor=floor)]
    return {"kind": "warm", "family": "9M x 2", "large": large, "programs": programs}


def test_ratios_are_taken_within_rounds() -> None:
    found = {ratio.key: ratio for ratio in ratios([whole(large=True)])}
    assert found["9M x 2: linear / floor"].values == [1.5, 1.0, 2.0]
    assert found["9M x 2: linear / floor"].met is False
    assert found["9M x 2: mergekit linear / linear"].values == [10.0, 3.0]
    assert found["9M x 2: mergekit linear / linear"].met is True
    # A plan projects the whole command, and so that is what it is held against.
    assert found["9M x 2: linear, projected / measured seconds"].values == [1.0, 1.5, 0.75]
    small = {ratio.key: ratio for ratio in ratios([whole(large=False)])}
    assert small.keys() == found.keys()
    assert all(ratio.met is None for ratio in small.values())


def test_growth_is_what_goes_beyond_the_start_by_what_it_may_be() -> None:
    walls = {"median, tiny": 1.0, "linear, 2": 2.0, "linear, 4": 3.0, "linear, 8": 5.0}
    walls |= {f"median, {n}": 1.0 + 3 * n * (1 + n / 32) for n in (2, 4, 8)}
    programs = [program(name, {0: wall_s}) for name, wall_s in walls.items()]
    found = ratios([{"kind": "growth", "family": "1M", "counts": [2, 4, 8], "programs": programs}])
    grown = [ratio for ratio in found if ratio.key.startswith("growth")]
    assert len(grown) == 4
    assert [ratio.middle for ratio in grown] == pytest.approx([1.0] * 4)


def test_the_start_of_ray_does_not_count() -> None:
    walls = {"local, tiny": 1.0, "Ray, tiny": 11.0, "local": 20.0, "Ray": 33.0}
    programs = [program(name, {0: wall_s}) for name, wall_s in walls.items()]
    ratio, start = ratios([{"kind": "ray", "family": "1M x 2", "large": True, "programs": programs}])
    assert ratio.values == [23.0 / 20.0]
    assert start.values == [10.0]


def test_two_runs_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    old = [Ratio(key="a", values=[2.0, 4.0], high=3.0), Ratio(key="gone", values=[1.0])]
    new = [Ratio(key="a", values=[6.0, 6.0], high=3.0)]
    Console(width=150).print(compare.table([ratio.to_json() for ratio in old], [ratio.to_json() for ratio in new]))
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if " a " in line)
    for cell in ("3.00", "6.00", "2.00", "yes", "≤ 3 NOT MET"):
        assert cell in line
    assert "gone" in shown
