"""Random kills over repeated merges: `python -m tests.cluster.soak --minutes N`.

Kills workers, nodes, the driver and the S3 server, at random instants of merges on a cluster. A kill is survived when
its merge, submitted again if the driver died, ends in the undisturbed one's bits.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.storage import open_store
from tests.cluster.bucket import Bucket, bits, make_bucket
from tests.cluster.driver import DriverDiedError, DriverProcess, MergeError
from tests.support.cluster import Cluster, ray_nodes
from tests.support.namespace import enter_namespace
from tests.support.processes import kill
from tests.support.s3 import S3Server, s3_process

KINDS = ("worker", "node", "driver", "storage")
WORKERS = (2, 3, 4)
# Shorter than what a request is repeated for.
OUTAGE_S = (0.5, 5.0)
# A node that is lost comes back at once, later, or after the merge.
ABSENCE_S = (0.0, 3.0, float("inf"))
# Most merges meet one kill, some more.
KILLS = (1, 1, 1, 2, 3)
# Merges without a kill by which the instants of the kills are chosen.
_CALIBRATIONS = 2
# Merges beyond those in which every kill may come too late.
_TRIES = 6


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was killed and with what end.

    Attributes:
        merges: That ended, disturbed or not.
        submissions: Begun for them.
        made: Kills while a merge ran, by kind.
        survived: Those of merges that ended in the right bits.
        failures: What went wrong.
        seconds: In all.
    """

    merges: int = 0
    submissions: int = 0
    made: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    survived: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, kinds: list[str], trouble: str | None) -> None:
        """Count a merge that met these kills, and what went wrong with it, if anything."""
        self.merges += 1
        for kind in kinds:
            self.made[kind] += 1
            self.survived[kind] += trouble is None
        if trouble is not None:
            self.failures.append(trouble)

    def proves_nothing(self) -> bool:
        """Return whether nothing was killed yet and some more merges should be tried, on a slow machine."""
        return not any(self.made.values()) and self.merges < _CALIBRATIONS + _TRIES

    def table(self) -> str:
        """Return the counts for people."""
        rows = [f"{kind:<8} {self.made[kind]:>5} {self.survived[kind]:>9}" for kind in KINDS]
        total = f"{'all':<8} {sum(self.made.values()):>5} {sum(self.survived.values()):>9}"
        head = f"{'killed':<8} {'times':>5} {'survived':>9}"
        merges = f"{self.merges} merges of {self.submissions} submissions in {self.seconds / 60:.1f} min"
        return "\n".join([head, *rows, total, merges, *self.failures])


def soak(
    cluster: Cluster, s3: S3Server, bucket: Bucket, *, seconds: float, seed: int, tell: Callable[[str], object]
) -> Tally:
    """Merge and kill until the time is over, and return the counts.

    Args:
        cluster: All its worker nodes may be missing afterwards.
        s3: Runs afterwards.
        bucket: The models.
        seconds: After which no new merge is begun, if something was killed.
        seed: Of the choices; the instants depend on the machine, too.
        tell: Told of every merge.
    """
    chance = random.Random(seed)
    tally = Tally()
    driver = DriverProcess(cluster.user_environment)
    started_s = time.monotonic()
    typical_s = 0.0
    deck: list[str] = []
    try:
        while time.monotonic() < started_s + seconds or tally.proves_nothing():
            cluster.restore(wait=False)
            distances = chance.choice(["gram", "stream"])
            run = _Run(driver, bucket, distances, workers=chance.choice(WORKERS))
            if tally.merges >= _CALIBRATIONS:
                while len(deck) < max(KILLS):
                    deck += chance.sample(KINDS, len(KINDS))
                kinds = [deck.pop(0) for _ in range(chance.choice(KILLS))]
                _disturb(run, kinds, cluster, s3, chance, typical_s)
            run.thread.join()
            if "driver" in [kind for kind, _ in run.kills]:
                # It may have died when its merge had just ended.
                driver.kill()
            trouble = run.trouble()
            # The last one that was left alone; the very first also started the workers.
            typical_s = typical_s if run.kills else run.seconds
            tally.count([kind for kind, _ in run.kills], trouble)
            tally.submissions += run.submissions
            kills = ", ".join(f"{kind} at {at_s:.1f} s" for kind, at_s in run.kills) or "nothing"
            if run.missed:
                kills += f" ({', '.join(run.missed)}: none there)"
            tell(f"{distances}: {run.seconds:.1f} s, killed {kills}: {trouble or 'the right bits'}")
    finally:
        driver.kill()
        tally.seconds = time.monotonic() - started_s
    return tally


class _Run:
    """One merge, submitted as often as its driver dies."""

    def __init__(self, driver: DriverProcess, bucket: Bucket, distances: str, workers: int) -> None:
        self.driver = driver
        self.submissions = 0
        self.kills: list[tuple[str, float]] = []
        self.missed: list[str] = []
        self.seconds = 0.0
        self._bucket, self._distances, self._workers = bucket, distances, workers
        self._recipe, self._output = bucket.order(distances=distances)
        self._error: Exception | None = None
        self._began_s = time.monotonic()
        self.thread = threading.Thread(target=self._merge)
        self.thread.start()

    def kill_now(self, kind: str, action: Callable[[], bool]) -> None:
        """Kill, if the merge still runs."""
        at_s = time.monotonic() - self._began_s
        if self.thread.is_alive():
            # First, so that the merge knows why its driver dies.
            self.kills.append((kind, at_s))
            if not action():
                self.kills.pop()
                self.missed.append(kind)

    def trouble(self) -> str | None:
        """Return what is wrong with the end, or None."""
        if self._error is not None:
            return f"{type(self._error).__name__}: {self._error}"
        if bits(self._output) != self._bucket.undisturbed(self._distances):
            return f"other bits in {self._output}"
        if left := open_store(self._output).leftovers():
            return f"left in {self._output}: {left}"
        return None

    def _merge(self) -> None:
        try:
            while True:
                self.submissions += 1
                self.driver.merge(self._recipe, self._output, workers=self._workers)
                try:
                    self.driver.finish()
                    return
                except DriverDiedError:
                    if "driver" not in [kind for kind, _ in self.kills]:
                        raise
                    self.driver.kill()
        except (MergeError, DriverDiedError, TimeoutError) as error:
            self._error = error
            self.driver.kill()
        finally:
            self.seconds = time.monotonic() - self._began_s


def _disturb(
    run: _Run, kinds: list[str], cluster: Cluster, s3: S3Server, chance: random.Random, typical_s: float
) -> None:
    """Kill one after the other, when chance says."""
    for kind in kinds:
        run.thread.join(chance.uniform(0.0, typical_s))
        if kind == "worker":
            while run.thread.is_alive() and not cluster.actors():
                # They are being started.
                time.sleep(0.1)
            run.kill_now(kind, lambda: _kill_one(cluster.actors(), chance))
        elif kind == "driver":
            run.kill_now(kind, lambda: _kill_one(run.driver.processes(), chance))
        elif kind == "storage":
            outage_s = chance.uniform(*OUTAGE_S)
            run.kill_now(kind, lambda: s3.kill() is None)
            if not s3.runs:
                time.sleep(outage_s)
                s3.start()
        else:
            absence_s = chance.choice(ABSENCE_S)
            run.kill_now(kind, lambda: _lose_node(cluster, chance))
            if absence_s < float("inf"):
                run.thread.join(absence_s)
                cluster.restore(wait=False)


def _kill_one(pids: list[int], chance: random.Random) -> bool:
    if pids:
        kill(chance.choice(pids))
    return bool(pids)


def _lose_node(cluster: Cluster, chance: random.Random) -> bool:
    """Kill a worker's node, unless it is the last that works."""
    living = [number for number in (1, 2) if number in cluster.nodes and cluster.nodes[number].is_up()]
    if len(living) < 2:
        return False
    cluster.kill_node(chance.choice([number for number in living if cluster.actors(number)] or living))
    return True


def main() -> None:
    """Run the soak on a cluster of its own and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if reason := enter_namespace():
        sys.exit(reason)

    def tell(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as folder, s3_process(Path(folder) / "s3") as s3, ray_nodes() as cluster:
        bucket = make_bucket(Path(folder) / "family", s3.url)
        tally = soak(cluster, s3, bucket, seconds=60 * arguments.minutes, seed=arguments.seed, tell=tell)
    tell(tally.table())
    tell(json.dumps({"made": tally.made, "survived": tally.survived, "seed": arguments.seed}))
    sys.exit(0 if tally.made == tally.survived else 1)


if __name__ == "__main__":
    main()
