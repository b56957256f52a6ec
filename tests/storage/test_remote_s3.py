"""The contract on a real S3 server."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.storage import Store, open_store
from tests.support.s3 import prefix

from .contract import MEGABYTE, ExclusiveContract, StoreContract


class TestS3(StoreContract, ExclusiveContract):
    """What every store must do, on a real server."""

    @pytest.fixture
    def make_store(self, s3_url: str) -> Callable[[], Store]:
        url = prefix(s3_url)
        return lambda: open_store(url)

    def test_objects_of_several_parts(self, store: Store) -> None:
        with store.open_writer("large") as writer:
            for _ in range(70):
                writer.write(MEGABYTE)
            assert not store.exists("large")
            writer.commit()
        assert store.stat("large").size_bytes == 70 << 20
        assert store.read("large", (33 << 20) - 3, (33 << 20) + 3) == MEGABYTE[-3:] + MEGABYTE[:3]
        abandoned = store.open_writer("gone")
        for _ in range(40):
            abandoned.write(MEGABYTE)
        abandoned.abort()
        assert store.list() == ("large",)
