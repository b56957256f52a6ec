"""Both executors under one contract; and what only Ray can lose: an actor."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.engine.executors import create_executor
from pipeline.engine.executors.base import Executor
from pipeline.engine.executors.local import LocalExecutor
from pipeline.engine.worker import Job
from pipeline.events import Event, FileMeasured, FileWritten, PassStarted
from pipeline.merging import Resources, merge
from tests.engine.executor_contract import ExecutorContract
from tests.support.families import make_family
from tests.support.reference import digests


class TestLocal(ExecutorContract):
    @pytest.fixture
    def executor(self) -> Iterator[Executor]:
        executor = LocalExecutor()
        yield executor
        executor.close()

    @pytest.fixture
    def fresh(self, executor: Executor) -> Executor:
        return executor


@pytest.fixture(scope="module")
def on_ray(ray_cluster: str) -> Iterator[Executor]:
    """One for all tests: its actors are kept from test to test, as they are from merge to merge of a batch."""
    executor = create_executor("ray", address=None)
    yield executor
    executor.close()


class TestRay(ExecutorContract):
    @pytest.fixture
    def executor(self, on_ray: Executor) -> Executor:
        return on_ray

    @pytest.fixture
    def fresh(self, ray_cluster: str) -> Iterator[Executor]:
        executor = create_executor("ray", address=None)
        yield executor
        executor.close()


@pytest.mark.parametrize("kind", [FileMeasured, FileWritten])
def test_a_merge_survives_a_killed_actor(ray_cluster: str, tmp_path: Path, kind: type[Event]) -> None:
    from pipeline.engine.executors.ray import RayExecutor

    family = make_family(tmp_path, 5, dtype=torch.bfloat16, loud=1)
    recipe = family.recipe(pipeline={"file_size": "8KB"})
    merge(str(recipe), str(tmp_path / "undisturbed"))
    killed = []
    original = RayExecutor.start

    def start(self: RayExecutor, job: Job, shards: object) -> None:
        original(self, job, shards)  # type: ignore[arg-type]
        killed.append(self)

    def listener(event: Event) -> None:
        if isinstance(event, kind) and len(killed) == 1:
            os.kill(killed[0].processes()[0][1], signal.SIGKILL)
            killed.append(killed[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayExecutor, "start", start)
        merge(str(recipe), str(tmp_path / "out"), resources=Resources(executor="ray", workers=2), listener=listener)
    assert len(killed) == 2
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("name", "address", "environment", "wanted"),
    [
        ("auto", None, {}, "local"),
        ("auto", "127.0.0.1:6379", {}, "ray"),
        ("auto", None, {"RAY_ADDRESS": "127.0.0.1:6379"}, "ray"),
        ("auto", None, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "ray"),
        ("local", None, {"RAY_ADDRESS": "127.0.0.1:6379"}, "local"),
        ("ray", None, {}, "ray"),
    ],
)
def test_auto_takes_ray_where_it_is_meant(
    monkeypatch: pytest.MonkeyPatch, name: str, address: str | None, environment: dict[str, str], wanted: str
) -> None:
    for variable in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert create_executor(name, address=address).name == wanted


def test_passes_are_announced_with_their_bytes(tmp_path: Path) -> None:
    family = make_family(tmp_path, 3, dtype=torch.bfloat16)
    events: list[Event] = []
    merge(str(family.recipe(pipeline={"file_size": "10KB"})), str(tmp_path / "out"), listener=events.append)
    passes = {event.name: event.total_bytes for event in events if isinstance(event, PassStarted)}
    size = sum(value.nbytes for value in family.base_values.values())
    assert passes == {"measure": 4 * size, "write": 3 * size}
