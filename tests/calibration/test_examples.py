"""Rows of data: both forms, the fields, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from pipeline.calibration.batches import NOT_ASKED, Special, batches, make_batch
from pipeline.calibration.data import read_rows
from pipeline.calibration.examples import Example, Vocabulary, encode_rows
from pipeline.calibration.settings import Settings, Task, check_settings
from pipeline.errors import CalibrationError

WORDS = ["a", "b", "c", "d", "e"]
VOCABULARY = Vocabulary(size=10, classes=3, class_numbers={"no": 0, "yes": 1}, most_tokens=None)


class Tokenizer:
    """Words to ids, 8 before and 9 behind them; as transformers' tokenizers are called."""

    eos_token_id = 9

    def __call__(
        self,
        text: str = "",
        pair: str | None = None,
        *,
        text_target: str | None = None,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int = 0,
    ) -> dict[str, list[int]]:
        first = [WORDS.index(word) for word in (text_target if text_target is not None else text).split()]
        second = [] if pair is None else [WORDS.index(word) for word in pair.split()]
        if not add_special_tokens:
            return {"input_ids": first}
        ids = [8, *first, 9, *second]
        types = [0] * (len(first) + 2) + [1] * len(second)
        cut = max_length if truncation else len(ids)
        return {"input_ids": ids[:cut], "token_type_ids": types[:cut]}


def encoded(rows: list[dict[str, Any]], task: Task, statistics: str = "fisher", **settings: Any) -> tuple[Example, ...]:
    return encode_rows(rows, Settings(statistics=statistics, **settings), task, VOCABULARY, Tokenizer())


def test_texts_become_tokens() -> None:
    assert encoded([{"text": "a b", "label": 2}], "classification") == (
        Example(number=0, tokens=(8, 0, 1, 9), types=(0, 0, 0, 0), label=2),
    )
    (pair,) = encoded([{"x": "a", "y": "b", "label": "yes"}], "classification", text_fields=("x", "y"))
    assert (pair.tokens, pair.types, pair.label) == ((8, 0, 9, 1), (0, 0, 0, 1), 1)
    (pair,) = encoded([{"text": "a", "target": "b c"}], "seq2seq")
    assert (pair.tokens, pair.targets) == ((8, 0, 9), (8, 1, 2, 9))
    (text,) = encoded([{"text": "a b"}], "causal")
    assert (text.tokens, text.unasked) == ((8, 0, 1, 9), 1)
    (text,) = encoded([{"text": "a", "answer": "b c"}], "causal", label_field="answer")
    assert (text.tokens, text.unasked) == ((8, 0, 9, 1, 2, 9), 3)


def test_long_texts_are_cut_and_a_prompt_at_its_beginning() -> None:
    (text,) = encoded([{"text": "a b c d e"}], "causal", max_length=3)
    assert text.tokens == (8, 0, 1)
    (text,) = encoded([{"text": "a b c", "answer": "d e"}], "causal", label_field="answer", max_length=5)
    assert (text.tokens, text.unasked) == ((2, 9, 3, 4, 9)[-5:], 2)
    (text,) = encoded([{"text": "a", "answer": "a b c d"}], "causal", label_field="answer", max_length=4)
    assert (text.tokens, text.unasked) == ((9, 0, 1, 2), 1)


def test_no_label_is_asked_for_where_none_is_needed() -> None:
    for settings in ({"statistics": "gram"}, {"labels": "exact"}, {"labels": "sampled"}):
        assert encoded([{"text": "a"}], "classification", **settings)[0].label is None


@pytest.mark.parametrize(
    ("row", "task", "words"),
    [
        ({"body": "a", "label": 1}, "classification", r"has no field 'text', it has 'body', 'label' \(name the field"),
        ({"text": "a"}, "classification", "has no field 'label'"),
        ({"text": "a", "label": 3}, "classification", "label is 3, the model has the classes 0 to 2, no, yes"),
        ({"text": "a", "label": True}, "classification", "label is True"),
        ({"text": "a", "label": "perhaps"}, "classification", "label is 'perhaps'"),
        ({"text": 5, "label": 1}, "classification", "text must be a text, is int"),
        ({"text": "a"}, "seq2seq", "has no field 'target'"),
        ({"input_ids": [], "label": 1}, "classification", "has an empty text"),
        ({"text": "  ", "label": 1}, "classification", "has an empty text"),
        ({"text": "", "target": "a"}, "seq2seq", "has an empty text"),
        ({"input_ids": [1, 10], "label": 1}, "classification", "has the token 10; the model knows 10"),
        ({"input_ids": [1, -1], "label": 1}, "classification", "has the token -1"),
        ({"input_ids": "a b", "label": 1}, "classification", "input_ids must be a list of token ids"),
        ({"input_ids": [1]}, "causal", "has no token to be predicted"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row: dict[str, Any], task: Task, words: str) -> None:
    good = {"input_ids": [1, 2], "label": 0, "target": [1]}
    with pytest.raises(CalibrationError, match=rf"example 2 of the data: .*{words}"):
        encoded([good, row], task)


def test_of_many_bad_rows_the_first_are_named_and_all_counted() -> None:
    with pytest.raises(CalibrationError, match="and 15 more rows") as caught:
        encoded([{"label": 0}] * 20, "classification")
    assert len(caught.value.problems) == 6


def test_without_a_tokenizer_rows_must_bring_their_tokens() -> None:
    settings = Settings(statistics="gram")
    assert encode_rows([{"input_ids": [1]}], settings, "causal", VOCABULARY, None)[0].tokens == (1,)
    with pytest.raises(CalibrationError, match=r"no tokenizer .*input_ids"):
        encode_rows([{"text": "a"}], settings, "causal", VOCABULARY, None)


def test_batches_are_padded_and_masked() -> None:
    examples = [
        Example(number=0, tokens=(1, 2, 3), unasked=2),
        Example(number=1, tokens=(4, 5), unasked=1),
        Example(number=2, tokens=(6, 7)),
    ]
    first, second = batches(examples, 2, "causal", Special(padding=0, begin=None))
    assert first.numbers == (0, 1)
    assert first.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert first.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first.mask_BT.tolist() == [[True] * 3, [True, True, False]]
    assert first.targets_BT is not None
    assert first.targets_BT.tolist() == [[NOT_ASKED, 3, NOT_ASKED], [5, NOT_ASKED, NOT_ASKED]]
    assert second.numbers == (2,)
    pair = Example(number=0, tokens=(1, 2, 3), targets=(4, 5))
    batch = make_batch([pair, Example(number=1, tokens=(6,), targets=(7,))], "seq2seq", Special(padding=0, begin=9))
    assert batch.inputs["decoder_input_ids"].tolist() == [[9, 4], [9, 0]]
    assert batch.mask_BT.tolist() == [[True, True], [True, False]]
    assert batch.encoder_mask_BS is not None
    assert batch.encoder_mask_BS.tolist() == [[True] * 3, [True, False, False]]
    assert batch.targets_BT is not None
    assert torch.equal(batch.targets_BT, torch.tensor([[4, 5], [7, NOT_ASKED]]))


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_both_forms_give_the_same_first_rows(tmp_path: Path, limit: int) -> None:
    rows = [{"text": f"a b {'x' * number}", "label": number % 3} for number in range(7)]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n\n".join(json.dumps(row) for row in rows))
    table = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=2)
    assert list(read_rows(str(lines), limit)[0]) == rows[:limit]
    assert list(read_rows(table.as_uri(), limit)[0]) == rows[:limit]


def test_what_follows_the_first_rows_is_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nnonsense\n')
    assert len(read_rows(str(path), 2)[0]) == 2
    with pytest.raises(CalibrationError, match=r"rows.jsonl, line 3: is no JSON object"):
        read_rows(str(path), 3)


def test_data_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for name, content, words in (
        ("empty.jsonl", b"\n", "holds no example"),
        ("list.jsonl", b"[1]\n", "line 1: must be a JSON object, is list"),
        ("binary.jsonl", b"\xff\xfe\x00\n", "line 1: is no JSON object"),
        ("bad.parquet", b"PAR1 nothing", "is no readable Parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CalibrationError, match=words):
            read_rows(str(tmp_path / name), 10)
    with pytest.raises(CalibrationError, match=r"absent.jsonl: is no file"):
        read_rows(str(tmp_path / "absent.jsonl"), 10)


@pytest.mark.parametrize(
    ("settings", "task", "words"),
    [
        ({"statistics": "gram", "labels": "exact"}, "causal", "no gradient is taken"),
        ({"statistics": "kfac", "labels": "exact"}, "causal", "sampled is unbiased"),
        ({"statistics": "fisher", "labels": "exact"}, "seq2seq", "are all texts"),
        ({"statistics": "gram", "text_fields": ("a", "b")}, "causal", "2 text fields"),
        ({"statistics": "gram", "examples": 0}, "causal", "examples must be at least 1"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(settings: dict[str, Any], task: Task, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        check_settings(Settings(**settings), task)
