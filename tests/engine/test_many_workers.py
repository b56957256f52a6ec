"""The driver with hundreds of workers: the bits of one worker, and calls that grow with files and workers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import pytest

from pipeline.engine.driver import Driver, Outcome
from pipeline.engine.executors.ray import RayExecutor
from pipeline.engine.run_folder import SOLUTIONS
from pipeline.engine.worker import Job
from pipeline.events import Event
from pipeline.numerics.exact_sum import LIMBS
from pipeline.planning.assignment import assign
from pipeline.planning.memory import project_memory
from pipeline.planning.plan import Plan
from pipeline.storage import open_store
from tests.planning.plans import plan_of
from tests.support.fake_ray import FakeRay
from tests.support.families import make_family

FILES, MODELS = 270, 4
MANY = 256


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Files of one tensor each; two groups that span many files."""
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (8, 16) for layer in range(FILES)}
    family = make_family(tmp_path_factory.mktemp("many"), MODELS, shapes=shapes)
    scope = [{"name": "even", "tensors": ["*.layers.*[02468].mlp*"]}, {"name": "odd", "tensors": ["*"]}]
    plan = plan_of(family.recipe(pipeline={"file_size": "512B", "scope": scope}))
    assert len(plan.files) == FILES
    assert len(plan.groups) == 2
    return plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """What a whole merge over fake workers gave and took."""

    outcome: Outcome
    ray: FakeRay
    events: list[Event]
    solutions: bytes


Run = Callable[[str, int], Ran]


@pytest.fixture(scope="module")
def run(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a merge with `distances` and so many workers, in another order for every number, once."""

    @cache
    def ran(distances: str, workers: int) -> Ran:
        chosen = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, distances=distances))
        output = tmp_path_factory.mktemp(f"{distances}-{workers}")
        memory = project_memory(chosen, budget_bytes=1_000_000_000, threads=1)
        ray = FakeRay(seed=workers)
        events: list[Event] = []
        with ray.installed():
            executor = RayExecutor()
            driver = Driver(
                plan=chosen,
                output=open_store(str(output)),
                executor=executor,
                job=Job(plan=chosen, output_url=str(output), memory=memory, device="cpu"),
                workers=workers,
                listener=events.append,
            )
            try:
                outcome = driver.run()
            finally:
                executor.close()
        return Ran(outcome=outcome, ray=ray, events=events, solutions=(output / SOLUTIONS).read_bytes())

    return ran


@pytest.mark.parametrize("distances", ["gram", "stream"])
def test_as_many_workers_as_there_are_give_the_bits_of_one(run: Run, distances: str) -> None:
    alone, many = run(distances, 1), run(distances, MANY)
    assert many.outcome.solutions == alone.outcome.solutions
    assert many.outcome.written == alone.outcome.written
    assert many.outcome.stream_passes == alone.outcome.stream_passes
    assert many.solutions == alone.solutions
    assert (alone.outcome.stream_passes > 3) == (distances == "stream")


@pytest.mark.parametrize("workers", [16, MANY])
def test_a_pass_takes_one_call_a_file_and_a_start_one_a_worker(run: Run, workers: int) -> None:
    alone, many = run("gram", 1).ray, run("gram", workers).ray
    # Questions about progress are bounded by the clock, and what is told of it by the answers.
    assert set(many.calls) <= {"begin", "run_verb", "facts", "stop"}
    assert many.calls["run_verb"] == alone.calls["run_verb"] == 2 * FILES
    assert many.calls["begin"] == workers
    assert many.calls["stop"] <= workers
    assert len(run("gram", workers).events) <= 5 * FILES + workers
    # The plan is sent once, not with every worker's start; what else is sent depends on the files alone.
    assert many.sent_bytes["begin"] < 100 * workers
    assert many.sent_bytes["put"] == pytest.approx(alone.sent_bytes["put"], rel=0.01)
    assert many.sent_bytes["run_verb"] == alone.sent_bytes["run_verb"]


def test_an_iteration_takes_one_call_a_file_and_one_a_worker(run: Run, plan: Plan) -> None:
    many = run("stream", MANY)
    passes, ray = many.outcome.stream_passes, many.ray
    assert ray.calls["probe"] == FILES * passes
    # Workers that got no file in a pass are no ranks of its reduction.
    assert 0.5 * MANY * passes < ray.calls["reduce"] <= MANY * passes
    # Every file is named to one rank only, and the sums come back from one rank only.
    assert ray.sent_bytes["reduce"] < passes * (200 * MANY + 20 * FILES)
    sums = len(plan.groups) * (4 * MODELS + 4 * 4)
    assert ray.got_bytes["reduce"] <= passes * (sums * LIMBS * 8 + 1000 + 100 * MANY)


def test_shards_share_the_bytes_and_leave_nobody_idle_while_there_are_files(plan: Plan) -> None:
    shards = assign(plan, MANY)
    assert sorted(file for shard in shards for file in shard) == list(range(FILES))
    assert {len(shard) for shard in shards} == {1, 2}
    assert sum(map(bool, assign(plan, 4 * FILES))) == FILES
