"""What a user should read, of families small and large."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.engine.driver import Outcome
from pipeline.engine.solutions import Solution
from pipeline.planning.plan import GroupPlan, Plan
from pipeline.reporting.observations import observations
from tests.planning.plans import plan_by_hand


def family(points_PE: np.ndarray, *, groups: int = 1, base: bool = True, **settings: object) -> tuple[Plan, Outcome]:
    """A plan and the outcome of points that are split evenly over some groups."""
    count = len(points_PE)
    of = plan_by_hand([], [], inputs=count, **settings)
    fields = {name: getattr(of, name) for name in of.__dataclass_fields__}
    fields |= {"base": 0 if base else None, "models": tuple(range(base, count)), "weights": (1.0,) * (count - base)}
    fields["groups"] = tuple(GroupPlan(name=f"g{number}", elements=9, coefficients=None) for number in range(groups))
    share = (1.0 / (count - base),) * (count - base)
    solutions = tuple(
        Solution(
            group=number,
            factors=(0.0,) * base + share,
            coefficients=share,
            scale=1.0,
            median=None,
            distances=np.square(part[:, None] - part[None]).sum(axis=2),
        )
        for number, part in enumerate(np.array_split(points_PE, groups, axis=1))
    )
    return Plan(**fields), Outcome(solutions=solutions)


def points(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 8))


@pytest.mark.parametrize("groups", [1, 2])
def test_copies_of_the_base_and_of_models_are_named(groups: int) -> None:
    points_PE = points(7)
    points_PE[2] = points_PE[0]
    points_PE[5] = points_PE[6] = points_PE[3]
    points_PE[4, :4] = points_PE[1, :4]  # a copy in one group of two only
    assert observations(*family(points_PE, groups=groups)) == [
        "m2 has the same values as the base model, m0",
        "m5 has the same values as m3: a copy counts like a larger weight",
        "m6 has the same values as m3: a copy counts like a larger weight",
    ]


def test_without_a_base_a_copy_is_one_of_a_model() -> None:
    points_PE = points(4)
    points_PE[1] = points_PE[0]
    assert observations(*family(points_PE, base=False)) == [
        "m1 has the same values as m0: a copy counts like a larger weight"
    ]


def test_many_copies_are_counted() -> None:
    notes = observations(*family(points(10).repeat(6, axis=0)))
    assert len(notes) == 21
    assert notes[0] == "m1 has the same values as the base model, m0"
    assert notes[-1] == "30 more models have the same values as the base or as an earlier model"


@pytest.mark.parametrize(("models", "said"), [(64, False), (65, True)])
def test_a_large_family_is_told_where_its_pairs_are(models: int, said: bool) -> None:
    notes = observations(*family(points(models + 1)))
    assert [("cosines" in note and "_geomerge/distances.parquet" in note) for note in notes] == [True] * said
    assert observations(*family(points(models + 1), base=False)) == []


def test_a_scale_that_follows_one_model_is_warned_of() -> None:
    points_PE = points(6)
    points_PE[4] *= 100
    (note,) = observations(*family(points_PE, scale="norm"))
    assert "follows the task vector of m4" in note
    # A group that nothing measured, before it, has no norms.
    plan, outcome = family(points_PE, groups=2, scale="norm")
    outcome.solutions = (replace(outcome.solutions[0], distances=np.zeros((0, 0))), outcome.solutions[1])
    (note,) = observations(plan, outcome)
    assert "follows the task vector of m4" in note
    assert observations(*family(points_PE)) == []
