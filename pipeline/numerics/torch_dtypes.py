"""Element types in torch: its names for ours, and its casts, made to round once.

Owns what a tensor's dtype is called and how it is reached from float64. Importing this module imports torch.
"""

from __future__ import annotations

import numpy as np
import torch

_FLOATS: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


# Elements that are rounded at a time.
_BLOCK = 1 << 14


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a float header name such as "BF16".

    Raises:
        KeyError: The name is no float dtype of ours.
    """
    return _FLOATS[name]


def tensor_over(array: np.ndarray) -> torch.Tensor:
    """Return a tensor over an array's memory, or over a copy where that may not be written, as of files in place."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def round_once(values_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast float64 values to `dtype` with a single rounding to nearest even.

    Torch casts float64 to the 16-bit types by way of float32, which rounds twice and is wrong whenever the first
    rounding lands on a tie of the second. Rounding to odd in the first step removes that: the sticky last bit keeps the
    second step on the right side.

    Args:
        values_E: float64, of any shape.
        dtype: The wanted float type.

    Returns:
        The same shape, `dtype`.

    Source: Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
        to odd", theorem 3.
    """
    if dtype == torch.float64:
        return values_E
    if dtype == torch.float32:
        return values_E.to(torch.float32)
    rounded_E = torch.empty_like(values_E, dtype=dtype, memory_format=torch.contiguous_format)
    flat_E, source_E = rounded_E.view(-1), values_E.reshape(-1)
    # A dozen temporaries of a block stay in a core's cache.
    for start in range(0, source_E.numel(), _BLOCK):
        flat_E[start : start + _BLOCK] = _rounded_by_odd(source_E[start : start + _BLOCK], dtype)
    return rounded_E


def _rounded_by_odd(values_E: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return values in a type narrower than float32, through float32 rounded to odd."""
    single_E = values_E.to(torch.float32)
    back_E = single_E.to(torch.float64)
    inexact_E = back_E != values_E
    if not bool(inexact_E.any()):
        return single_E.to(dtype)
    bits_E = single_E.view(torch.int32)
    # Sign and magnitude: one less in the bits is one step towards zero, whatever the sign.
    towards_zero_E = bits_E - (back_E.abs() > values_E.abs()).to(torch.int32)
    odd_E = torch.where(inexact_E & values_E.isfinite(), towards_zero_E | 1, bits_E)
    return odd_E.view(torch.float32).to(dtype)
