"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.support.namespace import enter_namespace
from tests.support.s3 import S3Server, s3_process

# Nothing here may look for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

_NOT_ISOLATED = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Take the whole run off the network, before anything of it opens a socket: its servers are nobody else's."""
    # A shell starts what runs in the background with both ignored, and every process of the tests would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.stash[_NOT_ISOLATED] = enter_namespace()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that share a Ray first: of what several processes may take, nothing is as long."""
    items.sort(key=lambda item: not _is_on_ray(item.path))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Keep a file's tests in one process, and all that share a Ray in one."""
    return _ByFile(config, log)


class _ByFile(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if _is_on_ray(self.config.rootpath / file) else file


@cache
def _is_on_ray(file: Path) -> bool:
    """Return whether a file's tests need a Ray that is started once."""
    return file.parent.name == "cluster" or "ray_cluster" in file.read_text()


def pytest_report_header(config: pytest.Config) -> str:
    """Say where the tests' servers can be reached from."""
    return f"network: {config.stash[_NOT_ISOLATED] or 'loopback only, in a namespace of its own'}"


@pytest.fixture(scope="session")
def isolated(pytestconfig: pytest.Config) -> None:
    """Skip what needs several addresses of the loopback for itself where the run could not be taken off the network."""
    if reason := pytestconfig.stash[_NOT_ISOLATED]:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for all tests that need one; whoever kills it starts it again."""
    with s3_process(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_url(s3: S3Server) -> str:
    """The URL of a bucket on the real S3 server."""
    return s3.url


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One real Ray for all tests that need it: start-up costs more than any of them."""
    import ray

    # A short path of its own: sockets have a limit of 107 characters, and other runs must not meet this one.
    folder = Path("/tmp") / f"geomerge-ray-{os.getpid()}"
    context = ray.init(
        num_cpus=5, include_dashboard=False, log_to_driver=False, logging_level="error", _temp_dir=str(folder)
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
