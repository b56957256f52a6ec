"""Which differences between config files forbid a merge."""

from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.planning.configs import compare_configs, quantization_problems
from tests.support.families import save_model


def checkpoint(folder: Path, config: dict[str, object], *tensors: str) -> Checkpoint:
    weights = {name: torch.zeros(2, 2) for name in tensors or ("w", "lm_head.weight")}
    return open_checkpoint(str(save_model(folder, weights, config=config)))


def compared(root: Path, first: dict[str, object], second: dict[str, object]) -> tuple[list[str], list[str]]:
    """Texts of the problems and the notes."""
    problems, notes = compare_configs([checkpoint(root / "a", first), checkpoint(root / "b", second)])
    for problem in problems:
        assert problem.where == f"model {root / 'b'}, config.json"
        assert problem.remedy
    return [problem.what for problem in problems], notes


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("rope_theta", 10000.0, 500000.0),
        ("rms_norm_eps", 1e-6, 1e-5),
        ("layer_norm_epsilon", 1e-5, 1e-12),
        ("tie_word_embeddings", False, True),
        ("num_attention_heads", 4, 8),
        ("num_key_value_heads", 2, 4),
        ("n_head", 4, 8),
        ("head_dim", 8, 16),
        ("hidden_act", "silu", "gelu"),
        ("activation_function", "gelu", "gelu_new"),
        ("model_type", "llama", "mistral"),
        ("architectures", ["LlamaForCausalLM"], ["MistralForCausalLM"]),
        ("sliding_window", 4096, 1024),
        ("attn_logit_softcapping", 50.0, 30.0),
        ("num_experts_per_tok", 2, 4),
        ("norm_topk_prob", True, False),
        ("logit_scale", 1.0, 0.0625),
        ("position_embedding_type", "absolute", "relative_key"),
        ("is_decoder", False, True),
        ("partial_rotary_factor", 0.5, 1.0),
    ],
)
def test_two_functions_are_not_one_family(tmp_path: Path, key: str, first: object, second: object) -> None:
    problems, notes = compared(tmp_path, {key: first}, {key: second})
    assert problems == [f"{key} is {second!r}, but {first!r} in {tmp_path / 'a'}"]
    assert notes == []


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("_name_or_path", "meta/llama", "me/mine"),
        ("transformers_version", "4.40", "4.56"),
        ("torch_dtype", "bfloat16", "float32"),
        ("dtype", "bfloat16", "float32"),
        ("use_cache", True, False),
        ("attention_dropout", 0.0, 0.1),
        ("hidden_dropout_prob", 0.0, 0.1),
        ("resid_pdrop", 0.0, 0.1),
        ("initializer_range", 0.02, 0.01),
        ("id2label", {"0": "a"}, {"0": "b"}),
        ("label2id", {"a": 0, "b": 1}, {"a": 1, "b": 0}),
        ("pretraining_tp", 1, 2),
        ("output_attentions", False, True),
    ],
)
def test_history_is_silent(tmp_path: Path, key: str, first: object, second: object) -> None:
    assert compared(tmp_path, {key: first}, {key: second}) == ([], [])


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [("pad_token_id", 0, 2), ("max_position_embeddings", 128, 4096), ("a_key_of_tomorrow", [1], [2])],
)
def test_anything_else_is_noted(tmp_path: Path, key: str, first: object, second: object) -> None:
    problems, notes = compared(tmp_path, {key: first}, {key: second})
    assert problems == []
    (note,) = notes
    assert note == (
        f"{tmp_path / 'b'}: config.json {key} is {second!r}, but {first!r} in {tmp_path / 'a'};"
        " the output takes the reference's"
    )


def test_a_key_that_one_file_leaves_out_is_not_compared(tmp_path: Path) -> None:
    assert compared(tmp_path, {"sliding_window": 4096}, {}) == ([], [])
    assert compared(tmp_path, {}, {"logit_scale": 2.0}) == ([], [])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # The older and the newer way to write the same.
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ({"rope_scaling": None}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
    ],
)
def test_spellings_of_the_same_rotary_embedding_agree(
    tmp_path: Path, first: dict[str, object], second: dict[str, object]
) -> None:
    assert compared(tmp_path, first, second) == ([], [])


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        ({"rope_scaling": None}, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type"),
        ({}, {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_type"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            "factor",
        ),
        ({"rope_theta": 1e4}, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
    ],
)
def test_scaled_positions_are_another_function(
    tmp_path: Path, first: dict[str, object], second: dict[str, object], key: str
) -> None:
    problems, _ = compared(tmp_path, first, second)
    assert [problem.split()[0] for problem in problems] == [key]


def test_inner_configs_count_as_the_outer_one(tmp_path: Path) -> None:
    first = {"text_config": {"rope_theta": 1e4, "pad_token_id": 1, "torch_dtype": "float16"}}
    second = {"text_config": {"rope_theta": 1e6, "pad_token_id": 2, "torch_dtype": "float32"}}
    problems, notes = compared(tmp_path, first, second)
    assert problems == [f"text_config.rope_theta is 1000000.0, but 10000.0 in {tmp_path / 'a'}"]
    assert ["text_config.pad_token_id is 2" in note for note in notes] == [True]


def test_every_model_and_key_is_reported(tmp_path: Path) -> None:
    models = [
        checkpoint(tmp_path / "a", {}),
        checkpoint(tmp_path / "b", {"rope_theta": 1.0, "rms_norm_eps": 1.0}),
        checkpoint(tmp_path / "c", {"hidden_act": "relu"}),
    ]
    problems, _ = compare_configs(models)
    assert [(problem.where, problem.what.split()[0]) for problem in problems] == [
        (f"model {tmp_path / 'b'}, config.json", "rms_norm_eps"),
        (f"model {tmp_path / 'b'}, config.json", "rope_theta"),
        (f"model {tmp_path / 'c'}, config.json", "hidden_act"),
    ]


def test_models_without_a_config_are_left_aside(tmp_path: Path) -> None:
    bare = checkpoint(tmp_path / "bare", {})
    (tmp_path / "bare" / "config.json").unlink()
    bare = open_checkpoint(bare.url)
    assert bare.config == {}
    first, second = checkpoint(tmp_path / "a", {}), checkpoint(tmp_path / "b", {"rope_theta": 1.0})
    problems, _ = compare_configs([bare, first, second])
    assert len(problems) == 1
    assert str(first.url) in problems[0].what
    assert compare_configs([bare]) == ([], [])


def test_long_values_are_cut(tmp_path: Path) -> None:
    problems, _ = compared(tmp_path, {"architectures": ["x" * 500]}, {"architectures": ["y" * 500]})
    assert len(problems[0]) < 200 + len(str(tmp_path))


def test_codes_of_a_quantizer_are_refused(tmp_path: Path) -> None:
    by_config = checkpoint(tmp_path / "a", {"quantization_config": {"quant_method": "gptq"}})
    by_name = checkpoint(tmp_path / "b", {}, "w.weight", "w.weight_scale_inv")
    for model, word in ((by_config, "gptq"), (by_name, "w.weight_scale_inv")):
        (problem,) = quantization_problems(model)
        assert word in problem.what
        assert problem.where == f"model {model.url}"
    assert quantization_problems(checkpoint(tmp_path / "c", {"quantization_config": None})) == []
