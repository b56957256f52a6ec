"""What an error says and how it leaves the process."""

import dataclasses

import pytest

from pipeline.errors import (
    BudgetError,
    CheckpointError,
    ConvergenceError,
    OutputError,
    PipelineError,
    Problem,
    RecipeError,
    StorageError,
    VerificationError,
    WorkerError,
)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem(what="is gone"), "is gone"),
        (Problem(what="is gone", where="model a"), "model a: is gone"),
        (Problem(what="is gone", remedy="fetch it"), "is gone (fetch it)"),
        (Problem(what="is gone", where="model a", remedy="fetch it"), "model a: is gone (fetch it)"),
    ],
)
def test_a_problem_names_place_fact_and_remedy(problem: Problem, text: str) -> None:
    assert str(problem) == text
    assert str(PipelineError(problem)) == text


def test_several_problems_are_counted_and_listed_in_order() -> None:
    error = CheckpointError(Problem(what="first", where="a"), Problem(what="second"), Problem(what="third"))
    assert str(error) == "3 problems:\n  - a: first\n  - second\n  - third"
    assert [problem.what for problem in error.problems] == ["first", "second", "third"]
    assert error.problems == error.args


def test_exit_codes_are_frozen() -> None:
    classes = (
        PipelineError,
        RecipeError,
        CheckpointError,
        BudgetError,
        StorageError,
        WorkerError,
        ConvergenceError,
        VerificationError,
        OutputError,
    )
    assert [kind.exit_code for kind in classes] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert all(issubclass(kind, PipelineError) for kind in classes)


def test_a_problem_cannot_be_changed_nor_built_by_position() -> None:
    problem = Problem(what="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.what = "y"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Problem("x")  # type: ignore[misc]
    assert problem == Problem(what="x")
