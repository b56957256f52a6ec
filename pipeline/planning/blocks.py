"""Which tensors share a solution: the groups of a scope, and the transformer layer a name belongs to.

Owns the reading of tensor names. Legend: T tensors.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from pipeline.errors import Problem, RecipeError
from pipeline.recipe import NamedPatterns

# A layer is the first path segment that is a number: model.layers.7.mlp…, encoder.layer.3…, transformer.h.11…
_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)(?=\.)")
# Group of the tensors that belong to no layer or match no pattern.
REST = "rest"


def block_of(name: str) -> str:
    """Return the block of a tensor: "model.layers.7", or "rest" for embeddings, final norm and head."""
    match = _LAYER.match(name)
    return f"{match['stack']}.{match['index']}" if match else REST


def layer_of(name: str) -> int | None:
    """Return the layer index in a tensor's name, or None outside layers."""
    match = _LAYER.match(name)
    return int(match["index"]) if match else None


def layer_count(names: Sequence[str]) -> int:
    """Return how many layers the names speak of: one more than the largest index."""
    return max((layer + 1 for name in names if (layer := layer_of(name)) is not None), default=0)


def group_names(names: Sequence[str], scope: str | Sequence[NamedPatterns]) -> tuple[str, ...]:
    """Return each tensor's group name under a scope.

    Args:
        names: T tensor names.
        scope: "model", "block", "tensor", or named glob patterns of which the first that matches wins.

    Raises:
        RecipeError: A pattern matches no tensor that an earlier one has not taken.
    """
    if scope == "model":
        return ("model",) * len(names)
    if scope == "block":
        return tuple(block_of(name) for name in names)
    if isinstance(scope, str):
        return tuple(names)
    taken: dict[str, str] = {}
    problems = []
    for patterns in scope:
        for pattern in patterns.tensors:
            hits = [name for name in names if name not in taken and fnmatch.fnmatchcase(name, pattern)]
            taken.update(dict.fromkeys(hits, patterns.name))
            if not hits:
                problems.append(
                    Problem(
                        what=f"pattern {pattern!r} matches no tensor that is not already in a group",
                        where=f"pipeline.scope, group {patterns.name!r}",
                        remedy="correct or remove it; patterns are globs over whole tensor names, such as *.mlp.*",
                    )
                )
    if problems:
        raise RecipeError(*problems)
    return tuple(taken.get(name, REST) for name in names)
