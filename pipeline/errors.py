"""The errors a user can meet, each with the exit code of the process that ends by it.

Owns the error classes; knows nothing of what raises them. An error is a tuple of `Problem`s, so that everything found
wrong is reported at once. The text is built in ``__str__`` and the constructor's arguments are exactly ``args``:
such an exception survives pickling, hence an actor boundary.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: what, where, and what to do about it.

    Attributes:
        what: The fact, in one clause, with names and numbers.
        where: Model, tensor, file, line: whatever leads to the place. Empty when `what` says it.
        remedy: What the user can do. Empty when there is nothing to add.
    """

    what: str
    where: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} ({self.remedy})" if self.remedy else text


class PipelineError(Exception):
    """Base of every error that geomerge raises on purpose.

    Args:
        *problems: What is wrong, at least one.
    """

    exit_code = 1

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """All that was found wrong, in the order of discovery."""
        return self.args

    def __str__(self) -> str:
        if len(self.args) == 1:
            return str(self.args[0])
        return "\n".join([f"{len(self.args)} problems:", *(f"  - {problem}" for problem in self.args)])


class RecipeError(PipelineError):
    """The recipe cannot be read or does not mean anything."""

    exit_code = 2


class CheckpointError(PipelineError):
    """A model's files are missing, damaged, hostile, or do not belong to the family."""

    exit_code = 3


class BudgetError(PipelineError):
    """The plan does not fit into the memory or the disk that was given."""

    exit_code = 4


class StorageError(PipelineError):
    """Reading or writing failed, after retries."""

    exit_code = 5


class SettingsError(StorageError):
    """A store cannot be used as URL, options, environment or profile have it: to run again would change nothing."""

    exit_code = 2


class WorkerError(PipelineError):
    """A worker was lost, or failed in a way that is no fault of the input."""

    exit_code = 6


class ConvergenceError(PipelineError):
    """The solve ended without a certificate within the tolerance."""

    exit_code = 7


class VerificationError(PipelineError):
    """What was read or written is not what it must be: checksum, finiteness, distance."""

    exit_code = 8


class OutputError(PipelineError):
    """The output folder cannot be used: it holds something else, or an input."""

    exit_code = 9


class ClaimedError(OutputError):
    """Another run writes into the output folder, or took it over from this one."""


class CalibrationError(PipelineError):
    """The data of a calibration, its model or its settings do not fit each other."""

    exit_code = 10
