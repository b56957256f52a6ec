"""What belongs to a model beside its weights: configuration, tokenizer, templates, modules.

Owns which files those are, and the dtype entry of a config. Must not know how they are copied.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

from pipeline.storage import Store

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
# Of training, of other forms of the weights, of adapters (their config would make the model one), of this program.
_FOREIGN_FILES = re.compile(
    r"README.*|LICENSE.*|NOTICE.*|.*\.index\.json|trainer_state\.json|.*_results\.json|training_args.*|optimizer.*"
    r"|scheduler.*|rng_state.*|adapter_config\.json|zero_to_fp32\.py|geomerge_report\.json",
    re.IGNORECASE,
)
_FOREIGN_FOLDERS = re.compile(
    r"_geomerge|checkpoint-\d+|global_step\d+|onnx|openvino|coreml|gguf|original|runs|logs|wandb|eval", re.IGNORECASE
)
# The largest tokenizers have some 35 MB; what is larger is data.
_LARGEST_BYTES = 100_000_000
# What a tokenizer is read from, each of them enough to find one.
_TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "spiece.model",
        "sentencepiece.bpe.model",
        "vocab.json",
        "vocab.txt",
    }
)

_TOKENIZER_PARTS = _TOKENIZER_FILES | {
    "added_tokens.json",
    "special_tokens_map.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
}

# What a model folder has at its top beside weights, whoever wrote it.
MODEL_FILES = _TOKENIZER_PARTS | {
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "processor_config.json",
}


def side_files(store: Store) -> tuple[str, ...]:
    """Return the paths of the files that a copy of the model needs beside its weights, sorted.

    Args:
        store: The model folder; one level of sub-folders is looked into (sentence-transformers keeps modules there).
    """
    return tuple(path for path in store.list() if _belongs(path) and store.stat(path).size_bytes <= _LARGEST_BYTES)


def tokenizer_files(store: Store) -> tuple[str, ...]:
    """Return those of `side_files` that a tokenizer is made of."""
    return tuple(path for path in side_files(store) if path in _TOKENIZER_PARTS or path.endswith(".tiktoken"))


def has_tokenizer(store: Store) -> bool:
    """Return whether the folder itself holds a tokenizer of any kind."""
    return any(path in _TOKENIZER_FILES or (path.endswith(".tiktoken") and "/" not in path) for path in store.list())


def output_config(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """Return a config for weights of another dtype; the original is not touched.

    Args:
        config: The content of config.json.
        dtype: torch's name, such as "bfloat16". Whichever of `torch_dtype` (older) and `dtype` is there is set, also in
            `text_config`; `torch_dtype` when there is none at the top.
    """
    result = copy.deepcopy(dict(config))
    _set_dtype(result, dtype)
    if "torch_dtype" not in result and "dtype" not in result:
        result["torch_dtype"] = dtype
    text = result.get("text_config")
    if isinstance(text, dict):
        _set_dtype(text, dtype)
    return result


def _set_dtype(fields: dict[str, object], dtype: str) -> None:
    for key in ("torch_dtype", "dtype"):
        if key in fields:
            fields[key] = dtype


def _belongs(path: str) -> bool:
    *folders, name = path.split("/")
    return (
        len(folders) <= 1
        and not any(part.startswith(".") for part in (*folders, name))
        and not any(_FOREIGN_FOLDERS.fullmatch(folder) for folder in folders)
        and name.lower().endswith(_SUFFIXES)
        and not _FOREIGN_FILES.fullmatch(name)
    )
