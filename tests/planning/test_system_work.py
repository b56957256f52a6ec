"""What systems cost: memory by part, arithmetic by rule, and files dealt to workers by both."""

from __future__ import annotations

import pytest

from pipeline.errors import BudgetError
from pipeline.planning.assignment import assign
from pipeline.planning.cost import Rates, project_cost
from pipeline.planning.memory import project_memory
from pipeline.planning.plan import Plan
from pipeline.planning.system_memory import largest_matrix, matrix_bytes
from pipeline.planning.system_work import file_load, matrix_operations, streamed_bytes
from pipeline.planning.traffic import statistics_bytes
from tests.planning.plans import plan_of
from tests.support.families import make_family
from tests.support.moments import Moments, with_statistics

SHAPES = {
    "model.layers.0.mlp.weight": (48, 32),
    "model.layers.1.mlp.weight": (32, 48),
    "model.norm.weight": (3000,),
}
SMALL = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
RATES = Rates(measure=1e6, write=1e6, source="given", operations=1e9)
BUDGET = 4_000_000_000


@pytest.fixture(scope="module")
def grams(tmp_path_factory: pytest.TempPathFactory) -> Moments:
    family = make_family(tmp_path_factory.mktemp("family"), 2, shapes=SHAPES)
    return with_statistics(family, ["input_gram", "output_gram"], SMALL)


@pytest.fixture(scope="module")
def kfac(grams: Moments) -> Plan:
    parameters = {"objective": "kfac", "iterations": 7}
    return plan_of(grams.recipe("mats", parameters=parameters, pipeline={"file_size": "7KB"}))


def index(plan: Plan, name: str) -> int:
    return next(number for number, tensor in enumerate(plan.tensors) if tensor.name == name)


def test_operations_are_those_of_the_products(grams: Moments, kfac: Plan) -> None:
    first = index(kfac, "model.layers.0.mlp.weight")
    pair = 2 * (32 * 32 * 48 + 32 * 48 * 48)
    assert matrix_operations(kfac, first) == (7 + 3) * 2 * pair
    assert matrix_operations(kfac, index(kfac, "model.norm.weight")) == 0
    gram = plan_of(grams.recipe("mats", parameters={"iterations": 7}))
    assert matrix_operations(gram, first) == (2 + 7 + 2) * 2 * 32 * 32 * 48
    direct = plan_of(grams.recipe("regmean"))
    assert matrix_operations(direct, first) == (2 + 2) * 2 * 32 * 32 * 48 + 10 * 32**3


def test_moments_that_do_not_fit_are_read_at_every_iteration(kfac: Plan) -> None:
    first = index(kfac, "model.layers.0.mlp.weight")
    size = 2 * 4 * (32 * 33 // 2 + 48 * 49 // 2)
    assert statistics_bytes(kfac.tensors[first]) == size
    whole = matrix_bytes(kfac, first, resident=True)
    assert whole - matrix_bytes(kfac, first) == 2 * 4 * (32 * 32 + 48 * 48)
    assert streamed_bytes(kfac, first, whole) == 0
    assert streamed_bytes(kfac, first, whole - 1) == size * 9
    memory = project_memory(kfac, budget_bytes=BUDGET, threads=1)
    assert memory.systems_bytes == largest_matrix(kfac, resident=True)
    cost = project_cost(kfac, memory, workers=1, rates=RATES)
    assert cost.passes == 1.0
    assert cost.seconds["solve"] == pytest.approx(2 * matrix_operations(kfac, first) / 1e9)
    least = least_budget(kfac)
    tight = project_memory(kfac, budget_bytes=least, threads=4)
    assert (tight.systems_bytes, tight.threads) == (largest_matrix(kfac), 1)
    again = project_cost(kfac, tight, workers=1, rates=RATES)
    assert again.read_bytes - cost.read_bytes == 2 * size * 9


def least_budget(plan: Plan) -> int:
    """What the refusal of a budget says would do, to the byte."""
    low, high = 0, BUDGET
    while high - low > 1:
        middle = (low + high) // 2
        try:
            project_memory(plan, budget_bytes=middle, threads=4)
            high = middle
        except BudgetError:
            low = middle
    return high


def test_more_threads_have_room_for_more_matrices(kfac: Plan) -> None:
    rooms = [project_memory(kfac, budget_bytes=BUDGET, threads=threads).systems_bytes for threads in (1, 2, 4)]
    whole = largest_matrix(kfac, resident=True)
    assert rooms == [whole, 2 * whole, 4 * whole]
    for threads in (1, 4):
        memory = project_memory(kfac, budget_bytes=BUDGET, threads=threads)
        assert memory.total_bytes <= BUDGET


def test_normalising_is_one_more_read_of_the_statistics(grams: Moments) -> None:
    diagonals = with_statistics(grams.family, ["diagonal"], SHAPES)
    plain, normalised = (
        plan_of(diagonals.recipe("fisher", parameters={"normalize": normalize})) for normalize in (False, True)
    )
    memory = project_memory(plain, budget_bytes=BUDGET, threads=1)
    assert "matrix" not in memory.terms
    costs = [project_cost(plan, memory, workers=1, rates=RATES) for plan in (plain, normalised)]
    size = 2 * 4 * sum(tensor.elements for tensor in plain.tensors)
    assert sum(map(statistics_bytes, plain.tensors)) == size
    assert costs[1].read_bytes - costs[0].read_bytes == size
    assert costs[1].seconds["weigh"] == pytest.approx(size / 1e6)
    assert set(costs[0].seconds) == {"write"}


def test_files_are_dealt_by_their_arithmetic(kfac: Plan) -> None:
    loads = [file_load(kfac, file) for file in range(len(kfac.files))]
    assert len(loads) == 3
    largest = max(range(3), key=lambda file: kfac.files[file].size_bytes)
    # Most bytes, but nothing to solve.
    assert kfac.files[largest].tensors == (index(kfac, "model.norm.weight"),)
    assert loads[largest] == min(loads)
    shards = assign(kfac, 2)
    assert sorted(map(len, shards)) == [1, 2]
    assert largest in max(shards, key=len)
