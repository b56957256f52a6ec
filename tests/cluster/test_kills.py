"""What a cluster loses: workers, nodes, the driver, the storage. Every merge ends in the undisturbed one's bits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from pipeline.storage import open_store
from tests.cluster.bucket import Bucket, bits, place_of, remains, stamps
from tests.cluster.driver import DriverProcess
from tests.cluster.gate import Gate, Hold, wait_until
from tests.support.cluster import Cluster
from tests.support.processes import command_line, connected_from, kill
from tests.support.s3 import S3Server

WORKERS = 3
# Beside the seconds that a start takes: longer than what a client forgives by itself.
OUTAGE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A point in a merge: the driver waits at an event, and then a request is held.

    Attributes:
        event: At which the driver waits.
        request: The beginning of the request; {models} and {out} stand for the folders.
        by_worker: Whether a worker makes it, else the driver.
        distances: Of the recipe.
        after: So many such requests are let through.
    """

    event: Mapping[str, str]
    request: str
    by_worker: bool
    distances: str = "gram"
    after: int = 0


MEASURING = Moment(
    event={"event": "PassStarted", "name": "measure"}, request="GET {models}/expert0/", by_worker=True, after=2
)
SOLVING = Moment(
    event={"event": "PassEnded", "name": "measure"}, request="PUT {out}/_geomerge/solutions", by_worker=False
)
ITERATING = Moment(
    event={"event": "PassStarted", "name": "iteration 2"},
    request="GET {models}/expert0/",
    by_worker=True,
    distances="stream",
    after=2,
)
WRITING = Moment(event={"event": "PassStarted", "name": "write"}, request="PUT {out}/model-", by_worker=True, after=2)
COMMITTING = Moment(
    event={"event": "PassEnded", "name": "write"}, request="PUT {out}/model.safetensors.index.json", by_worker=False
)
MOMENTS = {
    "measuring": MEASURING,
    "solving": SOLVING,
    "iterating": ITERATING,
    "writing": WRITING,
    "committing": COMMITTING,
}


class Scene:
    """A merge that stands still at a moment."""

    def __init__(self, bucket: Bucket, gate: Gate, driver: DriverProcess, moment: Moment) -> None:
        self.recipe, self.output = bucket.order(distances=moment.distances, endpoint=gate.endpoint)
        self._bucket, self._gate, self._moment, self._driver = bucket, gate, moment, driver
        resources: dict[str, object] = {"workers": WORKERS}
        if moment.distances == "stream":
            resources["memory_bytes"] = bucket.least_memory(self.recipe, self.output)
        driver.merge(self.recipe, self.output, halts=(moment.event,), **resources)
        driver.until_halted()

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        """Let the driver go on, up to the request."""
        models = place_of(self._bucket.places[str(self._bucket.family.base)]).rpartition("/")[0]
        request = self._moment.request.format(models=models, out=place_of(self.output))
        with self._gate.hold(request.encode(), after=self._moment.after) as hold:
            self._driver.go()
            yield hold

    def assert_whole(self) -> None:
        """Check the bits, and that no part of what was lost stays in the bucket."""
        assert bits(self.output) == self._bucket.undisturbed(self._moment.distances)
        assert open_store(self.output).leftovers() == ()


def victim(cluster: Cluster, hold: Hold, moment: Moment) -> tuple[int, int]:
    """Return the node and the process of the worker whose request is held, or of any if it is the driver's."""
    hold.wait()
    workers = {pid: number for number in (1, 2) for pid in cluster.actors(number)}
    assert len(workers) == WORKERS, [command_line(pid) for pid in workers]
    pid = connected_from(hold.ports[0], workers) if moment.by_worker else min(workers)
    assert pid is not None
    return workers[pid], pid


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_worker_is_killed(
    cluster: Cluster, bucket: Bucket, gate: Gate, driver: DriverProcess, moment: Moment
) -> None:
    scene = Scene(bucket, gate, driver, moment)
    with scene.hold() as hold:
        kill(victim(cluster, hold, moment)[1])
    report = driver.finish()
    scene.assert_whole()
    assert report["resumed_files"] == 0
    if moment.by_worker:
        assert [note for note in driver.notes if "started again" in note], driver.notes


@pytest.mark.parametrize("moment", [MEASURING, WRITING], ids=["measuring", "writing"])
def test_the_storage_goes_away_and_comes_back(
    cluster: Cluster, bucket: Bucket, gate: Gate, driver: DriverProcess, s3: S3Server, moment: Moment
) -> None:
    scene = Scene(bucket, gate, driver, moment)
    try:
        with scene.hold() as hold:
            hold.wait()
            s3.kill()
        time.sleep(OUTAGE_S)
    finally:
        s3.start()
    driver.finish()
    scene.assert_whole()


@pytest.mark.parametrize(
    ("moment", "again"),
    [(MEASURING, False), (ITERATING, False), (WRITING, True)],
    ids=["measuring", "iterating", "writing and added again"],
)
def test_a_node_is_lost(
    cluster: Cluster, bucket: Bucket, gate: Gate, driver: DriverProcess, moment: Moment, again: bool
) -> None:
    scene = Scene(bucket, gate, driver, moment)
    with scene.hold() as hold:
        number, _ = victim(cluster, hold, moment)
        cluster.kill_node(number)
        if again:
            cluster.restore(wait=False)
    driver.finish()
    scene.assert_whole()
    assert [note for note in driver.notes if note.startswith("worker")], driver.notes


# While it solves or writes: tests/engine/test_resume.py, and a job in test_job.py.
@pytest.mark.parametrize("moment", [MEASURING, ITERATING, COMMITTING], ids=["measuring", "iterating", "committing"])
def test_the_driver_is_killed_and_the_merge_started_again(
    cluster: Cluster, bucket: Bucket, gate: Gate, driver: DriverProcess, moment: Moment
) -> None:
    scene = Scene(bucket, gate, driver, moment)
    with scene.hold() as hold:
        hold.wait()
        driver.kill()
        driver.start()
        wait_until(lambda: not cluster.actors(), "its workers end with it")
    left = remains(scene.output)
    driver.merge(scene.recipe, scene.output, workers=WORKERS)
    report = driver.finish()
    scene.assert_whole()
    # Nothing is written again, and nothing read or asked again whose result was saved.
    assert left.stamps.items() <= stamps(scene.output).items()
    assert report["resumed_files"] == left.resumed
    iterations = 0 if left.solved else bucket.iterations(moment.distances) - left.reductions
    assert report["iterations_over_parameters"] == iterations
    if moment.distances == "gram":
        assert report["bytes_read"] + report["bytes_reused_from_memory"] == left.left_bytes
