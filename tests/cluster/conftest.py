"""One cluster, one family in the bucket and one gate before it, for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.bucket import Bucket, make_bucket
from tests.cluster.driver import DriverProcess
from tests.cluster.gate import Gate
from tests.support.cluster import Cluster, ray_nodes
from tests.support.s3 import S3Server


@pytest.fixture(scope="package")
def started(isolated: None, s3: S3Server) -> Iterator[Cluster]:
    """The cluster, in the environment of the S3 server."""
    with ray_nodes() as cluster:
        yield cluster


@pytest.fixture
def cluster(started: Cluster) -> Iterator[Cluster]:
    """The cluster with all its nodes, also for the next test."""
    started.restore()
    yield started
    started.restore(wait=False)


@pytest.fixture(scope="package")
def bucket(isolated: None, s3_url: str, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    return make_bucket(tmp_path_factory.mktemp("family"), s3_url)


@pytest.fixture(scope="package")
def gate(isolated: None, s3: S3Server) -> Iterator[Gate]:
    gate = Gate(s3.endpoint)
    yield gate
    gate.close()


@pytest.fixture(scope="package")
def kept_driver(started: Cluster) -> Iterator[DriverProcess]:
    """A driver that stays with its workers until a test kills it: they take seconds to start."""
    driver = DriverProcess(started.user_environment)
    yield driver
    driver.kill()


@pytest.fixture
def driver(cluster: Cluster, kept_driver: DriverProcess, request: pytest.FixtureRequest) -> Iterator[DriverProcess]:
    """A driver that is in no merge; after a failure another one."""
    failures = request.session.testsfailed
    yield kept_driver
    if request.session.testsfailed > failures:
        kept_driver.kill()
