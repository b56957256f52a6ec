"""Adapters that cannot be merged as they are: named, with what to do, and nothing committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import CheckpointError, PipelineError, RecipeError, VerificationError
from pipeline.storage.local import LocalStore
from tests.support.adapters import ADAPTER_CONFIG, ADAPTER_FILE, Layout, linears, make_adapters
from tests.support.cases import before_writing, edit, edit_config, refused, run_cli, without_retention
from tests.support.families import Family, llama_shapes, random_weights, save_model

QV = linears(llama_shapes(), "q_proj", "v_proj")
FACTOR = f"base_model.model.{QV[2]}.lora_B.weight"


@pytest.fixture
def family(tmp_path: Path) -> Family:
    base = save_model(tmp_path / "base", random_weights(0))
    return make_adapters(tmp_path, base, [Layout(modules=QV), Layout(modules=QV[1:], rank=2), Layout(modules=QV)])


def refused_here(family: Family, kind: type[PipelineError], *words: str, **keys: object) -> str:
    out = family.root / "out"
    text = refused(family.recipe(**keys), out, kind, *words)
    assert not (out / ADAPTER_CONFIG).exists()
    assert not (out / ADAPTER_FILE).exists()
    return text


# --- the recipe --------------------------------------------------------------------------------------------------


def test_no_base_model(family: Family) -> None:
    refused_here(family, RecipeError, "base_model", str(family.models[0]), base=False)
    assert run_cli("merge", family.recipe(base=False), family.root / "out").returncode == 2


def test_output_adapter_of_a_full_model(family: Family) -> None:
    family.models[1] = save_model(family.root / "full", random_weights(1))
    refused_here(family, CheckpointError, "is a full model", str(family.models[1]), pipeline={"output": "adapter"})


def test_output_adapter_over_two_bases(family: Family) -> None:
    other = save_model(family.root / "other", random_weights(2))
    family.models[1] = Path(f"{other}+{family.models[1]}")
    refused_here(family, CheckpointError, "different models", str(other), pipeline={"output": "adapter"})


def test_rank_without_output_adapter(family: Family) -> None:
    refused_here(family, RecipeError, "rank", "output: adapter", pipeline={"rank": 4})


# --- what the folder says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use_dora": True}, ("DoRA", "merge_and_unload")),
        ({"peft_type": "IA3"}, ("IA3", "merge_and_unload")),
        ({"init_lora_weights": "pissa"}, ("pissa", "merge_and_unload")),
        ({"lora_beta_of_tomorrow": 3}, ("lora_beta_of_tomorrow",)),
        ({"r": 5}, ("rank", "5")),
        ({"r": 0}, ("r",)),
        ({"lora_alpha": float("inf")}, ("lora_alpha",)),
    ],
)
def test_settings_that_mean_something_else(family: Family, keys: dict[str, object], words: tuple[str, ...]) -> None:
    edit_config(family.models[0], file=ADAPTER_CONFIG, **keys)
    refused_here(family, CheckpointError, str(family.models[0]), *words)


@pytest.mark.parametrize("text", ["{", "[]", "\ufeffno", ""])
def test_broken_settings(family: Family, text: str) -> None:
    (family.models[2] / ADAPTER_CONFIG).write_text(text)
    refused_here(family, CheckpointError, str(family.models[2]), ADAPTER_CONFIG)


def test_pickle_only(family: Family) -> None:
    (family.models[1] / ADAPTER_FILE).rename(family.models[1] / "adapter_model.bin")
    refused_here(family, CheckpointError, str(family.models[1]), "pickle")


def test_no_weights(family: Family) -> None:
    (family.models[1] / ADAPTER_FILE).unlink()
    refused_here(family, CheckpointError, str(family.models[1]), ADAPTER_FILE)


# --- what the weights say ----------------------------------------------------------------------------------------


def test_adapter_of_a_deeper_base(family: Family) -> None:
    deep = save_model(family.root / "deep", random_weights(0, shapes=llama_shapes(5)))
    other = make_adapters(family.root / "more", deep, [Layout(modules=linears(llama_shapes(5), "q_proj", "v_proj"))])
    family.models[1] = other.models[0]
    refused_here(family, CheckpointError, str(other.models[0]), "model.layers.3.self_attn.q_proj", "4")


def test_adapter_of_a_wider_base(family: Family) -> None:
    shapes = llama_shapes(hidden=64)
    wide = save_model(family.root / "wide", random_weights(0, shapes=shapes))
    family.models[1] = make_adapters(family.root / "more", wide, [Layout(modules=QV)]).models[0]
    refused_here(family, CheckpointError, str(family.models[1]), "model.layers.0.self_attn.q_proj", "64", "32")


def test_half_a_pair(family: Family) -> None:
    edit(family.models[0], lambda tensors: tensors.pop(FACTOR), file=ADAPTER_FILE)
    refused_here(family, CheckpointError, str(family.models[0]), QV[2], "lora_B")


@pytest.mark.parametrize("length", [4, 60, -100, -1])
def test_truncated_file(family: Family, length: int) -> None:
    file = family.models[0] / ADAPTER_FILE
    file.write_bytes(file.read_bytes()[:length])
    refused_here(family, CheckpointError, str(family.models[0]), ADAPTER_FILE)


@pytest.mark.parametrize("method", ["geometric_median", "linear"])
@pytest.mark.parametrize("pipeline", [{}, {"scope": "tensor"}, {"output": "adapter"}])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_factor_that_is_not_finite(family: Family, method: str, pipeline: dict[str, object], value: float) -> None:
    if method == "linear":
        pipeline = {key: word for key, word in pipeline.items() if key != "scope"}
    edit(family.models[2], lambda tensors: tensors[FACTOR][3].fill_(value), file=ADAPTER_FILE)
    refused_here(family, CheckpointError, str(family.models[2]), f"{QV[2]}", method=method, pipeline=pipeline)


def test_several_problems_at_once(family: Family) -> None:
    edit_config(family.models[0], file=ADAPTER_CONFIG, use_dora=True)
    (family.models[1] / ADAPTER_CONFIG).write_text("{")
    refused_here(family, CheckpointError, str(family.models[0]), str(family.models[1]), "2 problems")


# --- while it is merged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [{"file_size": "15KB"}, {"output": "adapter"}])
def test_an_adapter_changed_between_the_reads(family: Family, pipeline: dict[str, object]) -> None:
    recipe, out = family.recipe(pipeline=pipeline), family.root / "out"
    file = family.models[1] / ADAPTER_FILE
    action = lambda: edit(family.models[1], lambda tensors: tensors[FACTOR].mul_(2), file=ADAPTER_FILE)  # noqa: E731
    words = (str(family.models[1]), file.name, "changed since")
    resources = without_retention(recipe, out)
    refused(recipe, out, CheckpointError, *words, listener=before_writing(action), resources=resources)
    assert not (out / ADAPTER_CONFIG).exists()


def test_an_adapter_whose_bits_flip_between_the_reads(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage gives other bytes of the same file the second time."""
    recipe, out = family.recipe(pipeline={"file_size": "15KB"}), family.root / "out"
    read_into, second = LocalStore.read_into, []

    def flipping(self: LocalStore, path: str, start: int, buffer: memoryview) -> None:
        read_into(self, path, start, buffer)
        if second and Path(self.url) == family.models[1]:
            buffer[0] ^= 1

    monkeypatch.setattr(LocalStore, "read_into", flipping)
    resources, listener = without_retention(recipe, out), before_writing(lambda: second.append(True))
    words = (str(family.models[1]), "first read")
    refused(recipe, out, VerificationError, *words, listener=listener, resources=resources)
