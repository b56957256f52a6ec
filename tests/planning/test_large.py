"""A family of nine 70B models, planned from sparse files: little memory, and no byte of data is read."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.merging import Planned, Resources, load_recipe, plan_merge
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from tests.support.llama import LLAMAS, llama_family

LLAMA = LLAMAS["70B"]
PARAMETERS = LLAMA.parameters
EXPERTS = 8
# What a reader of headers asks for at once, so that almost every header takes one request.
_GUESS_BYTES = 1 << 18


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_family(tmp_path_factory.mktemp("llama"), "70B", EXPERTS)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """Every range that local stores are asked for, as (path, start, stop)."""
    found: list[tuple[str, int, int]] = []
    read, read_into = LocalStore.read, LocalStore.read_into

    def seen_read(self: LocalStore, path: str, start: int = 0, stop: int | None = None) -> bytes:
        data = read(self, path, start, stop)
        found.append((self.location(path), start, start + len(data)))
        return data

    def seen_read_into(self: LocalStore, path: str, start: int, buffer: memoryview) -> None:
        found.append((self.location(path), start, start + buffer.nbytes))
        read_into(self, path, start, buffer)

    monkeypatch.setattr(LocalStore, "read", seen_read)
    monkeypatch.setattr(LocalStore, "read_into", seen_read_into)
    return found


def _planned(recipe: Path) -> Planned:
    resources = Resources(workers=4, memory_bytes=8_000_000_000)
    return plan_merge(load_recipe(str(recipe))[0], open_store(str(recipe.parent / "out")), resources, probe=False)


def test_planning_reads_headers_only_and_stays_small(recipe: Path, reads: list[tuple[str, int, int]]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned = _planned(recipe)
    growth_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth_bytes < 1_000_000_000
    headers = {}
    for file in sorted(recipe.parent.glob("*/*.safetensors")):
        with file.open("rb") as stream:
            headers[str(file)] = 8 + int.from_bytes(stream.read(8), "little")
    weights = [(path, start, stop) for path, start, stop in reads if path in headers]
    assert {path for path, _, _ in weights} == set(headers)
    # One request a file, from its first byte: the header and no more than was guessed of its length.
    assert len(weights) == len(headers) == (EXPERTS + 1) * LLAMA.files
    assert [place for place in weights if place[1] != 0 or place[2] > max(headers[place[0]], _GUESS_BYTES)] == []
    assert sum(stop for _, _, stop in weights) < 1e-4 * 2 * PARAMETERS * (EXPERTS + 1)
    assert not (recipe.parent / "out").exists()
    assert planned.plan.fingerprint == _planned(recipe).plan.fingerprint


def test_the_numbers_of_the_plan(recipe: Path) -> None:
    planned = _planned(recipe)
    plan = planned.plan
    assert len(plan.tensors) == 9 * LLAMA.layers + 3
    assert sum(item.elements for item in plan.tensors) == PARAMETERS
    assert sum(file.size_bytes for file in plan.files) == 2 * PARAMETERS
    assert max(file.size_bytes for file in plan.files) <= 5_000_000_000
    assert len(plan.files) >= 2 * PARAMETERS // 5_000_000_000
    assert not any(file.fused for file in plan.files)
    assert planned.memory.total_bytes <= 8_000_000_000
    assert planned.cost.measure_bytes == 9 * 2 * PARAMETERS
    assert planned.cost.written_bytes == 2 * PARAMETERS
    kept = 4 * planned.memory.retained_bytes
    assert planned.cost.reread_bytes == 8 * 2 * PARAMETERS - kept
    chunks = sum(-(-item.elements // plan.chunk_elements) for item in plan.tensors)
    assert sum(len(plan.chunks(index)) for index in range(len(plan.files))) == chunks
