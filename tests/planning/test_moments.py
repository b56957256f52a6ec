"""Which parameters are solved, averaged and copied, and what is refused before any value is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import CheckpointError, PipelineError, RecipeError
from pipeline.planning.plan import FilePlan, Input, Plan, Settings, Source, SourceFile, TensorPlan
from tests.planning.plans import plan_of
from tests.support.adapters import Layout, linears, make_adapters
from tests.support.families import Family, make_family, random_weights, save_model
from tests.support.moments import EMBEDDING, MATRICES, SHAPES, Arrays, Moments, random_statistics, save_statistics

OUTSIDE = {EMBEDDING: "an embedding"}
GRAMS = {name: SHAPES[name] for name in MATRICES}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 2, shapes=SHAPES)


def moments(
    family: Family, folder: Path, *arrays: Arrays, outside: Mapping[str, str] | None = OUTSIDE, examples: int = 10
) -> Moments:
    """Statistics of each model."""
    folders = [
        save_statistics(folder / f"statistics{row}", found, outside=outside, examples=examples)
        for row, found in enumerate(arrays)
    ]
    return Moments(family, folders=folders, arrays=list(arrays))


def both(kind: str) -> tuple[Arrays, Arrays]:
    shapes = SHAPES if kind == "diagonal" else GRAMS
    return random_statistics([kind], 0, shapes), random_statistics([kind], 1, shapes)  # type: ignore[list-item]


def treatment(plan: Plan) -> dict[str, str]:
    return {tensor.name: tensor.treatment for tensor in plan.tensors}


def refusal(recipe: Path, kind: type[PipelineError], *words: str) -> str:
    with pytest.raises(kind) as caught:
        plan_of(recipe)
    text = str(caught.value)
    assert not [word for word in words if word not in text], text
    return text


def test_vectors_and_what_the_header_names_are_averaged_and_all_adds_up(family: Family, tmp_path: Path) -> None:
    plan = plan_of(moments(family, tmp_path, *both("input_gram")).recipe("regmean"))
    found = treatment(plan)
    assert set(found) == set(SHAPES)
    assert {name for name, what in found.items() if what == "solved"} == set(MATRICES)
    assert {name for name, what in found.items() if what == "averaged"} == set(SHAPES) - set(MATRICES)
    assert sorted(group.name for group in plan.groups) == ["averaged", "solved"]
    assert all(group.coefficients == (0.5, 0.5) for group in plan.groups)
    system = next(tensor.system for tensor in plan.tensors if tensor.name == UP)
    assert system is not None
    assert [(term.input, term.weight) for term in system.terms] == [(1, 1.0), (2, 1.0)]
    (statistic,) = system.terms[0].statistics
    assert (statistic.kind, statistic.size, statistic.dtype) == ("input_gram", 6, "F32")
    assert [item.url for item in plan.statistics] == [str(tmp_path / f"statistics{row}") for row in (0, 1)]


def test_integers_are_copied(tmp_path: Path) -> None:
    weights = {**random_weights(0, shapes=SHAPES), "model.position_ids": torch.arange(7)}
    family = Family(root=tmp_path, base=save_model(tmp_path / "base", weights))
    family.models = [save_model(tmp_path / f"expert{row}", weights) for row in range(2)]
    plan = plan_of(moments(family, tmp_path, *both("diagonal")).recipe("fisher"))
    assert treatment(plan)["model.position_ids"] == "copied"


def test_listed_tensors_are_averaged_whatever_they_have(family: Family, tmp_path: Path) -> None:
    of = moments(family, tmp_path, *both("diagonal"))
    plan = plan_of(of.recipe("fisher", pipeline={"average": ["*.norm.*", "*embed*"]}))
    averaged = {name for name, what in treatment(plan).items() if what == "averaged"}
    assert averaged == {"model.norm.weight", EMBEDDING}
    refusal(of.recipe("fisher", pipeline={"average": ["*.nrom.*"]}), RecipeError, "'*.nrom.*' matches no tensor")


def test_without_any_outside_a_matrix_needs_a_statistic(family: Family, tmp_path: Path) -> None:
    of = moments(family, tmp_path, *both("input_gram"), outside={})
    text = refusal(of.recipe("regmean"), CheckpointError, EMBEDDING, "has no input gram", "expert0", "statistics1")
    assert f"pipeline: {{average: [{EMBEDDING}]}}" in text
    listed = of.recipe("regmean", pipeline={"average": [EMBEDDING]})
    assert treatment(plan_of(listed))[EMBEDDING] == "averaged"


def test_fisher_needs_every_vector_too(family: Family, tmp_path: Path) -> None:
    first, second = both("diagonal")
    for arrays in (first, second):
        del arrays["diagonal", "model.norm.weight"]
    of = moments(family, tmp_path, first, second)
    refusal(of.recipe("fisher"), CheckpointError, "model.norm.weight", "has no diagonal")


@pytest.mark.parametrize("outside", [OUTSIDE, {**OUTSIDE, UP: "skipped"}])
def test_models_that_disagree_are_refused(family: Family, tmp_path: Path, outside: dict[str, str]) -> None:
    first, second = both("input_gram")
    del second["input_gram", UP]
    folders = [
        save_statistics(tmp_path / "one", first, outside=OUTSIDE),
        save_statistics(tmp_path / "two", second, outside=outside),
    ]
    of = Moments(family, folders=folders)
    refusal(of.recipe("regmean"), CheckpointError, UP, "although", "expert0 has", "expert1", "two")


@pytest.mark.parametrize(
    ("kind", "method", "parameters", "bad"),
    [
        ("diagonal", "fisher", {}, np.ones((6, 9), dtype=np.float32)),
        ("input_gram", "regmean", {}, np.eye(9, dtype=np.float32)),
        ("output_gram", "mats", {"objective": "kfac"}, np.eye(6, dtype=np.float32)),
    ],
)
def test_statistics_of_another_shape_are_refused(
    family: Family, tmp_path: Path, kind: str, method: str, parameters: dict[str, object], bad: np.ndarray
) -> None:
    kinds = ["input_gram", "output_gram"] if method == "mats" else [kind]
    shapes = SHAPES if kind == "diagonal" else GRAMS
    first, second = (random_statistics(kinds, seed, shapes) for seed in (0, 1))  # type: ignore[arg-type]
    second[kind, UP] = bad  # type: ignore[index]
    of = moments(family, tmp_path, first, second)
    text = refusal(of.recipe(method, parameters=parameters), CheckpointError, UP, "expert1", str(list(bad.shape)))
    assert kind.replace("_", " ") in text
    assert "expert0" not in text


def test_a_long_list_of_missing_statistics_is_cut(family: Family, tmp_path: Path) -> None:
    first, second = both("input_gram")
    one = next(name for kind, name in second if name != UP)
    of = moments(
        family,
        tmp_path,
        {("input_gram", UP): first["input_gram", UP]},
        {("input_gram", one): second["input_gram", one]},
        outside={},
    )
    text = refusal(of.recipe("regmean"), CheckpointError, "more statistics are missing or do not fit")
    assert text.startswith("9 problems:")


def test_statistics_of_another_kind_are_named_as_such(family: Family, tmp_path: Path) -> None:
    of = moments(family, tmp_path, *both("input_gram"), outside=dict.fromkeys(SHAPES, "no gradients"))
    text = refusal(of.recipe("fisher"), CheckpointError, "statistics0: hold no diagonal, only input gram")
    assert text.startswith("2 problems:")


def test_statistics_of_another_family_are_named_alone(family: Family, tmp_path: Path) -> None:
    first, second = both("input_gram")
    strange = {(kind, f"other.{name}"): array for (kind, name), array in second.items()}
    text = refusal(
        moments(family, tmp_path, first, strange).recipe("regmean"), CheckpointError, "expert1", "statistics1"
    )
    assert "hold nothing of this model's parameters: they say that they are of" in text
    assert "expert0" not in text


def test_a_model_as_statistics_and_statistics_as_a_model_are_refused(family: Family, tmp_path: Path) -> None:
    of = moments(family, tmp_path, *both("diagonal"))
    swapped = Moments(family, folders=[family.models[0], of.folders[1]])
    refusal(swapped.recipe("fisher"), CheckpointError, "is a model, not statistics")
    wrong = Moments(dataclasses.replace(family, models=[of.folders[0], family.models[1]]), folders=of.folders)
    refusal(wrong.recipe("fisher"), CheckpointError, "statistics0")


def test_a_merged_adapter_cannot_hold_a_solution(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", random_weights(0, shapes=SHAPES))
    family = make_adapters(tmp_path, base, [Layout(modules=linears(SHAPES, "up_proj"), rank=2)] * 2)
    of = moments(family, tmp_path, *both("diagonal"))
    refusal(of.recipe("fisher", pipeline={"output": "adapter"}), RecipeError, "full rank")
    # What no adapter touches needs no statistic.
    only = {key: value for key, value in both("input_gram")[0].items() if "up_proj" in key[1]}
    found = treatment(plan_of(moments(family, tmp_path / "only", only, only, outside={}).recipe("regmean")))
    assert {name for name, what in found.items() if what == "solved"} == {name for name in SHAPES if "up_proj" in name}


def test_the_start_may_be_a_checkpoint_of_the_family(family: Family, tmp_path: Path) -> None:
    of = moments(family, tmp_path, *both("input_gram"))
    start = save_model(tmp_path / "start", random_weights(3, shapes=SHAPES))
    plan = plan_of(of.recipe("mats", pipeline={"start": str(start)}))
    solver = plan.settings.solver
    assert solver is not None
    assert (solver.start, solver.start_input) == ("checkpoint", 3)
    assert plan.inputs[3].url == str(start)
    assert plan.models == (1, 2)
    # A model of the family is no further input.
    again = plan_of(of.recipe("mats", pipeline={"start": str(family.models[1])}))
    assert again.settings.solver is not None
    assert again.settings.solver.start_input == 2
    assert len(again.inputs) == 3
    odd = save_model(tmp_path / "odd", random_weights(3, shapes={**SHAPES, UP: (8, 6)}))
    refusal(of.recipe("mats", pipeline={"start": str(odd)}), CheckpointError, "odd", UP)


def test_an_adapter_is_no_start(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", random_weights(0, shapes=SHAPES))
    family = make_adapters(tmp_path, base, [Layout(modules=linears(SHAPES, "up_proj"), rank=2)] * 2)
    of = moments(family, tmp_path, *both("input_gram"))
    refusal(of.recipe("mats", pipeline={"start": str(family.models[0])}), RecipeError, "is an adapter")


def test_data_sizes_are_the_recipes_or_the_statistics(family: Family, tmp_path: Path) -> None:
    of = moments(family, tmp_path, *both("diagonal"), examples=40)
    anchor = save_statistics(tmp_path / "anchor", both("diagonal")[0], examples=7)
    method, settings = "uncertainty_gradient_matching", {"base_statistics": str(anchor)}

    def sizes(**keys: object) -> tuple[list[float], float]:
        plan = plan_of(of.recipe(method, **{"pipeline": settings, **keys}))  # type: ignore[arg-type]
        system = plan.tensors[0].system
        assert system is not None
        assert system.anchor is not None
        return [term.data_size for term in system.terms], system.anchor.data_size

    assert sizes() == ([40.0, 40.0], 7.0)
    assert sizes(models=[{"data_size": 3}, {}]) == ([3.0, 40.0], 7.0)
    assert sizes(parameters={"data_size": 5}, models=[{"data_size": 3}, {}]) == ([3.0, 5.0], 5.0)
    # Without statistics of the base there is only the prior.
    plan = plan_of(of.recipe(method))
    system = plan.tensors[0].system
    assert system is not None
    assert system.anchor is not None
    assert system.anchor.statistics == ()


def test_the_fingerprint_knows_statistics_start_and_treatment(family: Family, tmp_path: Path) -> None:
    of = moments(family, tmp_path, *both("input_gram"))
    recipe = of.recipe("mats")
    plan = plan_of(recipe)
    assert plan_of(recipe).fingerprint == plan.fingerprint
    assert json.loads(json.dumps(plan.to_json()))["fingerprint"] == plan.fingerprint
    seen = {plan.fingerprint}
    for keys in (
        {"parameters": {"iterations": 7}},
        {"parameters": {"off_diagonal": 0.5}},
        {"pipeline": {"start": "zero"}},
        {"pipeline": {"average": ["lm_head.*"]}},
    ):
        seen.add(plan_of(of.recipe("mats", **keys)).fingerprint)  # type: ignore[arg-type]
    for file in of.folders[0].glob("*.statistics"):
        file.write_bytes(file.read_bytes())
    changed = plan_of(of.recipe("mats"))
    seen.add(changed.fingerprint)
    assert len(seen) == 6
    assert [name for name, digest in plan.parts.items() if changed.parts[name] != digest] == ["sources"]


@pytest.mark.parametrize(
    ("method", "keys", "said"),
    [
        ("regmean", {"parameters": {"off_diagonal": 1.5}}, ":19: `parameters.off_diagonal` must be from 0 to 1"),
        ("mats", {"parameters": {"tolerance": 2}}, "`parameters.tolerance` must be from 1e-300 to 1, not 2"),
        ("mats", {"models": [{"weight": 1e-13}, {}]}, "only ratios of weights count"),
        ("uncertainty_gradient_matching", {"parameters": {"prior": -1}}, "`parameters.prior` must be from 0 to 1e+30"),
    ],
)
def test_parameters_out_of_range(
    family: Family, tmp_path: Path, method: str, keys: dict[str, object], said: str
) -> None:
    kind = "diagonal" if method.startswith("unc") else "input_gram"
    of = moments(family, tmp_path, *both(kind))
    refusal(of.recipe(method, **keys), RecipeError, said)  # type: ignore[arg-type]


def test_a_plan_without_moments_is_the_plan_that_it_always_was() -> None:
    sources = tuple(Source(file=0, start=0, dtype="F32") for _ in range(2))
    plan = Plan(
        recipe={},
        settings=Settings(
            method="linear",
            scope="model",
            distances="gram",
            scale=1.0,
            tolerance=1e-10,
            non_finite="error",
            cast=None,
            measured=False,
        ),
        inputs=(Input(url="/a", name="a", files=(SourceFile(path="f", size_bytes=1, version="1"),)),) * 2,
        base=0,
        donor=0,
        models=(1,),
        weights=(1.0,),
        tensors=(TensorPlan(name="w", shape=(3,), elements=3, dtype="F32", group=0, sources=sources),),
        files=(FilePlan(name="f", tensors=(0,), size_bytes=12, fused=False),),
        groups=(),
        chunk_elements=8,
        notes=(),
    )
    # As of version 0.1.0: merges that were begun, or finished, before there were statistics are known again.
    assert plan.fingerprint == "4a115f543588a12efbe2b3f97e37e40b36af931bc0e1451c4340eb716c71c911"


def test_statistics_of_another_model_or_made_otherwise_are_told(family: Family, tmp_path: Path) -> None:
    first, second = both("diagonal")
    folders = [
        save_statistics(tmp_path / "one", first, model="elsewhere/expert0/", labels="exact"),
        save_statistics(tmp_path / "two", second, model="hub/other"),
    ]
    notes = plan_of(Moments(family, folders=folders).recipe("fisher")).notes
    assert [note for note in notes if "statistics" in note] == [
        f"the statistics {folders[1]} say that they are of hub/other; they are used for {family.models[1]}",
        "the models' statistics differ in labels (exact, empirical): a hidden weight between the models",
    ]
