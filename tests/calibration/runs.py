"""Calibrations of tiny models, and their statistics as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.calibration.command import calibrate
from pipeline.calibration.settings import Settings
from pipeline.checkpoints.statistics import Statistics, open_statistics
from pipeline.checkpoints.statistics_facts import Kind
from pipeline.events import Listener, ignore
from tests.calibration.models import save_rows

PLENTY_BYTES = 1_000_000_000


def collect(
    model: Path,
    rows: Sequence[dict[str, Any]],
    output: Path,
    *,
    memory_bytes: int = PLENTY_BYTES,
    listener: Listener = ignore,
    document: dict[str, Any] | None = None,
    **settings: Any,
) -> Statistics:
    """Statistics of a model from rows; the process counts as empty, so that the memory decides by the model alone.

    `document` is filled with what the command would show.
    """
    data = save_rows(output.with_name(f"{output.name}.jsonl"), rows)
    chosen = Settings(**{"examples": len(rows), "batch": 3, **settings})
    places = str(model), str(data), str(output)
    done = calibrate(*places, chosen, memory_bytes=memory_bytes, process_bytes=0, listener=listener)
    if document is not None:
        document.update(done)
    return open_statistics(str(output))


def value(statistics: Statistics, kind: Kind, parameter: str) -> torch.Tensor:
    """One statistic in fp64, a matrix with both its triangles."""
    entry = statistics.find(kind, parameter)
    assert entry is not None, (kind, parameter)
    raw = statistics.store.read(entry.file, entry.start, entry.stop)
    stored = torch.from_numpy(np.frombuffer(raw, dtype="<f4").astype(np.float64))
    if kind == "diagonal":
        return stored.reshape(entry.shape)
    full = torch.zeros(entry.shape, dtype=torch.float64)
    rows, columns = torch.triu_indices(*entry.shape)
    full[rows, columns] = stored
    full[columns, rows] = stored
    return full


def raw_values(statistics: Statistics) -> dict[str, bytes]:
    """The stored bytes of every statistic."""
    return {
        name: statistics.store.read(entry.file, entry.start, entry.stop) for name, entry in statistics.entries.items()
    }


def assert_close(found: torch.Tensor, wanted: torch.Tensor, relative: float = 2e-5) -> None:
    """Compare as matrices: the error against the largest element."""
    assert found.shape == wanted.shape
    # Some gradients are zero but for rounding: what a softmax does not see.
    assert float((found - wanted).abs().max()) <= relative * float(wanted.abs().max()) + 1e-12
