"""Low-rank updates to test with, and what they are in full, by dense float64 and by fifty digits."""

from __future__ import annotations

from collections.abc import Sequence

import mpmath
import numpy as np
import torch
from hypothesis import strategies as st

from pipeline.numerics.low_rank.factors import LowRank

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def update(
    generator: torch.Generator,
    rows: int,
    columns: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
) -> LowRank:
    """Gaussian factors."""
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return LowRank(left_MR=left.to(dtype), right_RK=right.to(dtype), scale=scale)


def family(
    seed: int, rows: int, columns: int, ranks: Sequence[int | None], dtype: torch.dtype = torch.float64
) -> list[LowRank | None]:
    """Updates of several ranks and scales; None is the zero update."""
    generator = torch.Generator().manual_seed(seed)
    scales = (2.0, 0.5, -1.3, 1.0, 0.07)
    return [
        None if rank is None else update(generator, rows, columns, rank, dtype=dtype, scale=scales[index % len(scales)])
        for index, rank in enumerate(ranks)
    ]


@st.composite
def families(draw: st.DrawFn) -> list[LowRank | None]:
    """Small families of any shapes, ranks, types, scales and places of zero; one update at least."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    count = draw(st.integers(1, 6))
    present = draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))
    return [
        update(
            generator,
            rows,
            columns,
            draw(st.integers(1, 14)),
            dtype=draw(st.sampled_from(DTYPES)),
            scale=draw(st.floats(-4, 4).filter(lambda scale: abs(scale) > 1e-3)),
        )
        if there
        else None
        for there in present
    ]


def dense(updates: Sequence[LowRank | None], rows: int, columns: int) -> np.ndarray:
    """ΔW of every update in float64, (P, M, K)."""
    return np.array(
        [
            np.zeros((rows, columns))
            if update is None
            else update.scale * (update.left_MR.double().numpy() @ update.right_RK.double().numpy())
            for update in updates
        ]
    )


def dense_squares(updates: Sequence[LowRank | None], rows: int, columns: int) -> np.ndarray:
    """All squared distances by dense float64."""
    full = dense(updates, rows, columns)
    return np.array([[((a - b) ** 2).sum() for b in full] for a in full])


def exact_square(first: LowRank, second: LowRank) -> float:
    """One squared distance by fifty digits."""
    with mpmath.workdps(50):
        one, two = (
            mpmath.mpf(update.scale)
            * (mpmath.matrix(update.left_MR.tolist()) * mpmath.matrix(update.right_RK.tolist()))
            for update in (first, second)
        )
        return float(sum(value**2 for value in one - two))


def assert_close(found: np.ndarray, wanted: np.ndarray, relative: float = 1e-11) -> None:
    assert found.dtype == np.float64
    assert found.shape == wanted.shape
    assert bool((np.abs(found - wanted) <= relative * np.abs(wanted)).all()), (found, wanted)
