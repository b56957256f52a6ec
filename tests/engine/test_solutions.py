"""From distances to factors, geometry and the scale, against the points themselves."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from pipeline.engine.solutions import (
    Solution,
    fixed_solution,
    geometry,
    predicted_distances,
    refuse_far,
    solution_from_json,
    solve_group,
)
from pipeline.errors import CheckpointError
from pipeline.methods.geometric_median import METHOD
from pipeline.planning.plan import GroupPlan, Plan
from tests.planning.plans import plan_by_hand

MODELS, ELEMENTS = 5, 30
WEIGHTS = (1.0, 1.2, 1.0, 1.0, 0.5)


def points(seed: int = 0) -> np.ndarray:
    """A base and models as rows."""
    generator = np.random.default_rng(seed)
    base = generator.normal(size=ELEMENTS)
    tasks = generator.normal(size=(MODELS, ELEMENTS)) * np.array([[1.0], [0.5], [2.0], [1.0], [10.0]])
    return np.vstack([base, base + tasks + 0.3])


def squares(points_PE: np.ndarray) -> np.ndarray:
    result: np.ndarray = ((points_PE[:, None] - points_PE[None]) ** 2).sum(axis=2)
    return result


def plan(weights: tuple[float, ...] = WEIGHTS, *, base: bool = True, **settings: object) -> Plan:
    of = plan_by_hand([], [], inputs=MODELS + base, **settings)
    fields = {name: getattr(of, name) for name in of.__dataclass_fields__}
    group = GroupPlan(name="model", elements=ELEMENTS, coefficients=None)
    models = tuple(range(base, MODELS + base))
    return Plan(**{**fields, "weights": weights, "groups": (group,), "base": 0 if base else None, "models": models})


def solved(of: Plan, points_PE: np.ndarray) -> Solution:
    return solve_group(of, METHOD, 0, squares(points_PE))


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, 1.7, -1.0])
def test_factors_are_base_plus_scaled_task_vector(scale: float) -> None:
    points_PE = points()
    solution = solved(plan(scale=scale), points_PE)
    median = np.array(solution.coefficients) @ points_PE[1:]
    wanted = points_PE[0] + scale * (median - points_PE[0])
    assert np.array(solution.factors) @ points_PE == pytest.approx(wanted, abs=1e-12)
    assert sum(solution.factors) == pytest.approx(1.0, abs=1e-12)
    assert solution.scale == scale
    assert len(solution.factors) == MODELS + 1


def test_the_median_has_no_gradient() -> None:
    """Independent of the solver's own certificate: the weighted unit vectors cancel."""
    points_PE = points()
    solution = solved(plan(), points_PE)
    assert solution.median is not None
    assert solution.median.optimum == "interior"
    merged = np.array(solution.factors) @ points_PE
    differences = points_PE[1:] - merged
    lengths = np.linalg.norm(differences, axis=1)
    weights = np.array(WEIGHTS)
    assert np.linalg.norm((weights / lengths) @ differences) < 1e-6 * weights.sum()
    assert solution.median.objective == pytest.approx(float(weights @ lengths), rel=1e-9)


def test_without_a_base_there_are_only_the_models() -> None:
    points_PE = points()[1:]
    solution = solved(plan(base=False), points_PE)
    assert solution.factors == solution.coefficients
    assert geometry(plan(base=False), solution) == (None, None)
    # Translation moves nothing: the same as with a base.
    assert solution.coefficients == pytest.approx(solved(plan(), points()).coefficients, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_scale_of_norm_gives_the_weighted_mean_norm(seed: int) -> None:
    points_PE = points(seed)
    solution = solved(plan(scale="norm"), points_PE)
    merged = np.array(solution.factors) @ points_PE
    norms = np.linalg.norm(points_PE[1:] - points_PE[0], axis=1)
    wanted = np.average(norms, weights=WEIGHTS)
    assert np.linalg.norm(merged - points_PE[0]) == pytest.approx(wanted, rel=1e-10)
    assert solution.scale > 1.0
    plain = solved(plan(), points_PE)
    assert solution.coefficients == plain.coefficients


@pytest.mark.parametrize(
    ("weights", "rank"),
    [
        ((1.0,) * 5, (2, 2)),
        ((1.0, 1.0, 1.0, 1.0, 4.0), (3, 4)),  # half of the weight lies on either side of the gap
        ((1.0, 1.0, 1.0, 1.0, 5.0), (4, 4)),
        ((0.1, 0.4, 0.1, 0.1, 0.1), (1, 1)),
        ((3.0, 2.0, 2.0, 2.0, 1.0), (1, 2)),
    ],
)
def test_a_scale_of_median_norm_gives_the_weighted_median_norm(
    weights: tuple[float, ...], rank: tuple[int, int]
) -> None:
    """The weights are given by the rank of the norm; a tie takes the middle of its two."""
    points_PE = points(4)
    norms = np.linalg.norm(points_PE[1:] - points_PE[0], axis=1)
    order = np.argsort(norms)
    by_model = np.empty(MODELS)
    by_model[order] = weights
    solution = solved(plan(tuple(by_model.tolist()), scale="median_norm"), points_PE)
    merged = np.array(solution.factors) @ points_PE
    wanted = (norms[order[rank[0]]] + norms[order[rank[1]]]) / 2
    assert np.linalg.norm(merged - points_PE[0]) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("rule", ["norm", "median_norm"])
def test_a_median_at_the_base_is_not_lengthened(rule: str) -> None:
    """Opposite task vectors of one length: their median is the base, which no factor lengthens."""
    generator = np.random.default_rng(3)
    base, step = generator.normal(size=(2, ELEMENTS))
    other = generator.normal(size=ELEMENTS)
    points_PE = np.vstack([base, base + step, base - step, base + other, base - other, base])
    solution = solved(plan((1.0,) * 5, scale=rule), points_PE)
    assert solution.scale == 1.0
    assert np.array(solution.factors) @ points_PE == pytest.approx(base, abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.3, "norm", "median_norm"])
def test_predicted_distances_are_those_of_the_points(scale: float | str) -> None:
    points_PE = points(7)
    solution = solved(plan(scale=scale), points_PE)
    merged = np.array(solution.factors) @ points_PE
    assert predicted_distances(solution) == pytest.approx(np.linalg.norm(points_PE - merged, axis=1), rel=1e-11)


def test_predicted_distances_at_a_point_are_zero_and_not_nan() -> None:
    points_PE = points()
    solution = solved(plan((1e6, 1.0, 1.0, 1.0, 1.0)), points_PE)
    assert solution.coefficients == (1.0, 0.0, 0.0, 0.0, 0.0)
    found = predicted_distances(solution)
    assert found[1] == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(found).all()


def test_norms_and_cosines_of_task_vectors() -> None:
    points_PE = points()
    of = plan()
    norms, cosines = geometry(of, solved(of, points_PE))
    tasks = points_PE[1:] - points_PE[0]
    wanted = np.linalg.norm(tasks, axis=1)
    assert norms == pytest.approx(wanted.tolist(), rel=1e-13)
    assert np.array(cosines) == pytest.approx(tasks @ tasks.T / np.outer(wanted, wanted), abs=1e-13)
    assert cosines is not None
    assert [cosines[index][index] for index in range(MODELS)] == [1.0] * MODELS


def test_a_task_vector_of_length_zero_has_no_direction() -> None:
    points_PE = points()
    points_PE[2] = points_PE[0]
    of = plan()
    norms, cosines = geometry(of, solved(of, points_PE))
    assert norms is not None
    assert cosines is not None
    assert norms[1] == 0.0
    assert cosines[1] == [None] * MODELS
    assert [row[1] for row in cosines] == [None] * MODELS
    assert all(-1 <= cosines[i][j] <= 1 for i in (0, 2, 3, 4) for j in (0, 2, 3, 4))  # type: ignore[operator]


def test_parallel_task_vectors_have_cosines_within_bounds() -> None:
    generator = np.random.default_rng(5)
    base, step = generator.normal(size=(2, ELEMENTS))
    points_PE = np.vstack([base] + [base + factor * step for factor in (1.0, 3.0, -0.1, 1e3, 7.0)])
    _, cosines = geometry(plan(), solved(plan(), points_PE))
    signs = np.sign([1.0, 3.0, -0.1, 1e3, 7.0])
    found = np.array(cosines)
    assert found == pytest.approx(np.outer(signs, signs), abs=1e-9)
    assert np.abs(found).max() <= 1.0


def test_a_fixed_solution_has_what_the_recipe_says() -> None:
    of = plan()
    fields = {name: getattr(of, name) for name in of.__dataclass_fields__}
    coefficients = (0.1, 0.2, 0.3, 0.4, 0.5)
    of = Plan(**{**fields, "groups": (GroupPlan(name="model", elements=1, coefficients=coefficients),)})
    solution = fixed_solution(of, 0)
    assert solution.factors == (0.0, *coefficients)
    assert (solution.coefficients, solution.scale, solution.median) == (coefficients, 1.0, None)
    assert solution.distances.size == 0
    assert geometry(of, solution) == (None, None)


def test_a_saved_solution_comes_back_bit_for_bit() -> None:
    solution = solved(plan(scale="norm"), points())
    again = solution_from_json(json.loads(json.dumps(solution.to_json())))
    assert again.factors == solution.factors
    assert again.coefficients == solution.coefficients
    assert again.scale == solution.scale
    assert again.distances.tobytes() == solution.distances.tobytes()
    assert again.median is not None
    assert solution.median is not None
    for name in (
        "coefficients",
        "objective",
        "lower_bound",
        "relative_gap",
        "iterations",
        "optimum",
        "unique",
        "distances",
    ):
        assert getattr(again.median, name) == getattr(solution.median, name)
    assert again == solution
    fixed = Solution(group=3, factors=(1.0,), coefficients=(1.0,), scale=1.0, median=None)
    assert solution_from_json(json.loads(json.dumps(fixed.to_json()))) == fixed


@pytest.mark.parametrize("count", [64, 65, 300])
def test_many_distances_are_saved_packed_and_bit_for_bit(count: int) -> None:
    generator = np.random.default_rng(count)
    distances_PP = squares(generator.normal(size=(count, 3)))
    saved = Solution(
        group=2, factors=(0.5,) * count, coefficients=(0.5,) * count, scale=2.0, median=None, distances=distances_PP
    )
    text = json.dumps(saved.to_json())
    again = solution_from_json(json.loads(text))
    assert again == saved
    assert again.distances.tobytes() == distances_PP.tobytes()
    # Readable for few points; otherwise 8 bytes a pair, and a third of that for the letters.
    assert isinstance(json.loads(text)["distances"], list) == (count == 64)
    assert count == 64 or len(text) < count * (count - 1) / 2 * 8 * 4 / 3 + 30 * count


def test_solutions_are_equal_by_their_numbers_and_survive_pickling() -> None:
    solution = solved(plan(), points())
    assert pickle.loads(pickle.dumps(solution)) == solution
    moved = solution.distances.copy()
    moved[0, 1] = np.nextafter(moved[0, 1], 0.0)
    assert replace(solution, distances=moved) != solution
    assert replace(solution, scale=0.5) != solution
    assert solution != "solution"


def large(count: int) -> tuple[Plan, np.ndarray]:
    """A plan of so many models beside their base, and points whose differences from it are nearly orthogonal."""
    of = plan_by_hand([], [], inputs=count + 1)
    fields = {name: getattr(of, name) for name in of.__dataclass_fields__}
    group = GroupPlan(name="model", elements=ELEMENTS, coefficients=None)
    return Plan(**{**fields, "groups": (group,)}), np.random.default_rng(0).normal(size=(count + 1, 60))


@pytest.mark.parametrize("count", [64, 65])
def test_cosines_are_for_families_that_people_can_read(count: int) -> None:
    of, points_PE = large(count)
    norms, cosines = geometry(of, solved(of, points_PE))
    assert norms == pytest.approx(np.linalg.norm(points_PE[1:] - points_PE[0], axis=1).tolist(), rel=1e-12)
    assert (cosines is None) == (count == 65)
    assert cosines is None or (len(cosines), len(cosines[0])) == (64, 64)


def test_every_far_model_is_named() -> None:
    of, points_PE = large(9)
    points_PE[[3, 7]] += 1e11
    with pytest.raises(CheckpointError) as caught:
        refuse_far(of, 0, squares(points_PE))
    assert [problem.where.split(",")[0] for problem in caught.value.problems] == ["model m3", "model m7"]
    refuse_far(of, 0, squares(points_PE[:3].repeat(4, axis=0)[:10]))
