"""What a worker finds out about its process: its device, and how many threads torch's products take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.engine import process
from pipeline.engine.process import load_torch, pick_device, single_threaded_products
from pipeline.errors import PipelineError


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def without_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(process, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_workers_share_the_devices_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, 2)
    for name in ("auto", "cuda"):
        assert [pick_device(name, rank) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert pick_device("cpu", 0) == "cpu"


def test_a_driver_alone_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_has_driver", lambda: True)
    without_device(monkeypatch)
    assert pick_device("auto", 0) == "cpu"
    with pytest.raises(PipelineError, match="no CUDA device"):
        pick_device("cuda", 0)


def test_without_a_driver_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_NVIDIA_DRIVER", "libnobody-has-this.so.1")
    monkeypatch.setattr(process, "_AMD_DRIVER", Path("/nonexistent"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert pick_device("auto", 0) == "cpu"


@pytest.mark.usefixtures("two_threads")
def test_products_are_single_threaded_until_the_last_user_leaves() -> None:
    with single_threaded_products():
        assert torch.get_num_threads() == 1
        with single_threaded_products():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    load_torch()
    assert torch.get_num_threads() == 2


def test_torch_may_come_later() -> None:
    program = """
import sys
from pipeline.engine.process import load_torch, single_threaded_products
with single_threaded_products():
    assert "torch" not in sys.modules
    load_torch()
    print(sys.modules["torch"].get_num_threads())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True)
    assert ran.stdout.split() == ["1"]
