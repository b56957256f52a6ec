"""The soak for a short time; docs/reliability.md has the figures of a long one."""

from __future__ import annotations

from tests.cluster.bucket import Bucket
from tests.cluster.driver import DriverProcess
from tests.cluster.soak import soak
from tests.support.cluster import Cluster
from tests.support.s3 import S3Server


def test_every_kill_is_survived(cluster: Cluster, driver: DriverProcess, s3: S3Server, bucket: Bucket) -> None:
    # Its workers would stand in the way of those of the soak's own.
    driver.kill()
    told: list[str] = []
    tally = soak(cluster, s3, bucket, seconds=30, seed=7, tell=told.append)
    assert not tally.failures, told
    assert tally.survived == tally.made
    assert sum(tally.made.values()) >= 1, told
