"""The geometric median as a method: its weights, and that it solves what it says it solves."""

import numpy as np
import pytest

from pipeline.errors import ConvergenceError, RecipeError
from pipeline.methods.geometric_median import METHOD
from pipeline.numerics.streamed_median import Measured
from tests.methods.recipes import recipe


def squares(points_NE: np.ndarray) -> np.ndarray:
    result: np.ndarray = ((points_NE[:, None] - points_NE[None]) ** 2).sum(axis=2)
    return result


def test_weights() -> None:
    assert METHOD.weights(recipe("geometric_median", [None, 2, 0.5])) == (1.0, 2.0, 0.5)
    assert METHOD.weights(recipe("geometric_median", [None, 2], parameters={"weight": 7})) == (7.0, 2.0)


@pytest.mark.parametrize("weight", [0, -1, [1, 2], {"value": 1}])
def test_a_weight_is_one_positive_number(weight: object) -> None:
    with pytest.raises(RecipeError, match="weight"):
        recipe("geometric_median", [1, weight])


@pytest.mark.parametrize("weight", [1e-80, 1e80])
def test_weights_beyond_arithmetic_are_refused_by_model(weight: float) -> None:
    with pytest.raises(RecipeError) as caught:
        METHOD.weights(recipe("geometric_median", [1, weight]))
    (problem,) = caught.value.problems
    assert problem.where == "model /b"


def test_the_fermat_point_of_an_equilateral_triangle() -> None:
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
    solution = METHOD.solve(squares(points), (1.0, 1.0, 1.0), tolerance=1e-12)
    assert solution.coefficients == pytest.approx((1 / 3,) * 3, abs=1e-9)
    assert solution.objective == pytest.approx(np.sqrt(3), rel=1e-12)
    assert 0 <= solution.relative_gap <= 1e-12


def test_a_heavy_model_wins() -> None:
    points = np.random.default_rng(0).normal(size=(5, 20))
    solution = METHOD.solve(squares(points), (5.0, 1.0, 1.0, 1.0, 1.0), tolerance=1e-10)
    assert solution.coefficients == (1.0, 0.0, 0.0, 0.0, 0.0)
    assert solution.optimum == "vertex"


def test_a_tolerance_that_cannot_be_proved_is_an_error() -> None:
    points = np.random.default_rng(1).normal(size=(5, 20))
    with pytest.raises(ConvergenceError, match="relative gap"):
        METHOD.solve(squares(points), (1.0,) * 5, tolerance=1e-30)


def test_streaming_finds_the_same_from_measurements() -> None:
    points = np.random.default_rng(2).normal(size=(6, 40))
    weights = (1.0, 2.0, 1.0, 1.0, 0.5, 1.0)
    loop = METHOD.stream(weights, tolerance=1e-10)
    request = next(loop)
    while True:
        coefficients = np.asarray(request.coefficients_PN)
        combinations = coefficients @ points
        steps = combinations - combinations[0]
        answer = Measured(
            squared_distances_PN=((combinations[:, None] - points[None]) ** 2).sum(axis=2), products_PP=steps @ steps.T
        )
        try:
            request = loop.send(answer)
        except StopIteration as end:
            streamed = end.value
            break
    solved = METHOD.solve(squares(points), weights, tolerance=1e-10)
    assert streamed.coefficients == pytest.approx(solved.coefficients, abs=1e-5)
    assert streamed.objective == pytest.approx(solved.objective, rel=2e-10)
    assert streamed.relative_gap <= 1e-10
