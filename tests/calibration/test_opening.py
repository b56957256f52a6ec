"""From a model folder to a model that can be run: names, ties, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeline.calibration.opening import open_model
from pipeline.errors import CalibrationError, CheckpointError
from tests.calibration import models
from tests.calibration.runs import collect


def edited(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a model with other entries in its config; None removes one."""
    target.mkdir(parents=True)
    config = {**json.loads((source / "config.json").read_text()), **changes}
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return target


def with_weights(source: Path, target: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A copy of a model with other weights."""
    edited(source, target)
    save_file({name: value.contiguous() for name, value in weights.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_loaded_model_is_that_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    model = open_model(str(folder), None, "cpu")
    assert all(value.device.type == "meta" for value in model.module.parameters())
    model.load(model.parameters.values())
    wanted = models.loaded(folder)
    for ours, theirs in ((model.module.named_parameters(), wanted.named_parameters()),
                         (model.module.named_buffers(), wanted.named_buffers())):  # fmt: skip
        for (name_a, value), (name_b, reference) in zip(ours, theirs, strict=True):
            assert name_a == name_b
            assert torch.equal(value, reference)
    given = {"input_ids": torch.tensor([[3, 4, 5]])}
    if name == "t5":
        given["decoder_input_ids"] = torch.tensor([[0, 7]])
    with torch.no_grad():
        assert torch.equal(model.module(**given).logits, wanted(**given).logits)
    model.unload(model.parameters.values())
    assert all(value.device.type == "meta" for value in model.module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_computed_with_in_fp32(llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) for name, value in load_file(llama / "model.safetensors").items()}
    folder = with_weights(llama, tmp_path / "narrow", weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    model = open_model(str(folder), None, "cpu")
    model.load(model.parameters.values())
    for name, parameter in model.parameters.items():
        assert parameter.value.dtype == torch.float32
        assert torch.equal(parameter.value, weights[name].float())


def test_scores_tied_to_the_embedding_have_no_gram_of_their_own(tmp_path: Path) -> None:
    folder = models.llama(tmp_path / "tied", tie_word_embeddings=True)
    found = collect(folder, models.token_rows(3), tmp_path / "out", statistics="gram")
    assert found.find("input_gram", "model.embed_tokens.weight") is None
    assert found.outside("model.embed_tokens.weight") == "embedding, tied to the scores of tokens"


def test_weights_that_only_the_config_ties_stay_apart(t5: Path, tmp_path: Path) -> None:
    """T5 1.1 has scores of its own, and transformers' config of it says that they are tied."""
    weights = load_file(t5 / "model.safetensors")
    head = torch.randn_like(weights["shared.weight"])
    folder = with_weights(t5, tmp_path / "apart", {**weights, "lm_head.weight": head})
    model = open_model(str(folder), None, "cpu")
    model.load(model.parameters.values())
    assert torch.equal(model.module.lm_head.weight, head)
    assert torch.equal(model.module.encoder.embed_tokens.weight, weights["shared.weight"])
    rows = models.token_rows(3, target=models.tokens)
    found = collect(folder, rows, tmp_path / "out", statistics="gram")
    assert found.find("input_gram", "lm_head.weight") is not None
    # The same values under both names are one weight.
    folder = with_weights(t5, tmp_path / "same", {**weights, "lm_head.weight": weights["shared.weight"].clone()})
    assert "lm_head.weight" not in open_model(str(folder), None, "cpu").parameters


def test_a_tensor_that_the_class_does_not_have_is_told(bert: Path, tmp_path: Path) -> None:
    weights = {**load_file(bert / "model.safetensors"), "cls.extra.weight": torch.ones(2, 2)}
    folder = with_weights(bert, tmp_path / "more", weights)
    found = collect(folder, models.token_rows(3), tmp_path / "out", statistics="gram")
    assert found.outside("cls.extra.weight") == "no parameter of BertForSequenceClassification"


def test_what_is_no_model_of_the_task_is_refused(bert: Path, llama: Path, t5: Path, tmp_path: Path) -> None:
    headless = {n: v for n, v in load_file(bert / "model.safetensors").items() if not n.startswith("classifier")}
    cases = [
        (with_weights(bert, tmp_path / "headless", headless), None, CheckpointError, "has no tensor classifier.weight"),
        (edited(bert, tmp_path / "other", hidden_size=32), None, CheckpointError, "its config says"),
        (edited(bert, tmp_path / "none", architectures=None), None, CalibrationError, "which tells no task"),
        (edited(bert, tmp_path / "unknown", model_type="berd"), None, CalibrationError, "cannot use its config.json"),
        (edited(llama, tmp_path / "4bit", quantization_config={"quant_method": "gptq", "bits": 4}), None,
         CalibrationError, "is quantised"),
        (edited(t5, tmp_path / "nobegin", decoder_start_token_id=None), None, CalibrationError, "decoder_start"),
        (bert, "seq2seq", CalibrationError, "class for the task seq2seq"),
        (t5, "classification", CalibrationError, "encoder-decoder"),
        (tmp_path / "absent", None, CheckpointError, "does not exist"),
    ]  # fmt: skip
    for folder, task, kind, words in cases:
        with pytest.raises(kind, match=words):
            open_model(str(folder), task, "cpu")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CalibrationError, match="merge_and_unload"):
        open_model(str(adapter), None, "cpu")


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    """GPT-2 stores its weights in × out, in a layer of its own."""
    config = transformers.GPT2Config(vocab_size=models.VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    config.bos_token_id = config.eos_token_id = None
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CalibrationError, match="nothing that gram statistics are of"):
        collect(tmp_path / "gpt2", models.token_rows(2), tmp_path / "out", statistics="gram")
    assert collect(tmp_path / "gpt2", models.token_rows(2), tmp_path / "fisher", statistics="fisher").entries


def test_packed_weights_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    packed = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    folder = with_weights(llama, tmp_path / "packed", {**weights, "model.layers.0.mlp.up_proj.weight": packed})
    with pytest.raises(CheckpointError, match=r"up_proj.weight: is stored as I8"):
        collect(folder, models.token_rows(2), tmp_path / "out", statistics="gram")


def test_values_that_are_not_finite_are_found(llama: Path, tmp_path: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    folder = with_weights(llama, tmp_path / "nan", weights)
    with pytest.raises(CalibrationError, match=r"down_proj.weight: gets or gives values that are not finite"):
        collect(folder, models.token_rows(2), tmp_path / "gram", statistics="gram")
    with pytest.raises(CalibrationError, match="not finite"):
        collect(folder, models.token_rows(2), tmp_path / "fisher", statistics="fisher")
