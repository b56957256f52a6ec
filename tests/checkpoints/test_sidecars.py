from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.checkpoints.sidecars import has_tokenizer, output_config, side_files
from pipeline.storage import open_store

BELONGS = (
    "1_Pooling/config.json",
    "chat_template.jinja",
    "config.json",
    "config_sentence_transformers.json",
    "generation_config.json",
    "merges.txt",
    "modeling_custom.py",
    "modules.json",
    "preprocessor_config.json",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
DOES_NOT = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.gguf",
    "README.md",
    "readme.txt",
    "LICENSE.txt",
    "NOTICE.txt",
    ".gitattributes",
    ".cache/x.json",
    "trainer_state.json",
    "training_args.bin",
    "training_args.json",
    "optimizer.pt",
    "all_results.json",
    "adapter_config.json",
    "geomerge_report.json",
    "_geomerge/plan.json",
    "checkpoint-500/config.json",
    "onnx/config.json",
    "original/params.json",
    "a/b/config.json",
)


def test_what_belongs_to_a_model(tmp_path: Path) -> None:
    for path in (*BELONGS, *DOES_NOT):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"{}")
    assert side_files(open_store(str(tmp_path))) == tuple(sorted(BELONGS))


def test_huge_files_are_left_out(tmp_path: Path) -> None:
    for name, size in (("a.json", 100_000_000), ("b.json", 100_000_001)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    assert side_files(open_store(str(tmp_path))) == ("a.json",)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tokenizer.json", True),
        ("spiece.model", True),
        ("vocab.txt", True),
        ("x.tiktoken", True),
        ("sub/tokenizer.json", False),
        ("config.json", False),
    ],
)
def test_has_tokenizer(tmp_path: Path, path: str, expected: bool) -> None:
    store = open_store(str(tmp_path))
    store.write(path, b"{}")
    assert has_tokenizer(store) is expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({"a": 1}, {"a": 1, "torch_dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"torch_dtype": "float32", "b": 2}},
            {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "b": 2}},
        ),
        ({"dtype": None, "text_config": {"b": 2}}, {"dtype": "bfloat16", "text_config": {"b": 2}}),
        ({"text_config": None}, {"text_config": None, "torch_dtype": "bfloat16"}),
    ],
)
def test_output_config(config: dict[str, object], expected: dict[str, object]) -> None:
    before = repr(config)
    assert output_config(config, "bfloat16") == expected
    assert repr(config) == before
