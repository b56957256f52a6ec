"""Tiny models of transformers with random weights, saved as users have them, and data for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY, CLASSES = 40, 3


def bert(folder: Path, layers: int = 3) -> Path:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=CLASSES,
        label2id={"no": 0, "yes": 1, "perhaps": 2},
        id2label={0: "no", 1: "yes", 2: "perhaps"},
    )
    return _saved(folder, transformers.BertForSequenceClassification, config)


def llama(folder: Path, layers: int = 3, **changes: Any) -> Path:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    return _saved(folder, transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**settings, **changes}))


def t5(folder: Path, layers: int = 2, **changes: Any) -> Path:
    settings = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": layers,
        "num_decoder_layers": layers + 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
    return _saved(folder, transformers.T5ForConditionalGeneration, transformers.T5Config(**{**settings, **changes}))


def loaded(folder: Path) -> Any:
    """The model as transformers itself loads it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    maker = getattr(transformers, config.architectures[0])
    return maker.from_pretrained(folder, dtype=torch.float32).eval()


def save_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def token_rows(count: int, seed: int = 0, **fields: Any) -> list[dict[str, Any]]:
    """Rows of token ids of different lengths; a field is a function of a generator."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        row: dict[str, Any] = {"input_ids": tokens(generator)}
        rows.append({**row, **{name: make(generator) for name, make in fields.items()}})
    return rows


def tokens(generator: torch.Generator, least: int = 3, most: int = 9) -> list[int]:
    length = int(torch.randint(least, most, (1,), generator=generator))
    return [int(token) for token in torch.randint(1, VOCABULARY, (length,), generator=generator)]


def label(generator: torch.Generator) -> int:
    return int(torch.randint(CLASSES, (1,), generator=generator))


def _saved(folder: Path, kind: Any, config: Any) -> Path:
    torch.manual_seed(7)
    model = kind(config)
    with torch.no_grad():
        for value in model.parameters():
            # Larger than for training, so that nothing is nearly linear; norms stay near one.
            value.copy_(torch.randn_like(value) * 0.3 + (1.0 if value.dim() == 1 else 0.0))
    model.save_pretrained(folder)
    return folder
