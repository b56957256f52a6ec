"""The element types of the safetensors format.

Owns their names, widths and kinds. Must not know torch: which of them can be merged is decided in numerics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Kind = Literal["float", "integer", "boolean", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """An element type.

    Attributes:
        name: As safetensors headers write it.
        bits: Width of one element; below 8 for packed types.
        kind: "other" for what has no arithmetic of its own: packed, scale-only and complex types.
    """

    name: str
    bits: int
    kind: Kind


def _table(*rows: tuple[Kind, int, str]) -> Mapping[str, DType]:
    return MappingProxyType(
        {name: DType(name=name, bits=bits, kind=kind) for kind, bits, names in rows for name in names.split()}
    )


# Source: the `Dtype` enumeration of safetensors 0.8.
DTYPES: Mapping[str, DType] = _table(
    ("float", 64, "F64"),
    ("float", 32, "F32"),
    ("float", 16, "F16 BF16"),
    ("float", 8, "F8_E4M3 F8_E5M2"),
    ("other", 8, "F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ"),
    ("other", 6, "F6_E2M3 F6_E3M2"),
    ("other", 4, "F4"),
    ("other", 64, "C64"),
    ("integer", 64, "I64 U64"),
    ("integer", 32, "I32 U32"),
    ("integer", 16, "I16 U16"),
    ("integer", 8, "I8 U8"),
    ("boolean", 8, "BOOL"),
)
