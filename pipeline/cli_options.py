"""Options that several commands take, and the values they understand.

Owns their names, defaults and help texts. Must not know what the commands do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from pipeline.calibration.settings import (
    DEFAULT_BATCH,
    DEFAULT_EXAMPLES,
    DEFAULT_MAX_LENGTH,
    LABELS,
    REDUCTIONS,
    STATISTICS,
    TASKS,
)
from pipeline.units import parse_bytes, parse_seconds

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_MEMORY = "4GB"


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """A size such as 4GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Duration(click.ParamType):  # type: ignore[type-arg]
    """A duration such as 1h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        try:
            return parse_seconds(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Fields(click.ParamType):  # type: ignore[type-arg]
    """Names of fields, separated by commas."""

    name = "fields"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the names."""
        return value if isinstance(value, tuple) else tuple(str(value).split(","))


def resources(command: F) -> F:
    """Add the options that say where a merge runs and with what."""
    return _with(
        command,
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute."),
        click.option(
            "--memory", type=Size(), default=DEFAULT_MEMORY, show_default=True, help="What each worker may hold."
        ),
        click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="How many workers."),
        click.option("--address", help="A Ray cluster's address."),
        click.option(
            "--executor",
            type=click.Choice(["auto", "local", "ray"]),
            default="auto",
            show_default=True,
            help="auto: Ray inside a Ray job or with --address, else this process.",
        ),
    )


def as_json(command: F) -> F:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")(command)


def progress(command: F) -> F:
    """Add --progress."""
    return click.option(
        "--progress",
        type=click.Choice(["auto", "bar", "lines", "json"]),
        default="auto",
        show_default=True,
        help="On stderr. auto: a bar on a terminal, else lines; json: one event a line.",
    )(command)


def calibration(command: F) -> F:
    """Add the options that say what statistics are made of, and with what."""
    positive = click.IntRange(min=1)
    return _with(
        command,
        click.option("--scratch", metavar="URL", help="Where a large model's activations wait; default: in OUTPUT."),
        click.option("--memory", type=Size(), default=DEFAULT_MEMORY, show_default=True, help="What it may hold."),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of sampled labels."),
        click.option("--label-field", help="Default: label (classification), target (seq2seq), none (causal)."),
        click.option(
            "--text-field",
            "text_fields",
            type=Fields(),
            default="text",
            show_default=True,
            help="The field of the text, or two of a pair: premise,hypothesis.",
        ),
        click.option(
            "--reduction",
            type=click.Choice(REDUCTIONS),
            default="mean",
            show_default=True,
            help="Of an example's log-likelihood over its tokens.",
        ),
        click.option("--batch", type=positive, default=DEFAULT_BATCH, show_default=True, help="Examples at once."),
        click.option(
            "--max-length", type=positive, default=DEFAULT_MAX_LENGTH, show_default=True, help="Tokens of a text."
        ),
        click.option(
            "--examples", type=positive, default=DEFAULT_EXAMPLES, show_default=True, help="The first ones of DATA."
        ),
        click.option("--task", type=click.Choice(TASKS), help="What the model does; default: as its config says."),
        click.option(
            "--labels",
            type=click.Choice(LABELS),
            default="empirical",
            show_default=True,
            help="Whose gradients: of DATA's labels, of one drawn by the model, of all of them weighted.",
        ),
        click.option("--statistics", type=click.Choice(STATISTICS), required=True, help="What to collect."),
    )


def _with(command: F, *options: Callable[[F], F]) -> F:
    """Return a command with options, the last of which its help shows first."""
    for option in options:
        command = option(command)
    return command
