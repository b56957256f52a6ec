"""What statistics are made of: which, from how many examples, with whose labels.

Owns the choices and which of them go together. Must not know torch or transformers: the command line reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.errors import CalibrationError, Problem

Statistic = Literal["fisher", "gram", "kfac", "block"]
LabelSource = Literal["empirical", "sampled", "exact"]
Task = Literal["classification", "seq2seq", "causal"]
PerExample = Literal["mean", "sum"]

STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
LABELS: tuple[LabelSource, ...] = get_args(LabelSource)
TASKS: tuple[Task, ...] = get_args(Task)
REDUCTIONS: tuple[PerExample, ...] = get_args(PerExample)
# Where the words to be predicted are, unless the user names another field; a text alone is enough for "causal".
LABEL_FIELDS: dict[Task, str | None] = {"classification": "label", "seq2seq": "target", "causal": None}
# What the code of MaTS takes: more changes a second moment little.
DEFAULT_EXAMPLES = 1000
# Tokens; longer texts are cut, or a single one could need more memory than all the weights.
DEFAULT_MAX_LENGTH = 512
# Examples that are run at once where their gradients may be mixed: keeps two cores busy, and small in memory.
DEFAULT_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is collected; everything here is part of what the statistics are.

    Attributes:
        statistics: "fisher": squared gradients. "gram": second moments of inputs of linear layers. "kfac": these, and
            of the gradients of their outputs. "block": outer products of gradients, of parameters that are vectors.
        labels: Whose gradients: the data's labels, one drawn by the model, or all by the model's probabilities.
        task: What the model does; None to go by its config.
        examples: At most so many, the first ones of the data.
        max_length: At most so many tokens of a text.
        batch: Examples at once; gradients of single examples are taken one example at a time whatever it says.
        reduction: Whether an example's log-likelihood is the mean or the sum over its tokens.
        seed: Of the drawn labels.
        text_fields: One field of the data, or two that are encoded as a pair.
        label_field: The field of the labels; None for the task's usual one.
    """

    statistics: Statistic
    labels: LabelSource = "empirical"
    task: Task | None = None
    examples: int = DEFAULT_EXAMPLES
    max_length: int = DEFAULT_MAX_LENGTH
    batch: int = DEFAULT_BATCH
    reduction: PerExample = "mean"
    seed: int = 0
    text_fields: tuple[str, ...] = ("text",)
    label_field: str | None = None

    @property
    def wants_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        return self.statistics != "gram"

    @property
    def examples_at_once(self) -> int:
        """How many examples are run together: squares of single gradients cannot be had from a mixture."""
        return 1 if self.statistics in ("fisher", "block") else self.batch


def check_settings(settings: Settings, task: Task) -> None:
    """Refuse what does not go together.

    Args:
        settings: As given.
        task: What the model does.

    Raises:
        CalibrationError: A choice does not exist or contradicts another.
    """
    problems = []
    if not settings.wants_gradients and settings.labels != "empirical":
        what = f"--labels {settings.labels} means nothing for Grams of inputs: no gradient is taken"
        problems.append(Problem(what=what, remedy="leave --labels out"))
    if settings.wants_gradients and settings.labels == "exact" and task != "classification":
        what = f"--labels exact sums over all labels, which for {task} are all texts"
        problems.append(Problem(what=what, remedy="--labels sampled is unbiased"))
    if len(settings.text_fields) not in (1, 2) or (len(settings.text_fields) == 2 and task != "classification"):
        what = f"{len(settings.text_fields)} text fields for {task}"
        problems.append(Problem(what=what, remedy="name one, or for classification two that are encoded as a pair"))
    for name in ("examples", "max_length", "batch"):
        if getattr(settings, name) < 1:
            problems.append(Problem(what=f"{name} must be at least 1, is {getattr(settings, name)}"))
    if problems:
        raise CalibrationError(*problems)
