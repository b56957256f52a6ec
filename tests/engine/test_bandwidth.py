"""The trial behind the projected seconds: what it tries, what it makes of it, and that it leaves nothing."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from pipeline.engine import bandwidth
from pipeline.engine.bandwidth import given_rates, measure_rates
from pipeline.merging import Resources, load_recipe, plan_merge
from pipeline.planning.cost import Rates
from pipeline.planning.grid import Chunk
from pipeline.planning.memory import Memory
from pipeline.planning.plan import Plan
from pipeline.storage import open_store
from pipeline.storage.scratch import ScratchFile
from tests.planning.plans import small_family
from tests.support.families import save_model


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_TRIAL_S", 0.05)


def planned(recipe: Path, output: Path) -> tuple[Plan, Memory]:
    found = plan_merge(load_recipe(str(recipe))[0], open_store(str(output)), Resources(executor="local"), probe=False)
    return found.plan, found.memory


@pytest.mark.parametrize("method", ["geometric_median", "linear"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_rates_are_found_and_nothing_is_left(tmp_path: Path, method: str, scope: str) -> None:
    family = small_family(tmp_path / "family")
    pipeline = {"scope": scope} if method != "linear" else {}
    output = tmp_path / "out"
    plan, memory = planned(family.recipe(method, pipeline=pipeline), output)
    before = sorted(tmp_path.rglob("*"))
    rates = measure_rates(plan, memory, workers=2, output=open_store(str(output)))
    assert rates is not None
    assert rates.source == "measured"
    assert min(rates.measure, rates.write) > 1.0
    assert rates.start_s >= 0.0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_family_of_integers_has_nothing_to_try(tmp_path: Path) -> None:
    family = small_family(tmp_path)
    plan, memory = planned(family.recipe(), tmp_path / "out")
    tensors = tuple(dataclasses.replace(tensor, group=-1) for tensor in plan.tensors)
    assert measure_rates(dataclasses.replace(plan, tensors=tensors), memory, workers=1) is None


def test_a_disk_that_cannot_be_tried_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = small_family(tmp_path)
    plan, memory = planned(family.recipe(), tmp_path / "out")
    output = open_store(str(tmp_path / "out"))
    monkeypatch.setattr(bandwidth, "open_scratch", lambda _: None)
    assert measure_rates(plan, memory, workers=1, output=output) is not None
    reading, writing = os.pipe()
    os.close(reading)
    broken = ScratchFile(writing)
    monkeypatch.setattr(bandwidth, "open_scratch", lambda _: broken)
    assert measure_rates(plan, memory, workers=1, output=output) is not None
    assert broken.failed


def test_what_is_written_is_the_merged_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = small_family(tmp_path)
    plan, memory = planned(family.recipe(), tmp_path / "out")
    path = tmp_path / "scratch"
    monkeypatch.setattr(bandwidth, "open_scratch", lambda _: ScratchFile(os.open(path, os.O_CREAT | os.O_WRONLY)))
    assert measure_rates(plan, memory, workers=1, output=open_store(str(tmp_path / "out"))) is not None
    first = plan.tensors[0]
    mean = torch.stack([values[first.name].double() for values in family.values]).mean(0).float()
    assert path.read_bytes()[: first.elements * 4] == mean.flatten().numpy().tobytes()


@pytest.mark.parametrize(
    ("shares", "tried", "rate"),
    [
        ([1.0, 1.0, 0.95, 1.0], [4], 100.0),
        ([0.0, 0.0, 0.0, 0.1], [4], 100.0),
        # Half at 100 and half at 25 bytes a second.
        ([1.0, 0.0, 1.0, 0.0], [2, 2], 40.0),
        # What is neither is not tried, and counts by its share.
        ([1.0, 0.5, 0.5, 0.0], [1, 1], 40.0),
        ([0.5, 0.5, 0.5, 0.5], [4], 100.0),
    ],
)
def test_both_parts_of_a_family_that_is_half_in_memory_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: list[float], tried: list[int], rate: float
) -> None:
    plan, memory = planned(small_family(tmp_path).recipe("linear"), tmp_path / "out")
    runs = [[Chunk(tensor=0, start=number, stop=number + 1)] for number in range(4)]
    monkeypatch.setattr(bandwidth, "_runs", lambda _: runs)
    monkeypatch.setattr(bandwidth, "_cached", lambda _, chunk: shares[chunk.start])
    monkeypatch.setattr(bandwidth, "_age_s", lambda: 2.0)
    sizes, speeds = [], [100.0, 25.0]

    def trial(
        _: object, __: object, chunks: Sequence[Chunk], ___: Callable[[object], None], ____: Callable[[], None]
    ) -> bandwidth._Trial:
        sizes.append(len(chunks))
        return bandwidth._Trial(rate=speeds[len(sizes) - 1], first_s=0.25)

    monkeypatch.setattr(bandwidth._Passes, "_trial", trial)
    found = measure_rates(plan, memory, workers=1)
    assert found == Rates(measure=pytest.approx(rate), write=pytest.approx(rate), source="measured", start_s=2.25)
    assert sizes == tried


@pytest.mark.parametrize(("room", "second"), [(0, 25.0), (10**12, 50.0)])
def test_the_second_read_of_a_family_larger_than_the_memory_is_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, second: float
) -> None:
    plan, memory = planned(small_family(tmp_path).recipe(), tmp_path / "out")
    speeds = [25.0, 50.0]
    monkeypatch.setattr(bandwidth, "_cached", lambda *_: 0.0)
    monkeypatch.setattr(bandwidth, "page_cache_bytes", lambda: room)
    monkeypatch.setattr(
        bandwidth._Passes, "_trial", lambda *_: bandwidth._Trial(rate=speeds.pop(0) if speeds else 0.0, first_s=0.0)
    )
    found = measure_rates(plan, memory, workers=1)
    assert found is not None
    assert (found.measure, found.write) == (25.0, second)


def test_runs_are_neighbours_and_come_from_everywhere(tmp_path: Path) -> None:
    family = small_family(tmp_path, shapes={"a": (3000,), "b": (40,)})
    plan = dataclasses.replace(planned(family.recipe(), tmp_path / "out")[0], chunk_elements=10)
    runs = bandwidth._runs(plan)
    assert len(runs) == -(-304 // bandwidth._RUN_CHUNKS) == len({run[0] for run in runs})
    assert sorted(c.start for run in runs for c in run if c.tensor == runs[0][0].tensor)[:3] == [0, 10, 20]
    for run in runs:
        for one, other in itertools.pairwise(run):
            assert other.start == one.stop or (other.tensor, other.start) == (one.tensor + 1, 0)
    # The first few lie far apart.
    firsts = sorted(run[0].start for run in runs[:5] if run[0].tensor == runs[0][0].tensor)
    assert max(firsts) - min(firsts) > 1500


def test_a_process_that_runs_for_long_is_not_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_LONGEST_START_S", 1e9)
    age_s = bandwidth._age_s()
    assert age_s > 0.0
    monkeypatch.setattr(bandwidth, "_LONGEST_START_S", age_s)
    assert bandwidth._age_s() == 0.0


def test_given_rates_have_no_start() -> None:
    assert given_rates(7) == Rates(measure=7.0, write=7.0, source="given", start_s=0.0)


def test_adapters_are_tried(tmp_path: Path) -> None:
    """Factors are measured all at once, and merged chunk by chunk."""
    base = save_model(tmp_path / "base", {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 32)})
    places = []
    for number in range(2):
        folder = tmp_path / f"adapter{number}"
        factors = {"lora_A": torch.full((2, 32), 1.0 + number), "lora_B": torch.ones(64, 2)}
        prefix = "base_model.model.model.layers.0.mlp.up_proj."
        save_model(folder, {f"{prefix}{name}.weight": value for name, value in factors.items()})
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "config.json").unlink()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
        places.append(folder)
    recipe = tmp_path / "recipe.yaml"
    models = "".join(f"  - model: {place}\n" for place in places)
    recipe.write_text(f"merge_method: geometric_median\nbase_model: {base}\nmodels:\n{models}")
    plan, memory = planned(recipe, tmp_path / "out")
    assert any(tensor.factored for tensor in plan.tensors)
    for chunked in (plan, dataclasses.replace(plan, chunk_elements=320)):
        rates = measure_rates(chunked, memory, workers=1)
        assert rates is not None
        assert min(rates.measure, rates.write) > 1.0
