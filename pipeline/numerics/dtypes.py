"""Element types: the names in a safetensors header, the names in a recipe, and NumPy's dtypes.

Owns the three-way table, promotion and casts; knows nothing of files. The float types that NumPy lacks are ml_dtypes';
their bits are taken apart here, because its casts hold the interpreter's lock. Legend: E elements.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

# header name → (NumPy dtype, recipe / config.json name)
_FLOATS: dict[str, tuple[np.dtype[Any], str]] = {
    "F64": (np.dtype(np.float64), "float64"),
    "F32": (np.dtype(np.float32), "float32"),
    "BF16": (np.dtype(ml_dtypes.bfloat16), "bfloat16"),
    "F16": (np.dtype(np.float16), "float16"),
    "F8_E4M3": (np.dtype(ml_dtypes.float8_e4m3fn), "float8_e4m3fn"),
    "F8_E5M2": (np.dtype(ml_dtypes.float8_e5m2), "float8_e5m2"),
}
_HEADER_NAMES = {word: name for name, (_, word) in _FLOATS.items()}
_EIGHT_BIT = frozenset({"F8_E4M3", "F8_E5M2"})

BFLOAT16 = _FLOATS["BF16"][0]
# What NumPy's own casts do not know.
_FOREIGN = frozenset(dtype for name, (dtype, _) in _FLOATS.items() if name in {"BF16", *_EIGHT_BIT})
# Elements that are converted at a time: a few temporaries of a block stay in a core's cache.
_BLOCK = 1 << 14


def is_mergeable(name: str) -> bool:
    """Return whether tensors of this header dtype are merged (floats that can be read here) rather than copied."""
    return name in _FLOATS


def array_dtype(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype for a float header name such as "BF16".

    Raises:
        KeyError: The name is no float dtype of ours.
    """
    return _FLOATS[name][0]


def config_name(name: str) -> str:
    """Return the word that recipes and config.json use for a float header name: "BF16" → "bfloat16"."""
    return _FLOATS[name][1]


def header_name(word: str) -> str:
    """Return the header name for a recipe's word: "bfloat16" → "BF16"."""
    return _HEADER_NAMES[word]


def promote(names: tuple[str, ...]) -> str:
    """Return the header dtype that holds all of `names` exactly, as torch promotes them: BF16 and F16 give F32.

    Eight-bit floats are read, never promoted among themselves: they count as BF16, which holds every one exactly.
    """
    distinct = {"BF16" if name in _EIGHT_BIT else name for name in names}
    if "F64" in distinct:
        return "F64"
    return distinct.pop() if len(distinct) == 1 else "F32"


def widen(values_E: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Return values in float32 or float64; those that are of it already are not copied.

    Args:
        values_E: Any float dtype of ours. A float64 is rounded to float32, any other value is kept.
        dtype: float32 or float64.
    """
    if values_E.dtype == dtype:
        return values_E
    # A value beyond float32 is infinite then, which is for the caller to find, and so is a NaN of any kind.
    with np.errstate(over="ignore", invalid="ignore"):
        if values_E.dtype not in _FOREIGN:
            return values_E.astype(dtype)
        wide_E = np.empty(values_E.shape, dtype=dtype)
        for start in range(0, len(values_E), _BLOCK):
            wide_E[start : start + _BLOCK] = _single(values_E[start : start + _BLOCK])
        return wide_E


def cast(values_E: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Return values in another float dtype; a float64 reaches the 16-bit types by way of float32, as it does in torch.

    Args:
        values_E: Any float dtype of ours; it is not copied if it is the wanted one.
        dtype: Any but the eight-bit ones.
    """
    if values_E.dtype == dtype:
        return values_E
    if dtype.itemsize > 2:
        return widen(values_E, dtype)
    cast_E = np.empty(values_E.shape, dtype=dtype)
    for start in range(0, len(values_E), _BLOCK):
        _narrow(widen(values_E[start : start + _BLOCK], np.dtype(np.float32)), cast_E[start : start + _BLOCK])
    return cast_E


def finite(values_E: np.ndarray) -> np.ndarray:
    """Return a mask of the elements that are neither NaN nor infinite."""
    if values_E.dtype == BFLOAT16:
        return np.asarray(values_E.view(np.uint16) & 0x7F80 != 0x7F80)
    if values_E.dtype.itemsize == 1:
        return np.asarray(np.isfinite(_every_value(values_E.dtype))[values_E.view(np.uint8)])
    return np.asarray(np.isfinite(values_E))


def _single(values_E: np.ndarray) -> np.ndarray:
    """Return values of a type that NumPy lacks as float32."""
    if values_E.dtype == BFLOAT16:
        bits_E = values_E.view(np.uint16).astype(np.uint32)
        bits_E <<= 16
        return bits_E.view(np.float32)
    return np.asarray(_every_value(values_E.dtype)[values_E.view(np.uint8)])


def _narrow(single_E: np.ndarray, values_E: np.ndarray) -> None:
    """Round float32 values to nearest even into an array of a 16-bit type."""
    if values_E.dtype != BFLOAT16:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values_E[:] = single_E
        return
    bits_E = single_E.view(np.uint32)
    rounded_E = bits_E >> 16
    rounded_E &= 1
    rounded_E += 0x7FFF
    rounded_E += bits_E
    rounded_E >>= 16
    # Rounding could carry the payload of a NaN into infinity, or beyond.
    rounded_E[np.isnan(single_E)] = 0x7FC0
    values_E.view(np.uint16)[:] = rounded_E


@cache
def _every_value(dtype: np.dtype[Any]) -> np.ndarray:
    """Return the 256 values of an eight-bit type as float32, by their bits."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
