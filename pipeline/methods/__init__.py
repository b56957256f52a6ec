"""The merge methods, one file each; a method is found by lying in this folder.

Owns the registry. A method module defines ``METHOD``, an object of the protocol in `pipeline.methods.base`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from pipeline.methods.base import Method


@cache
def registry() -> Mapping[str, Method]:
    """Return every method by its recipe name, in alphabetical order."""
    modules = [
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if info.name != "base"
    ]
    found = [module.METHOD for module in modules]
    return {method.schema.name: method for method in sorted(found, key=lambda method: method.schema.name)}
