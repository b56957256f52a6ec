"""Fixtures of the calibration's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tests.calibration import models


@pytest.fixture(autouse=True, scope="package")
def quiet_and_single() -> Iterator[None]:
    """Tiny products are slower on two threads than on one, by far when others want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="package")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="package")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.t5(tmp_path_factory.mktemp("models") / "t5")
