"""Evaluation of settings against mergekit's rules, written out a second time where arithmetic is involved."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RecipeError
from pipeline.recipe import MethodSchema, Parameter, Recipe, model_numbers, parse_recipe, resolve, unused_filters

from .examples import LINEAR, MEDIAN, METHODS, TIES, parse

MLP = "model.layers.1.mlp.up_proj.weight"
ATTENTION = "model.layers.1.self_attn.q_proj.weight"


def weight(
    recipe: Recipe, *, model: int | None = 0, tensor: str = MLP, layer: int | None = 1, layers: int = 3
) -> float:
    return resolve(recipe, LINEAR, "weight", model=model, tensor=tensor, layer=layer, layers=layers)


def linear(model: object, document: object = None) -> Recipe:
    own = "" if model is None else f", parameters: {{weight: {model}}}"
    common = "" if document is None else f"\nparameters: {{weight: {document}}}"
    return parse(f"merge_method: linear\nbase_model: zero\nmodels: [{{model: a{own}}}]{common}")


@pytest.mark.parametrize(
    ("model", "document", "expected"), [(3, 5, 3.0), (None, 5, 5.0), (None, None, 1.0), (3, None, 3.0)]
)
def test_model_wins_over_document_over_default(model: object, document: object, expected: float) -> None:
    assert weight(linear(model, document)) == expected


def test_base_model_has_the_documents_value() -> None:
    assert weight(linear(3, 5), model=None) == 5.0
    assert weight(linear(3), model=None) == 1.0


def test_first_matching_filter_wins() -> None:
    recipe = linear("[{filter: mlp, value: 2}, {filter: up_proj, value: 3}, {value: 4}, {filter: self_attn, value: 5}]")
    assert [weight(recipe, tensor=tensor) for tensor in (MLP, ATTENTION)] == [2.0, 4.0]


def test_star_matches_all_and_is_no_pattern() -> None:
    recipe = linear("[{filter: '*', value: 2}]")
    assert weight(recipe, tensor="anything") == 2.0
    recipe = linear("[{filter: '*mlp', value: 2}]", 7)
    assert weight(recipe, tensor=MLP) == 7.0


def test_no_match_asks_the_next_level() -> None:
    recipe = linear("{filter: self_attn, value: 2}", "{filter: mlp, value: 3}")
    assert weight(recipe, tensor=ATTENTION) == 2.0
    assert weight(recipe, tensor=MLP) == 3.0
    assert weight(recipe, tensor="model.norm.weight") == 1.0


def test_required_parameter_that_no_filter_gives_is_an_error() -> None:
    text = "merge_method: ties\nparameters: {t: 1}\nmodels: [{model: 's3://u:p@b/a', parameters: "
    recipe = parse(text + "{weight: {filter: mlp, value: 2}}}]")
    assert resolve(recipe, TIES, "weight", model=0, tensor=MLP, layer=1, layers=3) == 2.0
    with pytest.raises(RecipeError, match=r"weight has no value for tensor lm_head.weight of s3://b/a \(add an entry"):
        resolve(recipe, TIES, "weight", model=0, tensor="lm_head.weight", layer=None, layers=3)


def test_unknown_parameter_name_is_a_programming_error() -> None:
    with pytest.raises(KeyError, match="linear has no parameter density"):
        resolve(linear(1), LINEAR, "density", model=0, tensor=MLP, layer=0, layers=1)


@pytest.mark.parametrize(
    ("layer", "layers", "expected"),
    [(0, 3, 0.0), (1, 3, 0.5), (2, 3, 1.0), (0, 1, 1.0), (None, 3, 0.0), (None, 1, 0.0), (1, 5, 0.25)],
)
def test_gradient_runs_from_the_first_layer_to_the_last(layer: int | None, layers: int, expected: float) -> None:
    assert weight(linear("[0, 1]"), layer=layer, layers=layers) == expected


def test_gradient_in_a_filter() -> None:
    recipe = linear("[{filter: mlp, value: [0, 10, 0]}, {value: [1]}]")
    assert [weight(recipe, layer=layer, layers=5) for layer in range(5)] == [0.0, 5.0, 10.0, 5.0, 0.0]
    assert [weight(recipe, tensor=ATTENTION, layer=layer, layers=5) for layer in range(5)] == [1.0] * 5


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6),
    st.integers(1, 100).flatmap(lambda layers: st.tuples(st.integers(0, layers - 1), st.just(layers))),
)
def test_gradient_is_exact_interpolation_up_to_rounding(values: list[float], where: tuple[int, int]) -> None:
    layer, layers = where
    place = Fraction(layer, layers - 1) * (len(values) - 1) if layers > 1 else Fraction(len(values) - 1)
    left = min(int(place), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    exact = Fraction(values[left]) + (place - left) * (Fraction(values[right]) - Fraction(values[left]))
    found = weight(linear(values), layer=layer, layers=layers)
    assert found == pytest.approx(float(exact), rel=1e-12, abs=1e-12 * max(map(abs, values)))
    if layer in (0, layers - 1) and layers > 1:
        assert found == values[0 if layer == 0 else -1]


def test_switches_step_instead_of_being_interpolated() -> None:
    recipe = parse("merge_method: linear\nmodels: [{model: a}]\nparameters: {normalize: [true, false, true]}")
    found = [resolve(recipe, LINEAR, "normalize", model=None, tensor=MLP, layer=layer, layers=5) for layer in range(5)]
    assert found == [True, True, False, False, True]
    assert {type(value) for value in found} == {bool}


def test_numbers_as_text_and_integers_become_floats() -> None:
    assert weight(linear("'1e-5'")) == 1e-5
    value = weight(linear("3"))
    assert (value, type(value)) == (3.0, float)


def test_one_number_per_model() -> None:
    text = "merge_method: geometric_median\nparameters: {weight: 3}\n"
    recipe = parse(text + "models: [{model: a, parameters: {weight: 2}}, {model: b}, {model: c}]")
    assert model_numbers(recipe, MEDIAN, "weight") == (2.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="weight of linear may differ between tensors"):
        model_numbers(linear(1), LINEAR, "weight")


def test_filters_of_no_use_are_found_at_every_level() -> None:
    recipe = linear("[{filter: mlp, value: 2}, {filter: mpl, value: 3}, {value: 4}]", "{filter: attn, value: 3}")
    assert [str(problem) for problem in unused_filters(recipe, [MLP])] == [
        'the filter "attn" of `parameters.weight` is part of no tensor name (correct the filter or leave it out)',
        'the filter "mpl" of `models[0].parameters.weight` is part of no tensor name '
        "(correct the filter or leave it out)",
    ]
    assert unused_filters(linear("[1, 2]", "{filter: '*', value: 2}"), []) == ()


def test_document_parameter_without_per_model_values() -> None:
    method = MethodSchema(
        name="m",
        uses_statistics=True,
        parameters=(Parameter(name="t", kind="number", default=0.5, per_model=False, constant=True, description=""),),
    )
    recipe = parse_recipe("merge_method: m\nmodels: [{model: a}]", source="f", methods={**METHODS, "m": method})
    assert resolve(recipe, method, "t", model=None, tensor=MLP, layer=None, layers=1) == 0.5
