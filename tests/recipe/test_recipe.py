"""Reading of recipes: every good one means what mergekit means, every bad one says what, where and what to do."""

import json
import pickle

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import RecipeError
from pipeline.recipe import NamedPatterns, PipelineSettings, Recipe, canonical, split_model
from pipeline.recipe.checks import STATISTICS_KEYS
from pipeline.recipe.content import keys_of
from pipeline.storage.options import StorageOptions

from .examples import ACCEPTED, METHODS, parse, problems
from .refused import REFUSED


@pytest.mark.parametrize("name", ACCEPTED)
def test_good_recipe_is_read_whole(name: str) -> None:
    recipe = parse(ACCEPTED[name])
    raw = yaml.safe_load(ACCEPTED[name])
    assert recipe.merge_method == raw["merge_method"]
    assert len(recipe.models) == len(raw["models"])
    assert (recipe.warnings != ()) == (name in ("idle keys", "linear with a base as input"))


@pytest.mark.parametrize("name", REFUSED)
def test_bad_recipe_has_one_problem_with_its_line(name: str) -> None:
    text, said, line = REFUSED[name]
    (problem,) = problems(text)
    assert said in problem
    assert problem.startswith(f"r.yaml:{line}: ")


@pytest.mark.parametrize(("text", "shown"), [("[1]", "a list"), ("linear", '"linear"'), ("---", "nothing")])
def test_recipe_must_be_a_mapping(text: str, shown: str) -> None:
    (problem,) = problems(text)
    assert problem == f"r.yaml:1: a recipe must be a mapping of keys to values, not {shown} (write `key: value`)"


def test_values_of_every_key() -> None:
    recipe = parse(ACCEPTED["every key"])
    assert recipe.base_model == "s3://bucket/base@v1"
    assert (recipe.dtype, recipe.out_dtype, recipe.tokenizer_source) == ("float32", "bfloat16", "base")
    assert recipe.parameters == {"weight": 2.0}
    assert [entry.model for entry in recipe.models] == ["s3://bucket/a", r"./odd\+name@home"]
    assert recipe.models[0].parameters == {"weight": 1e-5}
    assert recipe.pipeline == PipelineSettings(
        scope="block",
        distances="stream",
        scale="norm",
        tolerance=1e-8,
        file_size_bytes=512 * 2**20,
        non_finite="base",
        bandwidth_bytes=2 * 10**9,
        storage=StorageOptions(
            {
                "s3": {"region": "eu-central-1"},
                "s3://bucket/base": {"endpoint_url": "https://store.example:9000", "profile": "nightly", "anon": False},
                "gs": {"project": "p", "consistency": "none", "nested": {"retries": [1, 2]}},
            }
        ),
    )
    assert recipe.pipeline.storage.of("s3://bucket/base/model")["profile"] == "nightly"
    assert recipe.pipeline.storage.of("s3://bucket/basement") == {"region": "eu-central-1"}
    assert parse(ACCEPTED["least"]).pipeline.storage.of("s3://bucket/base") == {}


def test_adapters_are_read_in_both_notations() -> None:
    recipe = parse(ACCEPTED["adapters"])
    assert [split_model(entry.model) for entry in recipe.models] == [
        ("adapters/law", None),
        ("models/base", "adapters/chat"),
        ("models/c++", "adapters/x@home"),
        ("s3://b@1/c++", "s3://b/lora@2"),
        ("models/other", None),
    ]
    assert recipe.tokenizer_source == recipe.models[1].model
    assert (recipe.pipeline.output, recipe.pipeline.rank) == ("adapter", 8)
    assert parse(ACCEPTED["adapter as base"]).base_model == "a+b"


def test_defaults() -> None:
    recipe = parse(ACCEPTED["least"])
    assert recipe.pipeline == PipelineSettings()
    assert (recipe.pipeline.scope, recipe.pipeline.distances, recipe.pipeline.scale) == ("model", "gram", 1.0)
    assert (recipe.pipeline.tolerance, recipe.pipeline.file_size_bytes) == (1e-10, 5_000_000_000)
    assert (recipe.pipeline.non_finite, recipe.pipeline.bandwidth_bytes) == ("error", None)
    assert (recipe.pipeline.output, recipe.pipeline.rank) == ("model", None)
    assert (recipe.base_model, recipe.dtype, recipe.out_dtype, recipe.tokenizer_source) == (None,) * 4
    assert recipe.parameters == recipe.models[0].parameters == {}


def test_named_scope_keeps_order() -> None:
    assert parse(ACCEPTED["named scope"]).pipeline.scope == (
        NamedPatterns(name="attention", tensors=("*.self_attn.*",)),
        NamedPatterns(name="rest", tensors=("*",)),
    )


def test_no_credential_in_storage_is_shown() -> None:
    text = """
merge_method: linear
models: [{model: a}]
pipeline:
  storage:
    s3://user:hidden@bucket: {region: eu}
    s3:
      endpoint_url: https://user:hidden@store
      client_kwargs: {aws_secret_access_key: hidden}
      deep: [{sasToken: hidden}]
"""
    found = problems(text)
    assert len(found) >= 4
    assert "hidden" not in " ".join(found)
    assert [line.split(": ")[0] for line in found][-1] == "r.yaml:10"


def test_two_sets_of_one_name_are_refused() -> None:
    text = "merge_method: geometric_median\nmodels: [{model: a}]\npipeline:\n  scope:\n"
    text += "  - {name: x, tensors: [a]}\n  - {name: x, tensors: [b]}"
    assert problems(text) == [
        'r.yaml:5: `pipeline.scope` has two sets with the name "x" (give each set its own name)',
    ]


def test_idle_keys_are_warned_about_with_line() -> None:
    warnings = parse(ACCEPTED["idle keys"]).warnings
    assert [warning.split(" is ")[0] for warning in warnings] == [
        "r.yaml:3: `input_model_parameters`",
        "r.yaml:4: `embed_slerp`",
        "r.yaml:5: `residual_weight`",
        "r.yaml:5: `embed_slerp`",
        "r.yaml:6: `int8_mask`",
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"base_model": None}, False),
        ({"parameters": {"normalize": True}}, False),
        ({"base_model": "./a/"}, False),
        ({"merge_method": "geometric_median", "parameters": {"weight": 1}}, False),
    ],
)
def test_base_is_input_of_linear_only_with_a_weight_for_all(change: dict[str, object], expected: bool) -> None:
    recipe = parse(yaml.safe_dump({**yaml.safe_load(ACCEPTED["linear with a base as input"]), **change}))
    assert recipe.base_is_input is expected
    assert [("averages the base model too" in warning) for warning in recipe.warnings] == [True] * expected


def test_all_problems_come_at_once_in_the_order_of_lines() -> None:
    text = """
merge_mehtod: linear
merge_method: linear
models:
  - model: a+lora+lora
  - {model: a, parameters: {weight: [1, x]}}
  - model: ./a/
  - 7
dtype: bf16
dtype: bf16
tokenizer_source: c
pipeline:
  tolerance: 2
  non_finite: base
"""
    found = problems(text)
    assert [int(problem.split(":")[1]) for problem in found] == [2, 5, 6, 7, 8, 9, 10, 13, 13, 14]
    assert "`pipeline.tolerance` has no meaning" in "".join(found)
    assert "the key `dtype` is given twice, first in line 9 (keep one of them)" in found[6]
    # Whether line 11 is wrong too cannot be said while a model's name is unreadable.
    with pytest.raises(RecipeError) as error:
        parse(text)
    assert str(error.value).startswith("10 problems:\n  - r.yaml:2: ")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("second", ["a", "./a", "a/", "{model: {path: a}}"])
def test_model_listed_twice_names_both_lines(second: str) -> None:
    (problem,) = problems(f"merge_method: linear\nmodels:\n- model: a\n- model: {second}")
    assert "is listed twice, first in line 3 (list it once and give it a larger weight)" in problem
    assert problem.startswith("r.yaml:4: ")


@pytest.mark.parametrize(
    ("base", "one", "other", "same"),
    [
        ("b", "x/a", "b+x/a", True),
        ("b/", "./b+./x/a/", "x/a", True),
        ("b", "{model: {path: b}, lora: {path: x/a}}", "b+x/a", True),
        ("b", "x/a", "c+x/a", False),
        ("b+a", "b+a", "a", False),
        ("b", "b", "b+b", True),
        (r"b\+", "a", r"b\++a", True),
        ("", "a", "b+a", False),
    ],
)
def test_adapter_with_and_without_its_base_is_one_model(base: str, one: str, other: str, same: bool) -> None:
    found = problems(f"merge_method: linear\nbase_model: {base}\nmodels:\n- model: {one}\n- model: {other}")
    assert [("r.yaml:5: " in problem, "listed twice, first in line 4" in problem) for problem in found] == [
        (True, True)
    ] * same


def test_output_and_rank_change_the_canonical_form() -> None:
    text = "merge_method: linear\nmodels: [{model: a}]\npipeline: {output: adapter, rank: "
    forms = [json.dumps(canonical(parse(text + rank + "}"))) for rank in ("", "8", "16")]
    forms.append(json.dumps(canonical(parse(ACCEPTED["least"]))))
    assert len(set(forms)) == 4


def test_tokenizer_source_must_be_one_of_the_models() -> None:
    text = "merge_method: linear\nbase_model: zero\nmodels: [{model: ./first/}]\ntokenizer_source: "
    assert parse(text + "zero/").tokenizer_source == "zero"
    assert parse(text + "first").tokenizer_source == "./first/"
    assert problems(text + "frist") == [
        "r.yaml:4: `tokenizer_source` is none of the models: frist (did you mean `./first/`?)"
    ]


def test_base_model_takes_the_spelling_of_the_list() -> None:
    assert parse("merge_method: linear\nbase_model: a/\nmodels: [{model: ./a}]").base_model == "./a"


def test_tokenizer_source_may_be_an_adapter() -> None:
    text = "merge_method: linear\nmodels: [{model: x+./a/}]\ntokenizer_source: "
    assert parse(text + "./x+a").tokenizer_source == "x+./a/"
    assert problems(text + "a") == [
        "r.yaml:3: `tokenizer_source` is none of the models: a (known here: base, x+./a/)",
    ]


def test_credentials_stay_out_of_messages_and_of_the_canonical_form() -> None:
    url = "s3://key:secret@bucket/a?token=secret"
    recipe = parse(f"merge_method: linear\nbase_model: {url}\ntokenizer_source: {url}\nmodels: [{{model: '{url}'}}]")
    assert recipe.models[0].model == url
    assert "secret" not in json.dumps(canonical(recipe))
    assert canonical(recipe)["base_model"] == "s3://bucket/a"
    twice = problems(f"merge_method: linear\ndtype: {url}\nmodels: [{{model: '{url}'}}, {{model: '{url}'}}]")
    assert len(twice) == 2
    assert "secret" not in "".join(twice)


def test_credentials_of_a_base_and_its_adapter_stay_out_of_the_canonical_form() -> None:
    model = "s3://key:secret@bucket/a?token=secret+s3://key:secret@bucket/l?token=secret"
    recipe = parse(
        f"merge_method: linear\nbase_model: {model}\ntokenizer_source: {model}\nmodels: [{{model: '{model}'}}]"
    )
    assert split_model(recipe.models[0].model)[1] == "s3://key:secret@bucket/l?token=secret"
    assert "secret" not in json.dumps(canonical(recipe))
    assert canonical(recipe)["base_model"] == "s3://bucket/a+s3://bucket/l"


@pytest.mark.parametrize("name", ACCEPTED)
def test_canonical_form_is_json_and_reads_back_equal(name: str) -> None:
    # As text a plain path cannot have an "@".
    recipe = parse(ACCEPTED[name].replace("@home", ""))
    content = json.loads(json.dumps(canonical(recipe), allow_nan=False))
    assert list(content) == list(keys_of(Recipe))
    if not METHODS[recipe.merge_method].uses_statistics:
        for key in STATISTICS_KEYS:
            del content["pipeline"][key]
    if recipe.pipeline.output == "adapter":
        del content["pipeline"]["file_size"]
    again = parse(json.dumps(content))
    assert canonical(again) == canonical(recipe)
    assert again.pipeline == recipe.pipeline


def test_canonical_form_is_the_same_for_two_spellings_of_one_recipe() -> None:
    short = parse("merge_method: linear\nmodels: [{model: a}]")
    long = parse("dtype:\npipeline: {file_size: 5GB}\nmodels:\n- {parameters: {}, model: a}\nmerge_method: linear")
    assert json.dumps(canonical(short)) == json.dumps(canonical(long))


def test_recipe_is_frozen() -> None:
    recipe = parse(ACCEPTED["least"])
    with pytest.raises(ValidationError, match="frozen"):
        recipe.merge_method = "ties"  # type: ignore[misc]


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**20)
    | st.floats()
    | st.sampled_from(["a", "base", "norm", "1e-5", "", "x+y", "x+y+z", "+", "5GB", "adapter", "model", "union", "*"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["model", "path", "value", "filter", "weight", "parameters", "name", "tensors", "scope", "lora"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from(keys_of(Recipe)), _VALUES),
    st.dictionaries(st.sampled_from(keys_of(PipelineSettings)), _VALUES),
    st.sampled_from(sorted(METHODS)),
)
def test_any_values_give_a_recipe_or_a_recipe_error(
    top: dict[str, object], pipeline: dict[str, object], method: str
) -> None:
    data = {"models": [{"model": "a"}], "pipeline": pipeline, "merge_method": method, **top}
    text = yaml.safe_dump(data)
    found = problems(text)
    assert all(problem.startswith("r.yaml:") for problem in found)
    if not found:
        assert json.dumps(canonical(parse(text)), allow_nan=False)
