"""Combinations of low-rank updates, dense and factored, against the kernels and NumPy on the updates in full."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.numerics import torch_kernels
from pipeline.numerics.kernels import Combined
from pipeline.numerics.low_rank import factors, low_rank_work_bytes, merged_factors_bytes, sizes, truncated_rank
from pipeline.numerics.low_rank.distances import distances_to, pairwise_low_rank
from pipeline.numerics.low_rank.factors import LowRank, dense_rows
from pipeline.numerics.low_rank.output import LowRankCombination, measured_factors, merged_factors
from pipeline.numerics.torch_dtypes import round_once
from tests.numerics.low_rank_cases import DTYPES, assert_close, dense, dense_squares, families, family, update

pytestmark = pytest.mark.usefixtures("one_thread")


def base_of(rows: int, columns: int, dtype: torch.dtype, seed: int = 99) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows * columns, generator=generator, dtype=torch.float64).to(dtype)


def normalised(raw: Sequence[float]) -> list[float]:
    return [value / math.fsum(raw) for value in raw]


def shape_of(updates: Sequence[LowRank | None]) -> tuple[int, int]:
    first = next(update for update in updates if update is not None)
    return first.left_MR.shape[0], first.right_RK.shape[1]


def check_panel(
    updates: Sequence[LowRank | None], weights: Sequence[float], base_E: torch.Tensor, dtype: torch.dtype
) -> Combined:
    """The whole matrix as one panel, against the kernel on points in full."""
    rows, columns = shape_of(updates)
    found = LowRankCombination(updates, weights).panel(base_E, slice(0, rows), dtype)
    points = [base_E.double() + torch.from_numpy(full).view(-1) for full in dense(updates, rows, columns)]
    base = base_E.double()
    total = math.fsum(weights)
    exact = (1.0 if abs(total - 1) < 1e-9 else total) * base
    exact = exact + sum(weight * (point - base) for weight, point in zip(weights, points, strict=True))
    size = max(1.0, float(exact.abs().max()), *(float(point.abs().max()) for point in points))
    assert found.values_E.dtype == dtype
    assert found.values_E.shape == base_E.shape
    digits = {torch.float64: 1e-14, torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(found.values_E.double(), exact, rtol=digits, atol=1e-14 * size)
    written = found.values_E.double()
    wanted = np.array([float((written - point).square().sum()) for point in points])
    slack = (3e-15 * size) ** 2 * base.numel() + 1e-15 * size * np.sqrt(wanted)
    assert bool((np.abs(found.squared_distances_P - wanted) <= 1e-11 * wanted + slack).all())
    rounding = float((written - exact).square().sum())
    assert found.squared_rounding == pytest.approx(rounding, rel=1e-5, abs=base.numel() * (1e-14 * size) ** 2)
    return found


@pytest.mark.parametrize("output", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_combination_of_every_type(dtype: torch.dtype, output: torch.dtype) -> None:
    updates = family(1, 30, 20, [4, 8, None, 1, 25], dtype)
    check_panel(updates, normalised([math.sqrt(n) for n in (2, 3, 5, 7, 11)]), base_of(30, 20, dtype), output)


@pytest.mark.parametrize("weights", [(0.5, 0.6, 0.7), (2.0, -3.0, 0.25), (1.0, -1.0, 0.0), (0.0, 0.0, 0.0)])
def test_weights_that_do_not_sum_to_one_are_a_sum_and_no_mean(weights: tuple[float, ...]) -> None:
    updates = family(2, 12, 9, [3, 2, None])
    check_panel(updates, weights, base_of(12, 9, torch.float64), torch.float64)


@pytest.mark.parametrize("weight", [1 / 3, 0.1])
def test_a_combination_agrees_with_the_kernel_on_the_points(weight: float) -> None:
    updates = family(3, 40, 30, [5, 6, 7, None], torch.float32)
    base_E = base_of(40, 30, torch.float32)
    weights = [weight, weight, weight, 1 - 3 * weight]
    found = LowRankCombination(updates, weights).panel(base_E, slice(0, 40), torch.float32)
    points = [base_E.double() + torch.from_numpy(full).view(-1) for full in dense(updates, 40, 30)]
    wanted = torch_kernels.combine(points, weights, torch.float32)
    assert torch.equal(found.values_E, wanted.values_E)
    assert_close(found.squared_distances_P, wanted.squared_distances_P)
    assert found.squared_rounding == pytest.approx(wanted.squared_rounding, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(families(), st.data())
def test_a_combination_of_any_family(updates: list[LowRank | None], data: st.DataObject) -> None:
    rows, columns = shape_of(updates)
    weights = normalised([data.draw(st.floats(0.01, 1.0)) for _ in updates])
    check_panel(updates, weights, base_of(rows, columns, torch.float32), data.draw(st.sampled_from(DTYPES)))


def test_panels_are_rows_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = family(4, 37, 21, [5, None, 30, 8], torch.bfloat16)
    weights = normalised([1, 2, 3, 4])
    base_E = base_of(37, 21, torch.bfloat16)
    whole = check_panel(updates, weights, base_E, torch.float32)
    # Small panels, so that every loop goes round.
    monkeypatch.setattr(factors, "PANEL_RANKS", 7)
    monkeypatch.setattr(sizes, "_PART_ROWS", 3)
    monkeypatch.setattr(sizes, "_PART_ELEMENTS", 70)
    monkeypatch.setattr(factors.spans, "__defaults__", (8,))
    check_panel(updates, weights, base_E, torch.float32)
    combination = LowRankCombination(updates, weights)
    parts = [
        combination.panel(base_E[rows.start * 21 : rows.stop * 21], rows, torch.float32)
        for rows in (slice(0, 1), slice(1, 20), slice(20, 37))
    ]
    torch.testing.assert_close(torch.cat([part.values_E for part in parts]), whole.values_E)
    # The order of additions decides ties of the output type, here and there.
    assert_close(sum(part.squared_distances_P for part in parts), whole.squared_distances_P, 1e-9)
    assert sum(part.squared_rounding for part in parts) == pytest.approx(whole.squared_rounding, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_is_kept_bit_for_bit_where_nothing_is_added(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(10, 3, generator=generator)
    left[4:7] = 0.0
    updates = [LowRank(left_MR=left, right_RK=torch.randn(3, 8, generator=generator), scale=2.0), None]
    base_E = base_of(10, 8, dtype)
    base_E[32:36] = torch.tensor([0.0, -0.0, -0.0, 1.0]).to(dtype)
    for weights, rows in (((0.3, 0.7), slice(32, 56)), ((0.0, 1.0), slice(0, 80))):
        found = LowRankCombination(updates, weights).panel(base_E, slice(0, 10), dtype)
        assert torch.equal(found.values_E[rows].view(torch.uint8), base_E[rows].view(torch.uint8))
    assert found.squared_distances_P[1] == 0.0
    assert found.squared_rounding == 0.0


@pytest.mark.parametrize("output", DTYPES)
def test_at_a_point_the_distance_is_that_of_rounding(output: torch.dtype) -> None:
    """‖moved‖² − 2⟨moved, ΔW⟩ + ‖ΔW‖² alone would be noise."""
    updates = family(6, 40, 30, [5, 6, None])
    base_E = base_of(40, 30, torch.float32)
    found = check_panel(updates, (0.0, 1.0, 0.0), base_E, output)
    point = base_E.double() + dense_rows(updates[1], 0, 40).view(-1)
    assert torch.equal(found.values_E, round_once(point, output))
    wanted = float((found.values_E.double() - point).square().sum())
    assert found.squared_distances_P[1] == pytest.approx(wanted, rel=1e-7, abs=1e-26)
    if output != torch.float64:
        assert found.squared_distances_P[1] == pytest.approx(found.squared_rounding, rel=1e-7)


def test_an_update_whose_own_columns_cancel_is_measured_from_its_rows() -> None:
    generator = torch.Generator().manual_seed(7)
    one, two = update(generator, 20, 15, 1), update(generator, 20, 15, 1)
    left = torch.cat([one.left_MR, -one.left_MR], dim=1)
    right = torch.cat([one.right_RK, one.right_RK + 1e-5 * two.right_RK])
    small = LowRank(left_MR=left, right_RK=right, scale=1.0)
    # Along the cancelling update alone nothing else hides its own size.
    found = LowRankCombination([small, None], (0.5, 0.5)).panel(
        torch.zeros(300, dtype=torch.float64), slice(0, 20), torch.float64
    )
    wanted = float(dense_rows(small, 0, 20).square().sum()) / 4
    assert found.squared_distances_P == pytest.approx([wanted, wanted], rel=1e-8)


def test_a_value_beyond_the_output_type_is_seen_in_the_rounding() -> None:
    updates = [LowRank(left_MR=torch.full((2, 1), 1e5), right_RK=torch.ones(1, 2), scale=1.0), None]
    found = LowRankCombination(updates, (1.0, 0.0)).panel(torch.zeros(4), slice(0, 2), torch.float16)
    assert found.values_E.tolist() == [math.inf] * 4
    assert not math.isfinite(found.squared_rounding)


def test_concurrent_panels_have_the_same_bits() -> None:
    updates = family(8, 64, 50, [16] * 5, torch.bfloat16)
    base_E = base_of(64, 50, torch.bfloat16)
    combination = LowRankCombination(updates, [0.2] * 5)

    def work(index: int) -> tuple[bytes, bytes]:
        begin = index % 4 * 16
        result = combination.panel(base_E[begin * 50 : (begin + 16) * 50], slice(begin, begin + 16), torch.float32)
        return result.values_E.numpy().tobytes(), result.squared_distances_P.tobytes()

    alone = [work(index) for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(16))) == alone * 4


@settings(max_examples=50, deadline=None)
@given(families())
def test_rows_in_full(updates: list[LowRank | None]) -> None:
    rows, columns = shape_of(updates)
    for one, full in zip(updates, dense(updates, rows, columns), strict=True):
        if one is not None:
            found = dense_rows(one, rows // 3, rows)
            assert found.dtype == torch.float64
            np.testing.assert_allclose(found.numpy(), full[rows // 3 :], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_factors_are_the_updates_side_by_side(dtype: torch.dtype) -> None:
    updates = family(9, 30, 20, [4, None, 8, 3], dtype)
    weights = (0.25, 0.5, 0.25, 0.0)
    merged = merged_factors(updates, weights, rank=None)
    assert merged.left_MR.shape == (30, 15)
    assert merged.singular_values is None
    assert merged.discarded_square == 0.0
    assert merged.left_MR.dtype == merged.right_RK.dtype == torch.float64
    present = [one for one in updates if one is not None]
    # The right factors are copies, those of a weight of zero too.
    assert torch.equal(merged.right_RK.to(dtype), torch.cat([one.right_RK for one in present]))
    assert not merged.left_MR[:, 12:].any()
    wanted = np.tensordot(weights, dense(updates, 30, 20), axes=1)
    np.testing.assert_allclose((merged.left_MR @ merged.right_RK).numpy(), wanted, rtol=0, atol=1e-13)


def test_a_written_combination_is_measured_where_the_weights_say() -> None:
    updates = family(10, 30, 20, [4, 6, None, 8], torch.bfloat16)
    for weights in ((0.25, 0.25, 0.25, 0.25), (0.0, 1.0, 0.0, 0.0)):
        merged = merged_factors(updates, weights, rank=None)
        written = LowRank(left_MR=merged.left_MR, right_RK=merged.right_RK.bfloat16(), scale=1.0)
        table = dense_squares([*updates, written], 30, 20)
        scale = table.max()
        assert bool(
            (np.abs(distances_to(written, updates) - table[-1, :-1]) <= 1e-11 * table[-1, :-1] + 1e-28 * scale).all()
        )


@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [
        (40, 30, [4, 5, None, 3]),
        (40, 9, [4, 5, 6]),
        (9, 40, [4, 5, 6]),
        (10, 8, [20, 15]),
        (25, 1, [1, 1]),
        (6, 6, [2]),
    ],
)
@pytest.mark.parametrize("rank", [1, 2, 5, 7, 100])
def test_a_truncated_combination_is_the_nearest_of_its_rank(
    rows: int, columns: int, ranks: list[int | None], rank: int
) -> None:
    updates = family(rows + rank, rows, columns, ranks)
    weights = normalised([1.0 + index for index in range(len(ranks))])
    merged = merged_factors(updates, weights, rank=rank)
    kept = truncated_rank(rows, columns, [r for r in ranks if r is not None], rank)
    assert merged.left_MR.shape == (rows, kept)
    assert merged.right_RK.shape == (kept, columns)
    full = np.tensordot(weights, dense(updates, rows, columns), axes=1)
    values = np.linalg.svd(full, compute_uv=False)
    assert merged.singular_values == pytest.approx(values[:kept], rel=1e-12, abs=1e-13 * values[0])
    assert merged.discarded_square == pytest.approx((values[kept:] ** 2).sum(), rel=1e-11, abs=1e-26)
    assert merged.square == pytest.approx((values**2).sum(), rel=1e-11)
    error = np.linalg.norm(full - (merged.left_MR @ merged.right_RK).numpy())
    assert error == pytest.approx(np.linalg.norm(values[kept:]), rel=1e-11, abs=1e-13 * values[0])
    # √σ on both sides, and the larger entries of the left vectors positive.
    for gram in (merged.left_MR.T @ merged.left_MR, merged.right_RK @ merged.right_RK.T):
        np.testing.assert_allclose(gram.numpy(), np.diag(merged.singular_values), atol=1e-12 * values[0])
    assert bool((merged.left_MR.max(dim=0).values >= -merged.left_MR.min(dim=0).values).all())
    again = merged_factors(updates, weights, rank=rank)
    assert torch.equal(merged.left_MR, again.left_MR)
    assert torch.equal(merged.right_RK, again.right_RK)


def test_a_combination_of_nothing_truncates_to_zero_factors() -> None:
    updates = family(11, 8, 7, [2, 3])
    merged = merged_factors(updates, (0.0, 0.0), rank=4)
    assert merged.left_MR.shape == (8, 4)
    assert not (merged.left_MR @ merged.right_RK).any()
    assert merged.singular_values == (0.0,) * 4
    assert merged.discarded_square == 0.0


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ValueError, match="no shape"):
        LowRankCombination([None, None], (0.5, 0.5))
    broken = LowRank(left_MR=torch.full((3, 1), math.nan), right_RK=torch.ones(1, 3), scale=1.0)
    with pytest.raises(ValueError, match="not finite"):
        merged_factors([broken], (1.0,), rank=1)


class _Live(TorchDispatchMode):
    """Sums the bytes of the tensors that operations have made and that are still alive, and keeps the highest sum."""

    def __init__(self, given: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._given = {value.untyped_storage()._cdata for value in given}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self._given:
                storage = value.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return result


def live_bytes(work: Callable[[], object], given: Sequence[torch.Tensor]) -> int:
    with _Live(given) as live:
        work()
    assert live.peak > 0
    return live.peak


@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [
        (600, 500, [16] * 20),
        (3000, 40, [8] * 4),
        (40, 3000, [8] * 4),
        (5000, 700, [2, 3]),
        (700, 900, [8] * 90),
        (60, 50, [100, 30]),
        (4000, 1, [1] * 3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_call_takes_more_memory_than_it_says(rows: int, columns: int, ranks: list[int], dtype: torch.dtype) -> None:
    updates = [one for one in family(12, rows, columns, ranks, dtype) if one is not None]
    # One is there twice, so that a pair is taken on its own and a panel measured from the rows.
    updates[-1] = LowRank(left_MR=updates[0].left_MR * 1, right_RK=updates[0].right_RK * 1, scale=updates[0].scale)
    weights = [1.0, *[0.0] * (len(ranks) - 1)]
    base_E = base_of(rows, columns, torch.bfloat16)
    given = [base_E, *(one.left_MR for one in updates), *(one.right_RK for one in updates)]
    limit = low_rank_work_bytes(rows, columns, [one.rank for one in updates])
    assert live_bytes(lambda: pairwise_low_rank(updates), given) <= limit
    values_bytes = 4 * rows * columns

    def combined() -> None:
        LowRankCombination(updates, weights).panel(base_E, slice(0, rows), torch.float32)

    assert live_bytes(combined, given) <= limit + values_bytes
    for rank in (None, 4):
        limit = merged_factors_bytes(rows, columns, [one.rank for one in updates], rank)

        def made(rank: int | None = rank) -> None:
            merged = merged_factors(updates, weights, rank=rank)
            distances_to(LowRank(left_MR=merged.left_MR, right_RK=merged.right_RK, scale=1.0), updates)

        assert live_bytes(made, given) <= limit


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vertex", [False, True])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_stored_factors_are_measured_as_any_update_is(stored: torch.dtype, vertex: bool, source: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    updates: list[LowRank | None] = [
        LowRank(
            left_MR=torch.randn(40, rank, generator=generator).to(source),
            right_RK=torch.randn(rank, 30, generator=generator).to(source),
            scale=scale,
        )
        for rank, scale in ((3, 2.0), (5, 0.5), (2, 1.0))
    ]
    updates.insert(1, None)
    factors = (1.0, 0.0, 0.0, 0.0) if vertex else (0.5, 0.125, 0.25, 0.125)
    exact = merged_factors(updates, factors, rank=None)
    written = LowRank(left_MR=exact.left_MR.to(stored), right_RK=exact.right_RK.to(stored), scale=1.0)
    found = measured_factors(written, exact, updates)
    values = (written.left_MR.double() @ written.right_RK.double()).numpy()
    wanted = [float(((values - point) ** 2).sum()) for point in dense(updates, 40, 30)]
    assert found.squared_distances_P == pytest.approx(wanted, rel=1e-9, abs=1e-18)
    target = (exact.left_MR @ exact.right_RK).numpy()
    assert found.squared_rounding == pytest.approx(float(((values - target) ** 2).sum()), rel=1e-9, abs=1e-24)
