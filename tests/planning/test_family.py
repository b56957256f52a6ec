"""Whether checkpoints are one family: everything that headers show, all at once."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.errors import CheckpointError
from pipeline.planning.configs import headless_problems
from pipeline.planning.family import align
from tests.support.families import save_model

WEIGHTS = {
    "model.embed_tokens.weight": torch.ones(8, 4),
    "model.layers.0.w": torch.ones(4, 4),
    "model.layers.1.w": torch.ones(4, 4),
    "model.position_ids": torch.arange(5),
    "model.mask": torch.tensor([True, False]),
}


def opened(folder: Path, changes: Mapping[str, torch.Tensor | None] | None = None, **keys: object) -> Checkpoint:
    """A model with some tensors replaced, added or left out."""
    weights = {name: value for name, value in {**WEIGHTS, **(changes or {})}.items() if value is not None}
    return open_checkpoint(str(save_model(folder, weights, **keys)))  # type: ignore[arg-type]


def refusal(*checkpoints: Checkpoint) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        align(checkpoints)
    assert all(problem.where and problem.remedy for problem in caught.value.problems)
    return [f"{problem.where}: {problem.what}" for problem in caught.value.problems]


def test_a_family_keeps_the_references_order_and_knows_what_is_copied(tmp_path: Path) -> None:
    reference = opened(tmp_path / "a")
    family = align([reference, opened(tmp_path / "b", shards=3), opened(tmp_path / "c", dtype=torch.bfloat16)])
    assert [item.name for item in family.tensors] == list(reference.tensors)
    assert {item.name for item in family.tensors if not item.merged} == {"model.position_ids", "model.mask"}
    assert family.notes == ()
    for item in family.tensors:
        assert item.reference.shape == tuple(WEIGHTS[item.name].shape)
        assert item.reference.elements == WEIGHTS[item.name].numel()
        assert item.copies == ((), (), ())
        if item.merged:
            assert [entry.dtype for entry in item.entries] == ["F32", "F32", "BF16"]


def test_missing_and_extra_tensors(tmp_path: Path) -> None:
    a = opened(tmp_path / "a")
    b = opened(tmp_path / "b", {"model.layers.1.w": None, "model.extra": torch.ones(1)})
    assert refusal(a, b) == [
        f"model {b.url}: lacks tensor model.layers.1.w that {a.url} has",
        f"model {b.url}: has tensor model.extra that {a.url} lacks",
    ]


def test_long_lists_are_counted(tmp_path: Path) -> None:
    a = opened(tmp_path / "a", {f"x{number}": torch.ones(1) for number in range(9)})
    b = opened(tmp_path / "b")
    assert refusal(a, b) == [f"model {b.url}: lacks 9 tensors (x0, x1, x2, x3, and 5 more) that {a.url} has"]


LANGUAGE_MODEL = {"architectures": ["LlamaForCausalLM"]}


def test_a_missing_head_of_an_untied_family_is_said(tmp_path: Path) -> None:
    a = opened(tmp_path / "a", {"lm_head.weight": torch.ones(8, 4)})
    b = opened(tmp_path / "b", config=LANGUAGE_MODEL)
    own, compared = refusal(a, b)
    assert own == (
        f"model {b.url}: has no output embedding (lm_head),"
        " and config.json says that it is not tied to the input embedding"
    )
    assert compared == (
        f"model {b.url}: lacks tensor lm_head.weight that {a.url} has;"
        " its embeddings are not tied, so the head cannot be inferred"
    )


def test_a_language_model_without_its_head_is_refused_even_where_no_other_has_one(tmp_path: Path) -> None:
    models = [opened(tmp_path / name, config=LANGUAGE_MODEL) for name in "ab"]
    texts = refusal(*models)
    assert [text.partition(": ")[0] for text in texts] == [f"model {model.url}" for model in models]
    assert all("has no output embedding (lm_head)" in text for text in texts)
    (problem,) = headless_problems(models[0])
    assert "tie_word_embeddings" in problem.remedy


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, True),
        ({"architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": False}, True),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}, False),
        ({"architectures": ["LlamaForCausalLM"]}, False),  # the library's default decides, which is not known here
        ({"architectures": ["LlamaModel"], "tie_word_embeddings": False}, False),
        ({"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": False}, False),
        ({"architectures": None, "tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": False}, False),
        # Of a model of text and images the text's own config counts where the outer one says nothing.
        ({"architectures": ["XForConditionalGeneration"], "text_config": {"tie_word_embeddings": False}}, True),
        ({"architectures": ["XForConditionalGeneration"], "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
@pytest.mark.parametrize("head", [None, "lm_head.weight", "language_model.lm_head.weight", "embed_out.weight"])
def test_a_head_is_missed_where_a_generating_model_declares_one(
    tmp_path: Path, config: dict[str, object], refused: bool, head: str | None
) -> None:
    folder = save_model(tmp_path, {**WEIGHTS, **({head: torch.ones(8, 4)} if head else {})})
    (folder / "config.json").write_text(json.dumps(config))
    problems = headless_problems(open_checkpoint(str(folder)))
    assert [problem.where for problem in problems] == ([f"model {folder}"] if refused and head is None else [])


def test_shapes_and_vocabularies(tmp_path: Path) -> None:
    a = opened(tmp_path / "a")
    b = opened(tmp_path / "b", {"model.embed_tokens.weight": torch.ones(9, 4), "model.layers.0.w": torch.ones(4, 5)})
    found = refusal(a, b)
    assert sorted(found) == [
        f"model {b.url}, tensor model.embed_tokens.weight: shape [9, 4], but [8, 4] in {a.url}: "
        "vocabularies of 9 and 8 tokens",
        f"model {b.url}, tensor model.layers.0.w: shape [4, 5], but [4, 4] in {a.url}",
    ]


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("model.position_ids", torch.arange(5, dtype=torch.int32), "dtype I32, but I64"),
        ("model.position_ids", torch.ones(5), "dtype F32, but I64"),
        ("model.layers.0.w", torch.ones(4, 4, dtype=torch.int8), "dtype I8, but F32"),
        ("model.mask", torch.tensor([1, 0], dtype=torch.uint8), "dtype U8, but BOOL"),
    ],
)
def test_kinds_of_elements_must_agree(tmp_path: Path, name: str, value: torch.Tensor, word: str) -> None:
    a, b = opened(tmp_path / "a"), opened(tmp_path / "b", {name: value})
    assert refusal(a, b) == [f"model {b.url}, tensor {name}: {word} in {a.url}"]


def test_what_can_be_neither_merged_nor_copied_is_refused_in_the_reference_too(tmp_path: Path) -> None:
    z = torch.ones(2, dtype=torch.complex64)
    a, b = opened(tmp_path / "a", {"z": z}), opened(tmp_path / "b", {"z": z})
    assert refusal(a, b) == [f"model {model.url}: tensor z has dtype C64, which cannot be merged" for model in (a, b)]


def test_everything_is_found_at_once_in_the_order_of_the_models(tmp_path: Path) -> None:
    a = opened(tmp_path / "a")
    b = opened(tmp_path / "b", {"model.layers.0.w": None}, config={"rope_theta": 1.0})
    c = opened(tmp_path / "c", {"model.layers.1.w": torch.ones(2), "y": torch.ones(1)})
    d = opened(tmp_path / "d", config={"quantization_config": {"bits": 4}})
    found = refusal(a, b, c, d)
    assert len(found) == 5
    for text, words in zip(
        found,
        [
            (d.url, "quantized"),
            (b.url, "lacks"),
            (c.url, "has tensor y"),
            (c.url, "shape [2], but [4, 4]"),
            (b.url, "rope_theta"),
        ],
        strict=True,
    ):
        assert all(word in text for word in words)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    a = opened(tmp_path / "a")
    b = opened(tmp_path / "b", {"model.layers.0.w.lora_A.weight": torch.ones(2, 4)})
    assert any("adapter" in text and str(b.url) in text for text in refusal(a, b))


@pytest.mark.parametrize("stored", [(True, True), (True, False), (False, True)])
def test_tied_embeddings_are_one_tensor(tmp_path: Path, stored: tuple[bool, bool]) -> None:
    head = {"lm_head.weight": torch.ones(8, 4)}
    models = [
        opened(tmp_path / str(number), head if has else {}, config={"tie_word_embeddings": True})
        for number, has in enumerate(stored)
    ]
    family = align(models)
    assert "lm_head.weight" not in [item.name for item in family.tensors]
    (embedding,) = [item for item in family.tensors if item.name == "model.embed_tokens.weight"]
    assert [len(copies) for copies in embedding.copies] == [int(has) for has in stored]
    assert {copy.name for copies in embedding.copies for copy in copies} == {"lm_head.weight"}
    assert family.notes == ("lm_head.weight is tied to model.embed_tokens.weight and written once",)


def test_untied_embeddings_are_two(tmp_path: Path) -> None:
    head = {"lm_head.weight": torch.ones(8, 4)}
    family = align([opened(tmp_path / name, head) for name in "ab"])
    assert "lm_head.weight" in [item.name for item in family.tensors]
    assert family.notes == ()
