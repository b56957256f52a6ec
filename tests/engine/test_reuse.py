"""Distances that an earlier merge has measured, taken over: nothing is read for them, and nothing wrong is taken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints.tables import read_table
from pipeline.engine.run_folder import DISTANCES
from pipeline.errors import OutputError, VerificationError
from pipeline.events import Event, Note, PassStarted
from pipeline.merging import Resources, merge
from pipeline.storage import open_store
from tests.support.adapters import Layout, linears, make_adapters
from tests.support.families import Family, llama_shapes, make_family
from tests.support.reference import digests

SMALL = {"file_size": "12KB"}


class Log:
    """What a merge tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.passes: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)
        if isinstance(event, PassStarted):
            self.passes.append(event.name)

    def about_reuse(self) -> list[str]:
        return [text for text in self.notes if "distances of" in text or "measured here" in text]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 6, dtype=torch.bfloat16, loud=1)


@pytest.fixture(scope="module")
def earlier(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("earlier") / "out"
    merge(str(family.recipe(pipeline=SMALL, name="earlier.yaml")), str(out))
    return out


def some(family: Family, *numbers: int) -> Family:
    """The same base with some of its models, in this order."""
    return Family(root=family.root, base=family.base, models=[family.models[number] for number in numbers])


def again(recipe: Path, out: Path, *earlier: Path, **resources: Any) -> tuple[dict[str, Any], Log]:
    log = Log()
    report = merge(
        str(recipe),
        str(out),
        listener=log,
        reuse=[str(path) for path in earlier],
        resources=Resources(**resources),
    )
    return report, log


def table(out: Path) -> dict[str, list[Any]]:
    return read_table(open_store(str(out)), DISTANCES)


@pytest.mark.parametrize(
    "keys",
    [
        {"weights": [3, 1, 1, 2, 1, 1]},
        {"pipeline": {**SMALL, "scale": 0.4}},
        {"pipeline": {**SMALL, "scope": "block"}},
        {"pipeline": {"file_size": "40KB", "scope": "model"}},
        {"pipeline": SMALL, "out_dtype": "float32"},
        {"pipeline": {**SMALL, "distances": "stream"}},
    ],
    ids=["weights", "scale", "scope", "layout", "out_dtype", "stream"],
)
def test_other_words_for_the_same_models_read_nothing_to_measure(
    family: Family, earlier: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    recipe = family.recipe(name="again.yaml", **keys)
    fresh = merge(str(recipe), str(tmp_path / "fresh"))
    report, log = again(recipe, tmp_path / "out", earlier)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    assert "measure" not in log.passes
    assert "write" in log.passes
    assert report["groups"] == fresh["groups"]
    assert table(tmp_path / "out") == table(tmp_path / "fresh")
    assert len(log.about_reuse()) == 1
    assert any("distances of" in note for note in report["notes"])
    if "stream" not in str(keys):
        sizes = [sum(p.stat().st_size for p in path.glob("*.safetensors")) for path in (family.base, *family.models)]
        # The writing pass alone, which needs the base only where the merged task vector is scaled.
        needed = sum(sizes) if "scale" in str(keys) else sum(sizes[1:])
        assert 0.9 * needed < report["bytes_read"] <= needed


def test_some_of_the_models_in_another_order(family: Family, earlier: Path, tmp_path: Path) -> None:
    recipe = some(family, 4, 0, 2, 1).recipe(name="some.yaml", pipeline=SMALL, weights=[1, 2, 1, 1])
    fresh = merge(str(recipe), str(tmp_path / "fresh"))
    report, log = again(recipe, tmp_path / "out", earlier)
    assert "measure" not in log.passes
    # From the same base, so that every distance comes from the same differences.
    assert table(tmp_path / "out") == table(tmp_path / "fresh")
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    assert report["groups"] == fresh["groups"]


def test_without_a_base(family: Family, tmp_path: Path) -> None:
    whole = family.recipe(name="whole.yaml", base=False, pipeline=SMALL)
    merge(str(whole), str(tmp_path / "earlier"))
    first = some(family, 0, 5, 2).recipe(name="first.yaml", base=False, pipeline=SMALL)
    merge(str(first), str(tmp_path / "fresh"))
    _, log = again(first, tmp_path / "out", tmp_path / "earlier")
    assert "measure" not in log.passes
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    # Differences were taken from a model that is left out: measured anew, and said.
    other = some(family, 5, 0, 2).recipe(name="other.yaml", base=False, pipeline=SMALL)
    _, log = again(other, tmp_path / "other", tmp_path / "earlier")
    assert "measure" in log.passes
    assert "began with another model" in log.about_reuse()[0]


def test_what_was_not_measured_to_the_end_is_measured(family: Family, earlier: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(earlier, part)
    measured = sorted((part / "_geomerge/measured").iterdir())
    measured[0].unlink()
    recipe = family.recipe(name="part.yaml", pipeline=SMALL, weights=[2, 1, 1, 1, 1, 1])
    merge(str(recipe), str(tmp_path / "fresh"))
    report, log = again(recipe, tmp_path / "out", part)
    assert log.passes == ["measure", "write"]
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    assert report["resumed_files"] == len(measured) - 1
    # The other one has it.
    _, log = again(recipe, tmp_path / "both", part, earlier)
    assert log.passes == ["write"]
    assert digests(tmp_path / "both") == digests(tmp_path / "fresh")


def test_a_model_that_changed_since_is_measured(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", 3)
    merge(str(family.recipe()), str(tmp_path / "earlier"))
    file = family.models[1] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    recipe = family.recipe(name="again.yaml", weights=[1, 2, 1])
    merge(str(recipe), str(tmp_path / "fresh"))
    _, log = again(recipe, tmp_path / "out", tmp_path / "earlier")
    assert "has changed since" in log.about_reuse()[0]
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_one_file_that_is_done_in_one_go_otherwise(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", 3)
    merge(str(family.recipe()), str(tmp_path / "earlier"))
    recipe = family.recipe(name="again.yaml", weights=[1, 2, 1])
    fresh = merge(str(recipe), str(tmp_path / "fresh"))
    report, log = again(recipe, tmp_path / "out", tmp_path / "earlier")
    assert log.passes == ["write"]
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    assert report["groups"] == fresh["groups"]
    assert report["bytes_reused_from_memory"] == 0
    assert report["bytes_read"] < fresh["bytes_read"]


def test_bytes_that_changed_without_a_trace_are_refused(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", 3)
    merge(str(family.recipe()), str(tmp_path / "earlier"))
    file = family.models[1] / "model.safetensors"
    stamp = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-2, os.SEEK_END)
        (byte,) = opened.read(1)
        opened.seek(-2, os.SEEK_END)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    recipe = family.recipe(name="again.yaml", weights=[1, 2, 1])
    with pytest.raises(VerificationError, match="expert1"):
        again(recipe, tmp_path / "out", tmp_path / "earlier")


def test_values_that_were_read_otherwise_are_measured(family: Family, earlier: Path, tmp_path: Path) -> None:
    recipe = family.recipe(name="cast.yaml", pipeline=SMALL, dtype="float16")
    _, log = again(recipe, tmp_path / "out", earlier)
    assert log.passes == ["measure", "write"]
    assert "read values otherwise" in log.about_reuse()[0]


def test_a_place_without_a_merge_is_refused_by_name(family: Family, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nothing-there"):
        again(family.recipe(name="again.yaml", pipeline=SMALL), tmp_path / "out", tmp_path / "nothing-there")
    assert not (tmp_path / "out" / "_geomerge").exists()


def test_the_output_itself_is_refused(family: Family, earlier: Path) -> None:
    with pytest.raises(OutputError, match="is the output itself"):
        again(family.recipe(name="again.yaml", pipeline=SMALL), earlier, earlier)


def test_adapters(family: Family, tmp_path: Path) -> None:
    layout = Layout(modules=linears(llama_shapes(), "q_proj", "down_proj"), rank=2)
    adapters = make_adapters(tmp_path / "adapters", family.base, [layout] * 4)
    merge(str(adapters.recipe(pipeline=SMALL, name="all.yaml")), str(tmp_path / "earlier"))
    fewer = some(adapters, 2, 0, 3).recipe(name="fewer.yaml", pipeline=SMALL)
    merge(str(fewer), str(tmp_path / "fresh"))
    _, log = again(fewer, tmp_path / "out", tmp_path / "earlier")
    assert "measure" not in log.passes
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_a_merge_that_takes_over_can_be_taken_over(family: Family, earlier: Path, tmp_path: Path) -> None:
    first = family.recipe(name="first.yaml", pipeline=SMALL, weights=[1, 2, 1, 1, 1, 1])
    again(first, tmp_path / "first", earlier)
    second = family.recipe(name="second.yaml", pipeline=SMALL, weights=[1, 3, 1, 1, 1, 1])
    _, log = again(second, tmp_path / "second", tmp_path / "first")
    assert log.passes == ["write"]
    plan = json.loads((tmp_path / "second/_geomerge/plan.json").read_text())
    assert len(list((tmp_path / "second/_geomerge/measured").iterdir())) == len(plan["files"])
