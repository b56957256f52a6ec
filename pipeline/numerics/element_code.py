"""How the compiled loops read elements of a dtype into float64 and round float64 back, eight at a time.

Owns the two conversions for each dtype, as instructions of `vector_text`; knows nothing of the loops around them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.numerics.vector_text import DOUBLES, FLOATS, INTS, LANES, LONGS, Function, Value

_DOUBLE_DIGITS = 52


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """A dtype in memory.

    Attributes:
        type: LLVM's name; bfloat16 is its bits.
        nbytes: Its size.
        digits: Stored bits of the significand.
    """

    type: str
    nbytes: int
    digits: int


BFLOAT16 = Element(type="i16", nbytes=2, digits=7)
FLOAT16 = Element(type="half", nbytes=2, digits=10)
FLOAT32 = Element(type="float", nbytes=4, digits=23)
FLOAT64 = Element(type="double", nbytes=8, digits=_DOUBLE_DIGITS)

# By the name of NumPy's dtype; bfloat16 may come as its bits.
ELEMENTS = {"bfloat16": BFLOAT16, "uint16": BFLOAT16, "float16": FLOAT16, "float32": FLOAT32, "float64": FLOAT64}


@functools.cache
def element_of(dtype: np.dtype[Any]) -> Element:
    """Return how a NumPy dtype lies in memory.

    Raises:
        KeyError: The loops do not read it.
    """
    return ELEMENTS[dtype.name]


def loaded(function: Function, element: Element, address: Value) -> tuple[Value, Value]:
    """Return eight elements in the narrowest type that has arithmetic, and as float64.

    Args:
        function: The function being written.
        element: The dtype.
        address: Of the first.
    """
    stored = function.load(f"<{LANES} x {element.type}>", address, align=element.nbytes)
    return _as_floats(stored, element)


def rounded(function: Function, element: Element, value: Value) -> tuple[Value, Value]:
    """Return eight float64 rounded once to nearest even in a dtype, and what they are as float64.

    Args:
        function: The function being written.
        element: The dtype.
        value: What to round.
    """
    if element is FLOAT64:
        return value, value
    if element is FLOAT32:
        stored = value.to("fptrunc", FLOATS)
    else:
        single = _rounded_to_odd(value, element.digits + 3).to("fptrunc", FLOATS)
        stored = single.to("fptrunc", f"<{LANES} x half>") if element is FLOAT16 else _upper_half(function, single)
    return stored, _as_floats(stored, element)[1]


def _as_floats(stored: Value, element: Element) -> tuple[Value, Value]:
    """Return stored elements as floats and as float64."""
    if element is FLOAT64:
        return stored, stored
    if element is BFLOAT16:
        stored = (stored.to("zext", INTS) << 16).to("bitcast", FLOATS)
    elif element is FLOAT16:
        stored = stored.to("fpext", FLOATS)
    return stored, stored.to("fpext", DOUBLES)


def _rounded_to_odd(value: Value, digits: int) -> Value:
    """Return float64 cut to fewer digits, the last of which is set where anything was cut off.

    With three digits more than the dtype stores, float32 holds the result exactly wherever the dtype is not zero, and
    the rounding that follows sees on which side of a tie the value lies.

    Source: Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
        odd", theorem 3.
    """
    bits = value.to("bitcast", LONGS)
    cut = (1 << (_DOUBLE_DIGITS - digits)) - 1
    return ((bits | ((bits & cut) + cut)) & ~cut).to("bitcast", DOUBLES)


def _upper_half(function: Function, single: Value) -> Value:
    """Return float32 rounded to nearest even in the upper 16 of its bits; what is no number stays so."""
    bits = single.to("bitcast", INTS)
    upper = bits >> 16
    nearest = (bits + (function.constant(INTS, 0x7FFF) + (upper & 1))) >> 16
    is_nan = single.compared("uno", single)
    return function.select(is_nan, upper | 0x40, nearest).to("trunc", f"<{LANES} x i16>")
