"""The same words on every device: what the engine asks the kernels for, beside the arithmetic itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.numerics.devices import kernels_of
from pipeline.numerics.torch_kernels import TorchKernels
from tests.numerics.arrays import NAMES, ON, bits_of
from tests.numerics.low_rank_cases import update

pytestmark = pytest.mark.usefixtures("one_thread")


def test_any_other_device_is_torchs() -> None:
    assert not isinstance(kernels_of("cpu"), TorchKernels)
    assert isinstance(kernels_of("meta"), TorchKernels)


def test_bytes_are_taken_as_they_are() -> None:
    kernels = kernels_of("cpu")
    raw = np.arange(16, dtype=np.uint8)
    values = kernels.values(raw, "BF16")
    assert np.shares_memory(values, raw)
    assert bytes(kernels.stored(values)) == raw.tobytes()
    assert kernels.cast(values, "BF16") is values


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("rows", [slice(0, 3), slice(2, 40), slice(5, 5)])
def test_sums_with_an_update_have_the_same_bits(dtype: torch.dtype, rows: slice) -> None:
    generator = torch.Generator().manual_seed(4)
    factors = update(generator, 40, 600, 3, dtype=torch.bfloat16, scale=0.7)
    base = torch.randn((rows.stop - rows.start) * 600, generator=generator, dtype=torch.float64).to(dtype)
    found = {
        name: bytes(on.kernels.stored(on.kernels.updated(on.points([base])[0], factors, rows)))
        for name, on in ON.items()
    }
    assert found["arrays"] == found["torch"]
    dense = (factors.left_MR[rows].double() @ factors.right_RK.double()).flatten() * 0.7
    wanted = dense + base.double()
    np.testing.assert_allclose(np.frombuffer(found["arrays"]), wanted.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", NAMES)
def test_casts_have_the_same_bits(dtype: torch.dtype) -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    for name in ("BF16", "F16", "F32", "F64"):
        bits = {key: bytes(on.kernels.stored(on.kernels.cast(on.points([values])[0], name))) for key, on in ON.items()}
        assert bits["arrays"] == bits["torch"]
        if name == NAMES[dtype]:
            assert bits["arrays"] == bits_of(values).tobytes()
