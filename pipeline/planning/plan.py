"""The plan: everything that determines the bits of the output, as one frozen value.

Owns the plan's data classes, its JSON form and its fingerprint. Workers, memory and bandwidth are not in it: they only
decide where and how fast. Legend: I inputs (distinct checkpoints), P points (rows of a distance table), N models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pipeline.planning.grid import Chunk, chunks_of

# Raised whenever a plan of the same recipe and sources would give other bits or another run folder.
PLAN_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of an input and the version that was planned for."""

    path: str
    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One checkpoint that is read: its URL, its name in messages, and its files."""

    url: str
    name: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a tensor lies in one input: file index, absolute byte offset, header dtype.

    Attributes:
        copies: File index and offset of every tied copy, which must hold the same bytes.
    """

    file: int
    start: int
    dtype: str
    copies: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One output tensor.

    Attributes:
        dtype: Header dtype that is written.
        group: Index of the group whose coefficients it takes; -1 for a tensor that is copied.
        sources: I places.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    dtype: str
    group: int
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """One output file: its name, its tensors in the order of their bytes, its size.

    Attributes:
        fused: All its groups lie inside it, so it is measured, solved and written in one go.
    """

    name: str
    tensors: tuple[int, ...]
    size_bytes: int
    fused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """Tensors that share one solution; `coefficients` (N) are set when the recipe alone decides them."""

    name: str
    elements: int
    coefficients: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the recipe decides besides models and tensors.

    Attributes:
        cast: Header dtype that inputs are cast to first (the recipe's `dtype`), or None.
        scale: λ, or the rule that finds it: "norm" or "median_norm".
    """

    method: str
    scope: str
    distances: str
    scale: float | str
    tolerance: float
    non_finite: str
    cast: str | None
    measured: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge, decided.

    Attributes:
        base: Input index of the base, or None.
        donor: Input index whose configuration, tokenizer and integer tensors the output takes.
        models: N input indices.
        weights: N weights of the models (of the first tensor, where they vary).
        notes: What the user should know.
    """

    recipe: Mapping[str, object]
    settings: Settings
    inputs: tuple[Input, ...]
    base: int | None
    donor: int
    models: tuple[int, ...]
    weights: tuple[float, ...]
    tensors: tuple[TensorPlan, ...]
    files: tuple[FilePlan, ...]
    groups: tuple[GroupPlan, ...]
    chunk_elements: int
    notes: tuple[str, ...]

    @cached_property
    def points(self) -> tuple[int, ...]:
        """Input indices of the rows of every distance table: the base first, where there is one, then the models."""
        return ((self.base,) if self.base is not None else ()) + self.models

    @property
    def offset(self) -> int:
        """Row of the first model in a distance table."""
        return len(self.points) - len(self.models)

    def chunks(self, file: int) -> tuple[Chunk, ...]:
        """Return the chunks of one output file, in the order of its bytes."""
        return tuple(
            chunk
            for tensor in self.files[file].tensors
            for chunk in chunks_of(tensor, self.tensors[tensor].elements, self.chunk_elements)
        )

    def model_names(self) -> tuple[str, ...]:
        """Return the N names of the models as the recipe has them."""
        return tuple(self.inputs[index].name for index in self.models)

    def to_json(self) -> dict[str, object]:
        """Return the plan as JSON-ready data, fingerprints included."""
        body = dataclasses.asdict(self)
        return {"schema": PLAN_SCHEMA, "fingerprint": self.fingerprint, "parts": self.parts, **body}

    @cached_property
    def parts(self) -> dict[str, str]:
        """Digests of what the plan depends on, one by one, so that a mismatch can say which part changed."""
        return {
            "recipe": _digest(_without_bandwidth(self.recipe)),
            "sources": _digest([dataclasses.asdict(item) for item in self.inputs]),
            "layout": _digest(
                [
                    [PLAN_SCHEMA, self.chunk_elements, dataclasses.asdict(self.settings)],
                    [dataclasses.asdict(tensor) for tensor in self.tensors],
                    [dataclasses.asdict(file) for file in self.files],
                    [dataclasses.asdict(group) for group in self.groups],
                ]
            ),
        }

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that determines the output's bits."""
        return _digest(self.parts)


def _without_bandwidth(recipe: Mapping[str, object]) -> dict[str, object]:
    """Return a recipe without its one word that only projects time: a merge resumes when that is corrected."""
    settings = recipe.get("pipeline")
    kept = (
        {key: value for key, value in settings.items() if key != "bandwidth"} if isinstance(settings, Mapping) else {}
    )
    return {**recipe, "pipeline": kept}


def _digest(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
