"""The weighted average's coefficients."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RecipeError
from pipeline.methods.linear import METHOD
from pipeline.recipe import Recipe
from tests.methods.recipes import recipe


def coefficients(of: Recipe, tensor: str = "w", layer: int | None = None, layers: int = 0) -> tuple[float, ...]:
    return METHOD.coefficients(of, tensor=tensor, layer=layer, layers=layers)


def test_equal_weights_by_default() -> None:
    assert coefficients(recipe("linear", [None] * 4)) == (0.25,) * 4
    assert coefficients(recipe("linear", [None])) == (1.0,)


def test_weights_are_shares() -> None:
    assert coefficients(recipe("linear", [1, 2, 5])) == (0.125, 0.25, 0.625)
    assert coefficients(recipe("linear", [0, 2, 0])) == (0.0, 1.0, 0.0)
    assert coefficients(recipe("linear", [-1, 2, 3])) == (-0.25, 0.5, 0.75)
    assert coefficients(recipe("linear", [3, None, None], parameters={"weight": 0.5})) == (0.75, 0.125, 0.125)


def test_without_normalisation_weights_are_factors() -> None:
    of = recipe("linear", [0.5, 1.0, -2.0], parameters={"normalize": False})
    assert coefficients(of) == (0.5, 1.0, -2.0)
    assert coefficients(recipe("linear", [0, 0], parameters={"normalize": False})) == (0.0, 0.0)


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [0.1, 0.2, -0.3], [1e-300, -1e-300]])
def test_weights_that_cancel_have_no_mean(weights: list[object]) -> None:
    with pytest.raises(RecipeError, match="there is no mean") as caught:
        coefficients(recipe("linear", weights), tensor="model.norm.weight")
    assert caught.value.problems[0].where == "tensor model.norm.weight"
    assert "normalize: false" in caught.value.problems[0].remedy


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_shares_sum_to_one_and_keep_their_ratios(weights: list[float]) -> None:
    found = coefficients(recipe("linear", list(weights)))
    assert math.fsum(found) == pytest.approx(1.0, abs=1e-14)
    for share, weight in zip(found, weights, strict=True):
        assert share * math.fsum(weights) == pytest.approx(weight, rel=1e-13)


def test_filters_and_gradients_are_by_tensor_and_layer() -> None:
    of = recipe("linear", [[{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 3.0}], 1.0])
    assert coefficients(of, "model.layers.0.mlp.up", 0, 5) == (0.0, 1.0)
    assert coefficients(of, "model.layers.2.mlp.up", 2, 5) == (0.5 / 1.5, 1.0 / 1.5)
    assert coefficients(of, "model.layers.4.mlp.up", 4, 5) == (0.5, 0.5)
    assert coefficients(of, "model.layers.4.self_attn.q", 4, 5) == (0.75, 0.25)


def test_a_base_that_is_an_input_comes_last() -> None:
    of = recipe("linear", [3, None], base_model="/base", parameters={"weight": 1.0})
    assert of.base_is_input
    assert coefficients(of) == (0.6, 0.2, 0.2)
