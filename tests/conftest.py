"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.s3 import s3_server

# Nothing here may look for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a bucket on a real S3 server, for all tests that need one."""
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


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
