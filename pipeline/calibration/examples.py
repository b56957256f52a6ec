"""Rows of data as examples: token ids, and what the model is to say to them.

Owns the meaning of the fields, and what is refused in them. Must not know torch; a tokenizer is whatever can be called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.calibration.data import Row
from pipeline.calibration.settings import LABEL_FIELDS, Settings, Task
from pipeline.errors import CalibrationError, Problem

# A row may bring its tokens along, then no tokenizer is asked.
TOKENS_FIELD = "input_ids"
# Damaged data makes a problem a row; the first ones tell enough.
_MOST_PROBLEMS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One example, encoded.

    Attributes:
        number: Its place in the data; seeds what is drawn for it.
        tokens: What the model reads: for "causal" prompt and continuation, for "seq2seq" the encoder's input.
        types: Which of two texts each token is of; empty when the tokenizer does not say.
        targets: For "seq2seq" the text to be said.
        unasked: For "causal": so many first tokens are not to be predicted, at least one.
        label: For "classification" the class; None when nobody asks for it.
    """

    number: int
    tokens: tuple[int, ...]
    types: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    unasked: int = 1
    label: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a model knows.

    Attributes:
        size: How many tokens.
        classes: How many classes.
        class_numbers: Class name -> class.
        most_tokens: The longest text that it can read; None without a limit.
    """

    size: int
    classes: int
    class_numbers: Mapping[str, int]
    most_tokens: int | None


def encode_rows(
    rows: Sequence[Row], settings: Settings, task: Task, vocabulary: Vocabulary, tokenizer: Callable[..., Any] | None
) -> tuple[Example, ...]:
    """Return the rows as examples.

    Args:
        rows: As read.
        settings: Fields and lengths.
        task: What the model does.
        vocabulary: What it knows.
        tokenizer: A transformers tokenizer; None when the model has none, then every row must bring its tokens.

    Raises:
        CalibrationError: Fields are missing or of the wrong type; every such row is counted, the first ones are named.
    """
    encoder = _Encoder(settings, task, vocabulary, tokenizer)
    found: list[Example] = []
    problems: list[Problem] = []
    for number, row in enumerate(rows):
        try:
            found.append(encoder.example(number, row))
        except CalibrationError as error:
            problems += error.problems
    if len(problems) > _MOST_PROBLEMS:
        rest = Problem(what=f"and {len(problems) - _MOST_PROBLEMS} more rows of this kind")
        problems = [*problems[:_MOST_PROBLEMS], rest]
    if problems:
        raise CalibrationError(*problems)
    return tuple(found)


class _Encoder:
    def __init__(
        self, settings: Settings, task: Task, vocabulary: Vocabulary, tokenizer: Callable[..., Any] | None
    ) -> None:
        self._settings, self._task, self._vocabulary, self._tokenizer = settings, task, vocabulary, tokenizer
        self._most = min(settings.max_length, vocabulary.most_tokens or settings.max_length)
        self._label_field = settings.label_field or LABEL_FIELDS[task]

    def example(self, number: int, row: Row) -> Example:
        where = f"example {number + 1} of the data"
        tokens, types = self._source(row, where)
        example = Example(number=number, tokens=tokens, types=types)
        if self._task == "classification":
            example = Example(number=number, tokens=tokens, types=types, label=self._label(row, where))
        elif self._task == "seq2seq":
            target = self._target(row, where, as_target=True)[: self._most]
            example = Example(number=number, tokens=tokens, targets=target)
        elif self._label_field is not None:
            # The continuation is what counts: a long prompt loses its beginning.
            said = self._target(row, where, as_target=False)[: self._most - 1]
            prompt = tokens[max(0, len(tokens) + len(said) - self._most) :]
            example = Example(number=number, tokens=(*prompt, *said), unasked=len(prompt))
        self._check(example, where)
        return example

    def _check(self, example: Example, where: str) -> None:
        if not example.tokens or not example.unasked or (self._task == "seq2seq" and not example.targets):
            raise _empty(where)
        if self._task == "causal" and self._settings.wants_gradients and len(example.tokens) <= example.unasked:
            what = "has no token to be predicted"
            raise CalibrationError(Problem(what=what, where=where, remedy="remove it from the data"))
        largest, smallest = max(*example.tokens, *example.targets, 0), min(*example.tokens, *example.targets, 0)
        if largest >= self._vocabulary.size or smallest < 0:
            what = f"has the token {largest if smallest >= 0 else smallest}; the model knows {self._vocabulary.size}"
            raise CalibrationError(Problem(what=what, where=where, remedy="use the model's own tokenizer"))

    def _source(self, row: Row, where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens that the model reads, and which of two texts they are of."""
        fields = self._settings.text_fields
        if TOKENS_FIELD in row and fields[0] not in row:
            return _tokens(row[TOKENS_FIELD], TOKENS_FIELD, where)[: self._most], ()
        texts = [_text(row, field, where) for field in fields]
        # Tokenizers that put a mark around every text make tokens of nothing too.
        if not any(text.strip() for text in texts):
            raise _empty(where)
        encoded = self._encode(*texts, truncation=True, max_length=self._most)
        return tuple(encoded["input_ids"]), tuple(encoded.get("token_type_ids", ()))

    def _target(self, row: Row, where: str, *, as_target: bool) -> tuple[int, ...]:
        """Return the tokens that the model is to say."""
        field = self._label_field or ""
        if isinstance(row.get(field), list):
            return _tokens(row[field], field, where)
        text = _text(row, field, where)
        if as_target:
            return tuple(self._encode(text_target=text)["input_ids"])
        end = getattr(self._tokenizer, "eos_token_id", None)
        said = tuple(self._encode(text, add_special_tokens=False)["input_ids"])
        return said if end is None else (*said, end)

    def _encode(self, *texts: str, **options: Any) -> Mapping[str, Sequence[int]]:
        if self._tokenizer is None:
            remedy = f"add the tokenizer's files to the model's folder, or lists of token ids as {TOKENS_FIELD!r}"
            raise CalibrationError(Problem(what="the model has no tokenizer", remedy=remedy))
        found: Mapping[str, Sequence[int]] = self._tokenizer(*texts, **options)
        return found

    def _label(self, row: Row, where: str) -> int | None:
        """Return the class of a row; None where no label of the data is needed."""
        if not self._settings.wants_gradients or self._settings.labels != "empirical":
            return None
        field = self._label_field or ""
        if field not in row:
            raise _missing(row, field, where, "--label-field")
        value = row[field]
        if isinstance(value, str):
            value = self._vocabulary.class_numbers.get(value, value)
        if type(value) is not int or not 0 <= value < self._vocabulary.classes:
            known = ", ".join([f"0 to {self._vocabulary.classes - 1}", *list(self._vocabulary.class_numbers)[:4]])
            raise CalibrationError(
                Problem(what=f"{field} is {value!r}, the model has the classes {known}", where=where)
            )
        return value


def _text(row: Row, field: str, where: str) -> str:
    if field not in row:
        raise _missing(row, field, where, "--text-field or --label-field")
    value = row[field]
    if not isinstance(value, str):
        raise CalibrationError(Problem(what=f"{field} must be a text, is {type(value).__name__}", where=where))
    return value


def _tokens(value: object, field: str, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise CalibrationError(Problem(what=f"{field} must be a list of token ids", where=where))
    return tuple(value)


def _empty(where: str) -> CalibrationError:
    return CalibrationError(Problem(what="has an empty text", where=where, remedy="remove it from the data"))


def _missing(row: Row, field: str, where: str, option: str) -> CalibrationError:
    what = f"has no field {field!r}, it has {', '.join(map(repr, list(row)[:8])) or 'none'}"
    return CalibrationError(Problem(what=what, where=where, remedy=f"name the field by {option}"))
