"""What statistics say of themselves: where they come from, and how they were made.

Owns the facts, their JSON form, the names of tensors and files in the format. Must not know how files are found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, get_args

from pipeline.checkpoints.json_text import is_plain_text, parse_object, refusal, short
from pipeline.errors import CheckpointError

Kind = Literal["diagonal", "input_gram", "output_gram", "block"]
Labels = Literal["empirical", "sampled", "exact", "none"]
Reduction = Literal["mean", "sum", "none"]

KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT = "geomerge-statistics"
FORMAT_VERSION = "1"
# Written last: a folder without it is unfinished.
COMPLETE_FILE = "statistics.json"
# No loader of weights looks for this.
SUFFIX = ".statistics"
# Second moments lose their small eigenvalues in 16 bits, and with them the answer of a solve.
ALLOWED_DTYPES = ("F32", "F64")
# In the metadata of every file, beside format and version.
FACTS_KEY, SHARED_KEY = "facts", "shared"
_REMEDY = "write the statistics again by `geomerge calibrate`"


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsFacts:
    """Where statistics come from.

    Attributes:
        model: Path or URL of the model, without credentials.
        data: Path or URL of the data, without credentials.
        split: Which part of the data; "" when it has no parts.
        examples: How many were used.
        tokens: How many unmasked tokens they had.
        reduction: Whether an example's log-likelihood is the mean or the sum over its tokens; "none" when no
            gradients were taken.
        labels: Whose gradients: of the data's labels, of sampled ones, of all labels by their probability, of none.
        normalisation: What sums were divided by, such as "examples" or "tokens".
        layout: How an element of a statistic belongs to the parameter, in words.
        extra: Whatever else makes these statistics what they are: seed, longest text, task.
    """

    model: str
    data: str
    split: str = ""
    examples: int
    tokens: int
    reduction: Reduction
    labels: Labels
    normalisation: str
    layout: str = (
        "a diagonal has its parameter's shape; matrices are upper triangles, row by row, of input, output or parameter"
    )
    extra: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Return the facts as JSON values; `facts_from_json` takes them back."""
        return {**asdict(self), "extra": dict(sorted(self.extra.items()))}


def facts_from_json(found: object, where: str) -> StatisticsFacts:
    """Return the facts of a file.

    Args:
        found: What the file has for them.
        where: The file, for messages.

    Raises:
        CheckpointError: One is missing, unknown or of another type.
    """
    if not isinstance(found, dict):
        raise refusal(where, "has no facts on the statistics", _REMEDY)
    known = {item.name for item in fields(StatisticsFacts)}
    if found.keys() != known:
        missing, unknown = sorted(known - found.keys()), sorted(found.keys() - known)
        raise refusal(where, f"facts are missing: {missing}, or unknown: {short(unknown)}", _REMEDY)
    choices: dict[str, tuple[str, ...]] = {"reduction": get_args(Reduction), "labels": get_args(Labels)}
    for name, value in found.items():
        if name == "extra":
            right = isinstance(value, dict) and all(is_plain_text(text) for pair in value.items() for text in pair)
        elif name in ("examples", "tokens"):
            right = type(value) is int
        else:
            right = is_plain_text(value) and value in choices.get(name, (value,))
        if not right:
            raise refusal(where, f"the fact {name} cannot be {short(value)}", _REMEDY)
    return StatisticsFacts(**found)


def file_metadata(facts: StatisticsFacts, shared: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of one file of statistics.

    Args:
        facts: Of all files.
        shared: Tensor name -> the stored tensor that it equals, as far as this file tells.
    """
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        FACTS_KEY: json.dumps(facts.to_json()),
        SHARED_KEY: json.dumps(dict(shared)),
    }


def check_format(found: Mapping[str, object], where: str) -> None:
    """Raise CheckpointError unless metadata, or a statistics.json, is of this format and version."""
    if found.get("format") != FORMAT:
        raise refusal(where, f"is no file of statistics: its format is {short(found.get('format'))}", _REMEDY)
    if found.get("version") != FORMAT_VERSION:
        what = f"is of version {short(found.get('version'))} of the format, this program reads {FORMAT_VERSION}"
        raise refusal(where, what, f"{_REMEDY} of this version")


def metadata_facts(metadata: Mapping[str, str], where: str) -> tuple[StatisticsFacts, dict[str, str]]:
    """Return the facts and the shared tensors that one file tells.

    Raises:
        CheckpointError: It is no file of statistics, or says something else than facts.
    """
    check_format(metadata, where)
    facts = parse_object(metadata.get(FACTS_KEY, "").encode(), f"{where}: {FACTS_KEY}", strict=True)
    shared = parse_object(metadata.get(SHARED_KEY, "{}").encode(), f"{where}: {SHARED_KEY}", strict=True)
    return facts_from_json(facts, where), text_pairs(shared, SHARED_KEY, where)


def text_pairs(found: object, key: str, where: str) -> dict[str, str]:
    """Return a mapping of texts, or raise CheckpointError."""
    if not isinstance(found, dict) or not all(is_plain_text(text) for pair in found.items() for text in pair):
        raise refusal(where, f"{key} must map text to text", _REMEDY)
    return found


def tensor_name(kind: Kind, parameter: str) -> str:
    """Return under which name a statistic is stored: one that no parameter has."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is none of {KINDS}")
    return f"{kind}:{parameter}"


def split_name(name: str, where: str) -> tuple[Kind, str]:
    """Return kind and parameter of a stored tensor.

    Raises:
        CheckpointError: The name is of no known kind.
    """
    prefix, mark, parameter = name.partition(":")
    for kind in KINDS:
        if mark and parameter and prefix == kind:
            return kind, parameter
    raise unknown_kind(name, where)


def unknown_kind(name: str, where: str) -> CheckpointError:
    """Return the error for a tensor that is no statistic."""
    return refusal(where, f"tensor {short(name)} is of no known kind", f"known are {', '.join(KINDS)}")
