"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Nothing here may look for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


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
