"""Adapters at the edges: what peft itself saves, heads stored whole, ties, credentials, and what the report says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import CheckpointError, PipelineError, RecipeError
from pipeline.merging import merge
from tests.support.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    Layout,
    linears,
    make_adapters,
    random_factors,
    save_adapter,
    updates_of,
    write_tensors,
)
from tests.support.cases import edit, edit_config, refused
from tests.support.families import Family, fine_tune, llama_shapes, load_folder, random_weights, save_model
from tests.support.reference import assert_within_rounding, reference_median

QV = linears(llama_shapes(), "q_proj", "v_proj")
LM_HEAD, PREFIX = "lm_head.weight", "base_model.model."
TOKENS = torch.arange(1, 41).reshape(2, 20)
# Two orders of the same float32 products: 20 tokens through 2 layers of width 32 part by a few units in the last place
# of logits of about 1; every update here moves them by 1e-2 or more.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
MOVED = 1e-2


def groups_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in report["groups"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", random_weights(0))


@pytest.fixture
def family(tmp_path: Path, base: Path) -> Family:
    return make_adapters(tmp_path, base, [Layout(modules=QV), Layout(modules=QV, rank=3), Layout(modules=QV, rank=2)])


# --- in the hands of peft ----------------------------------------------------------------------------------------

# peft asks transformers by a name that transformers is giving up, and says that it stores the head: no affair of ours.
quiet = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
)


def load_model(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="the test extra brings transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()


def adapted(base: Path, adapter: Path) -> Any:
    """The base with an adapter on it, as peft puts it."""
    peft = pytest.importorskip("peft", reason="the test extra brings peft")
    return peft.PeftModel.from_pretrained(load_model(base), adapter).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def save_base(folder: Path, kind: str) -> Path:
    transformers = pytest.importorskip("transformers", reason="the test extra brings transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
        tokens = {"bos_token_id": 1, "eos_token_id": 2}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    model.save_pretrained(folder)
    return folder


def peft_adapters(root: Path, base: Path, count: int, **settings: object) -> Family:
    """Adapters that peft makes and saves itself, their updates random."""
    peft = pytest.importorskip("peft", reason="the test extra brings peft")
    family = Family(root=root, base=base, base_values=load_folder(base))
    for number in range(count):
        torch.manual_seed(number + 1)
        config = peft.LoraConfig(r=2 + number, task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(load_model(base), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        folder = root / f"peft{number}"
        model.save_pretrained(folder)
        family.models.append(folder)
    return family


def peft_mean(family: Family, coefficients: list[float]) -> torch.Tensor:
    """Logits of Σ c · (the base with an adapter merged into it by peft)."""
    states = [adapted(family.base, folder).merge_and_unload().state_dict() for folder in family.models]
    model = load_model(family.base)
    mean = {
        name: sum(c * state[name].double() for c, state in zip(coefficients, states, strict=True)).float()
        for name in model.state_dict()
    }
    model.load_state_dict(mean)
    return logits(model)


def both_outputs(family: Family, root: Path) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Merge into a model and into an adapter; return the latter's report, and the logits of the two as loaded."""
    model_report = merge(str(family.recipe(name="model.yaml")), str(root / "model"))
    recipe = family.recipe(pipeline={"output": "adapter"}, name="adapter.yaml")
    report = merge(str(recipe), str(root / "adapter"))
    # The groups differ by what no adapter touches, which is nobody's say.
    assert groups_of(report)["model"]["coefficients"] == groups_of(model_report)["model"]["coefficients"]
    return report, logits(load_model(root / "model")), logits(adapted(family.base, root / "adapter"))


def assert_merged(family: Family, root: Path) -> dict[str, Any]:
    """Check that both outputs have the logits of peft's own mean, which are not the base's; return the report."""
    report, of_model, of_adapter = both_outputs(family, root)
    wanted = peft_mean(family, groups_of(report)["model"]["coefficients"])
    torch.testing.assert_close(of_model, wanted, **CLOSE)
    torch.testing.assert_close(of_adapter, wanted, **CLOSE)
    assert (of_adapter - logits(load_model(family.base))).abs().max() > MOVED
    return report


@quiet
def test_a_base_named_as_on_the_hub_takes_adapters_made_with_its_prefix(tmp_path: Path) -> None:
    """GPT-2's file lacks the `transformer.` that the class with a head has, and peft with it."""
    base = save_base(tmp_path / "base", "gpt2")
    bare = {n.removeprefix("transformer."): v for n, v in load_file(base / "model.safetensors").items()}
    assert "wte.weight" in bare
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    family = peft_adapters(tmp_path, base, 2, target_modules=["c_attn"], fan_in_fan_out=True)
    report = assert_merged(family, tmp_path)
    assert any("transformer.*" in note for note in report["notes"]), report["notes"]
    names = set(load_folder(tmp_path / "adapter"))
    assert names == set(load_folder(family.models[0])), "the merged adapter has the words of the adapters"
    config = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert config["target_modules"] == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert set(load_folder(tmp_path / "model")) == set(bare), "the merged model has those of the base"


@pytest.fixture
def headed(tmp_path: Path) -> Family:
    """Adapters of an untied Llama and its head, beside which peft stores a copy of the base's head."""
    base = save_base(tmp_path / "base", "llama")
    family = peft_adapters(tmp_path, base, 2, target_modules=["q_proj", "v_proj", "lm_head"])
    for folder in family.models:
        copy = load_folder(folder)[f"{PREFIX}lm_head.base_layer.weight"]
        assert torch.equal(copy, family.base_values[LM_HEAD])
    return family


@quiet
def test_the_copy_of_the_head_that_peft_stores_is_no_replacement(headed: Family, tmp_path: Path) -> None:
    report = assert_merged(headed, tmp_path)
    assert {entry["tensor"]: entry["rank"] for entry in report["modules"]}[LM_HEAD] == 2 + 3
    assert "lm_head" in updates_of(tmp_path / "adapter")
    assert not any(name.endswith(("base_layer.weight", LM_HEAD)) for name in load_folder(tmp_path / "adapter"))
    assert not any("values of its own" in note for note in report["notes"])


@quiet
@pytest.mark.parametrize("changed", [(0,), (1,), (0, 1)])
def test_a_changed_copy_of_the_head_replaces_the_base_s(
    headed: Family, tmp_path: Path, changed: tuple[int, ...]
) -> None:
    for number in changed:
        noise = 0.1 * torch.randn(64, 32, generator=torch.Generator().manual_seed(number))
        change = lambda tensors, n=noise: tensors[f"{PREFIX}lm_head.base_layer.weight"].add_(n)  # noqa: E731
        edit(headed.models[number], change, file=ADAPTER_FILE)
    report = assert_merged(headed, tmp_path)
    modules = {entry["tensor"] for entry in report["modules"]}
    assert LM_HEAD not in modules
    assert len(modules) == 4
    said = [note for note in report["notes"] if "values of its own for lm_head.weight" in note]
    assert len(said) == len(changed)
    assert all(str(headed.models[n]) in note for n, note in zip(changed, said, strict=True))


@quiet
@pytest.mark.parametrize("order", [1, -1])
def test_a_head_adapted_by_one_and_stored_whole_by_another(tmp_path: Path, order: int) -> None:
    base = save_base(tmp_path / "base", "llama")
    modules = linears(load_folder(base), "q_proj", "v_proj")
    layouts = [Layout(modules=(*modules, "lm_head"), size=0.1), Layout(modules=modules, saved=("lm_head",), size=0.1)]
    family = make_adapters(tmp_path, base, layouts[::order])
    report = assert_merged(family, tmp_path)
    config = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert config["modules_to_save"] == ["lm_head"]
    assert "lm_head" not in config["target_modules"]
    assert LM_HEAD not in {entry["tensor"] for entry in report["modules"]}
    coefficients = groups_of(report)["model"]["coefficients"]
    wanted = sum(c * values[LM_HEAD] for c, values in zip(coefficients, family.values, strict=True))
    found = load_folder(tmp_path / "adapter")[PREFIX + LM_HEAD]
    assert_within_rounding({LM_HEAD: found}, {LM_HEAD: wanted.float()})


# --- groups and what is measured ---------------------------------------------------------------------------------


def test_a_group_called_unchanged_is_solved_like_any_other(family: Family, tmp_path: Path) -> None:
    scope = [{"name": "unchanged", "tensors": ["*q_proj*"]}, {"name": "values", "tensors": ["*v_proj*"]}]
    report = merge(str(family.recipe(pipeline={"scope": scope}, out_dtype="float32")), str(tmp_path / "out"))
    touched = [f"{module}.weight" for module in QV]
    points = [{name: values[name] for name in touched} for values in family.values]
    group = lambda name: "unchanged" if "q_proj" in name else "values"  # noqa: E731
    merged, oracle = reference_median(points, [1.0] * 3, group, torch.float32)
    groups, found = groups_of(report), load_folder(tmp_path / "out")
    for name in ("unchanged", "values"):
        np.testing.assert_allclose(groups[name]["coefficients"], oracle[name], rtol=0, atol=1e-10)
        assert groups[name]["relative_gap"] <= 1e-10
    assert len({tuple(groups[name]["coefficients"]) for name in groups}) == len(groups)
    assert_within_rounding({name: found[name] for name in touched}, merged)
    rest = set(family.base_values) - set(touched)
    assert all(torch.equal(found[name], family.base_values[name]) for name in rest)


def test_adapters_named_with_their_one_base_need_no_base_model(family: Family, tmp_path: Path) -> None:
    plain = merge(str(family.recipe(name="plain.yaml")), str(tmp_path / "plain"))
    named = Family(root=tmp_path, base=family.base, models=[Path(f"{family.base}+{path}") for path in family.models])
    report = merge(str(named.recipe(base=False)), str(tmp_path / "named"))
    touched = [f"{module}.weight" for module in QV]
    norms = [
        sum(float(((v[n] - family.base_values[n].double()) ** 2).sum()) for n in touched) ** 0.5 for v in family.values
    ]
    found, wanted = groups_of(report)["model"], groups_of(plain)["model"]
    np.testing.assert_allclose(found["norms"], norms, rtol=1e-9)
    for key in ("norms", "coefficients", "cosines"):
        assert found[key] == wanted[key], key
    assert not any("base_model" in note for note in report["notes"])
    assert_within_rounding(load_folder(tmp_path / "named"), load_folder(tmp_path / "plain"), ulps=0)


@pytest.mark.parametrize("output", ["model", "adapter"])
@pytest.mark.parametrize("named", [True, False])
def test_a_single_adapter_of_whole_tensors_only(base: Path, tmp_path: Path, output: str, named: bool) -> None:
    family = make_adapters(tmp_path, base, [Layout(modules=(), saved=("lm_head",))])
    whole = load_folder(family.models[0])[PREFIX + LM_HEAD]
    family.models = [Path(f"{base}+{family.models[0]}")]
    merge(str(family.recipe(base=named, pipeline={"output": output})), str(tmp_path / "out"))
    found = load_folder(tmp_path / "out")
    if output == "adapter":
        assert set(found) == {PREFIX + LM_HEAD}
        assert torch.equal(found[PREFIX + LM_HEAD], whole)
    else:
        assert set(found) == set(family.base_values)
        wanted = {**family.base_values, LM_HEAD: whole}
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_the_unchanged_share_counts_rows_and_columns_of_zeros(base: Path, tmp_path: Path, scope: str) -> None:
    weights = load_folder(base)
    layouts = [Layout(modules=QV), Layout(modules=QV[:2]), Layout(modules=QV)]
    family = Family(root=tmp_path, base=base, base_values=weights)
    for number, layout in enumerate(layouts):
        factors = random_factors(weights, layout, number)
        for module, pair in factors.items():
            if number == 0:
                pair["B"][3:9] = 0
            if number == 1:
                pair["A"][:, ::4] = 0
                pair["B"][-1] = 0
                # A zero in one of the ranks alone is no row of zeros.
                pair["B"][0, 1] = 0
            if number == 2 and "q_proj" in module:
                pair["B"].zero_()
        folder = tmp_path / f"sparse{number}"
        family.values.append(save_adapter(folder, weights, layout, factors, base_path=base))
        family.models.append(folder)
    report = merge(str(family.recipe(pipeline={"scope": scope})), str(tmp_path / "out"))
    elements = sum(value.numel() for value in weights.values())
    wanted = [
        sum(int((values[name] == weights[name].double()).sum()) for name in weights) / elements
        for values in family.values
    ]
    assert len(set(wanted)) == 3
    assert [model["unchanged_share"] for model in report["models"]] == pytest.approx(wanted, rel=1e-12)


def test_copies_are_noted(family: Family, base: Path, tmp_path: Path) -> None:
    """A copy of an adapter, in another order of its file, and one that adds nothing."""
    copy, idle = tmp_path / "copy", tmp_path / "idle"
    shutil.copytree(family.models[1], copy)
    tensors = load_file(copy / ADAPTER_FILE)
    write_tensors(copy / ADAPTER_FILE, {name: tensors[name] for name in sorted(tensors, reverse=True)})
    shutil.copytree(family.models[0], idle)
    edit(idle, lambda held: [value.zero_() for name, value in held.items() if "lora_B" in name], file=ADAPTER_FILE)
    family.models += [copy, idle]
    report = merge(str(family.recipe()), str(tmp_path / "out"))
    same = [note for note in report["notes"] if "the same values" in note]
    assert len(same) == 2
    assert same[0].startswith(f"{copy} has the same values as {family.models[1]}")
    assert same[1].startswith(f"{idle} has the same values as the base model, {base}")


def test_two_adapters_of_which_one_is_a_copy(base: Path, tmp_path: Path) -> None:
    family = make_adapters(tmp_path, base, [Layout(modules=QV)])
    copy = tmp_path / "copy"
    shutil.copytree(family.models[0], copy)
    family.models.append(copy)
    report = merge(str(family.recipe(pipeline={"output": "adapter"})), str(tmp_path / "out"))
    assert any(note.startswith(f"{copy} has the same values as {family.models[0]}") for note in report["notes"])
    updates, wanted = updates_of(tmp_path / "out"), family.values[0]
    for module in QV:
        update = (wanted[f"{module}.weight"] - family.base_values[f"{module}.weight"].double()).numpy()
        np.testing.assert_allclose(updates[module], update, rtol=0, atol=1e-6 * np.abs(update).max())


# --- refusals and notes ------------------------------------------------------------------------------------------


def test_a_family_that_ties_what_an_adapter_adds_to(tmp_path: Path) -> None:
    """The base stores both and says nothing; a fine-tune without the head makes them one."""
    weights = random_weights(0)
    weights[LM_HEAD] = weights["model.embed_tokens.weight"].clone()

    def save(name: str, values: Mapping[str, torch.Tensor]) -> Path:
        # The architecture is said: a file without a head would be an encoder's otherwise.
        folder = save_model(tmp_path / name, values, config={"architectures": ["LlamaForCausalLM"]})
        edit_config(folder, tie_word_embeddings=...)
        return folder

    base = save("base", weights)
    tuned = fine_tune(weights, 1)
    del tuned[LM_HEAD]
    full = save("full", tuned)
    family = make_adapters(tmp_path, base, [Layout(modules=(*QV, "lm_head"), size=0.1)])
    adapter = family.models[0]
    family.models = [full, adapter]
    words = (str(adapter), "ties", LM_HEAD, "model.embed_tokens.weight")
    text = refused(family.recipe(), tmp_path / "out", CheckpointError, *words)
    assert str(full) not in text
    # Nothing ties them while every model stores both.
    family.models = [save("both", fine_tune(weights, 1)), adapter]
    merge(str(family.recipe(out_dtype="float32")), str(tmp_path / "out"))
    found = load_folder(tmp_path / "out")
    assert not torch.equal(found[LM_HEAD], found["model.embed_tokens.weight"])


SECRET = re.compile(rb"AKIAKEY|hunter22|T0KEN77|token=")
STATED = "s3://AKIAKEY:hunter22@bucket/llama-base?token=T0KEN77"


def assert_no_secret(text: str) -> None:
    assert not SECRET.search(text.encode()), text


@pytest.mark.parametrize("output", ["model", "adapter"])
def test_credentials_in_the_name_of_the_base_are_not_passed_on(family: Family, tmp_path: Path, output: str) -> None:
    for folder in family.models:
        edit_config(folder, file=ADAPTER_CONFIG, base_model_name_or_path=STATED)
    events: list[object] = []
    recipe = family.recipe(pipeline={"output": output})
    report = merge(str(recipe), str(tmp_path / "out"), listener=events.append)
    # It names another model than the base, so it is named.
    assert any("s3://bucket/llama-base" in note for note in report["notes"])
    assert_no_secret(json.dumps(report))
    assert_no_secret(repr(events))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {ADAPTER_CONFIG if output == "adapter" else "config.json", "README.md"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.search(path.read_bytes())]
    if output == "adapter":
        stated = json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
        assert stated == "s3://bucket/llama-base"


def test_credentials_in_the_name_of_the_base_are_in_no_error(family: Family, tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", random_weights(0, shapes=llama_shapes(hidden=64)))
    family.models[1] = make_adapters(tmp_path / "more", wide, [Layout(modules=QV)]).models[0]
    for folder in family.models:
        edit_config(folder, file=ADAPTER_CONFIG, base_model_name_or_path=STATED)
    cases: list[tuple[type[PipelineError], dict[str, Any]]] = [(RecipeError, {"base": False}), (CheckpointError, {})]
    for kind, keys in cases:
        assert_no_secret(refused(family.recipe(**keys), tmp_path / "out", kind, "s3://bucket/llama-base"))


def said_of_bases(family: Family, out: Path) -> list[str]:
    report = merge(str(family.recipe()), str(out))
    return [note for note in report["notes"] if "trained on" in note]


def test_adapters_of_another_base_are_noted(family: Family, tmp_path: Path) -> None:
    """By the last part of the name, in which a folder and a name on a hub agree."""
    assert said_of_bases(family, tmp_path / "same") == []
    for folder, name in zip(family.models, ("hub/Base", "/elsewhere/base/", None), strict=True):
        edit_config(folder, file=ADAPTER_CONFIG, base_model_name_or_path=name)
    assert said_of_bases(family, tmp_path / "alike") == []
    edit_config(family.models[2], file=ADAPTER_CONFIG, base_model_name_or_path="hub/base-instruct")
    (note,) = said_of_bases(family, tmp_path / "one")
    assert "hub/base-instruct (1 of 3)" in note
    assert str(family.base) in note
    for folder in family.models:
        edit_config(folder, file=ADAPTER_CONFIG, base_model_name_or_path="hub/base-instruct")
    (note,) = said_of_bases(family, tmp_path / "all")
    assert "hub/base-instruct (3 of 3)" in note


@pytest.mark.parametrize("method", ["geometric_median", "linear"])
@pytest.mark.parametrize("name", [f"{QV[0]}.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_base_that_is_not_finite_is_blamed_and_no_adapter(
    family: Family, base: Path, tmp_path: Path, method: str, name: str
) -> None:
    tuned = save_model(tmp_path / "full", fine_tune(random_weights(0), 1))
    family.models.append(tuned)
    edit(base, lambda tensors: tensors[name][2, 5:7].fill_(float("nan")))
    text = refused(family.recipe(method), tmp_path / "out", CheckpointError, f"model {base}, tensor {name}", "2 of")
    blamed = re.findall(r"model (\S+), tensor", text)
    assert blamed == [str(base)], text
    assert not any(str(folder) in text for folder in family.models)
