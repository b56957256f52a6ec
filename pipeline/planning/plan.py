"""The plan: everything that determines the bits of the output, as one frozen value.

Owns the plan's data classes, its JSON form and its fingerprint. Workers, memory and bandwidth are not in it: they only
decide where and how fast. Legend: I inputs (distinct checkpoints), P points (rows of a distance table), N models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.planning.grid import Chunk, chunks_of
from pipeline.planning.system import Solver, Statistic, System
from pipeline.storage.options import NO_OPTIONS, StorageOptions

# Raised whenever a plan of the same recipe and sources would give other bits or another run folder.
PLAN_SCHEMA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of an input and the version that was planned for."""

    path: str
    size_bytes: int
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One checkpoint or adapter that is read: its URL, its name in messages, and its files.

    Attributes:
        over: Of an adapter, the index of the checkpoint it stands on.
    """

    url: str
    name: str
    files: tuple[SourceFile, ...]
    over: int | None = None


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
class Update:
    """What an adapter adds to a tensor seen as an M × K matrix: scale · left (M × R) · right (R × K).

    Attributes:
        input: Index of the adapter.
        right: None for a column that is added as it is (a bias): a 1 × 1 matrix of one.
        transposed: Both factors are stored transposed, left as R × M and right as K × R.
    """

    input: int
    left: Source
    right: Source | None
    rank: int
    scale: float
    transposed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of an output file: its name and its shape there."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One merged tensor.

    Attributes:
        dtype: Header dtype that is written.
        group: Index of the group whose coefficients it takes; -1 for a tensor that is copied.
        sources: I places; None where an input is an adapter that does not replace the tensor.
        updates: The low-rank updates of the adapters that have one, in the order of the inputs.
        shared: The input whose values all points have before their updates; None where points differ beyond updates.
        stored: What the file holds where that is not the tensor under its own name.
        merged_rank: Rank of the two factors that are written instead of the tensor.
        system: The linear system that it solves; None where it is averaged or copied.
        metric: The moments that its distances are measured in; None where they are Euclidean.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    dtype: str
    group: int
    sources: tuple[Source | None, ...]
    updates: tuple[Update, ...] = ()
    shared: int | None = None
    stored: tuple[Stored, ...] = ()
    merged_rank: int | None = None
    system: System | None = None
    metric: Statistic | None = None

    @property
    def treatment(self) -> str:
        """What becomes of it under a method that solves systems: "solved", "averaged" or "copied"."""
        if self.group < 0:
            return "copied"
        return "averaged" if self.system is None else "solved"

    @property
    def moments(self) -> tuple[Statistic, ...]:
        """All second moments that are read for it."""
        own = self.system.statistics if self.system is not None else ()
        return (*own, self.metric) if self.metric is not None else own

    @property
    def rows(self) -> int:
        """M of the matrix that updates are applied to: the first dimension; a bias is a column."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """K of the matrix that updates are applied to."""
        return self.elements // max(1, self.rows)

    @property
    def entries(self) -> tuple[Stored, ...]:
        """What the output file holds of it, in the order of the bytes."""
        return self.stored or (Stored(name=self.name, shape=self.shape),)

    @property
    def stored_bytes(self) -> int:
        """Its bytes in the output file."""
        return sum(math.prod(entry.shape) for entry in self.entries) * DTYPES[self.dtype].bits // 8

    @property
    def factored(self) -> bool:
        """Whether points differ by low-rank updates alone, so that distances follow from the factors."""
        return self.shared is not None and bool(self.updates)

    @property
    def unchanged(self) -> bool:
        """Whether all points have the same values: no adapter touches it."""
        return self.shared is not None and not self.updates

    @property
    def holders(self) -> tuple[int, ...]:
        """The inputs that store the tensor whole."""
        return tuple(index for index, source in enumerate(self.sources) if source is not None)


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
    """Tensors that share one solution; `coefficients` (N) are set when no distance has a say in them."""

    name: str
    elements: int
    coefficients: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the recipe decides besides models and tensors.

    Attributes:
        cast: Header dtype that inputs are cast to first (the recipe's `dtype`), or None.
        scale: λ, or the rule that finds it: "norm" or "median_norm".
        output: "model", or "adapter": the merged updates as factors.
        rank: To which the factors are truncated, or None.
        solver: How linear systems are solved, or None.
        metric: "diagonal" or "gram" where distances are measured in a metric, or None.
    """

    method: str
    scope: str
    distances: str
    scale: float | str
    tolerance: float
    non_finite: str
    cast: str | None
    measured: bool
    output: str = "model"
    rank: int | None = None
    solver: Solver | None = None
    metric: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge, decided.

    Attributes:
        base: Input index of the base, or None.
        donor: Input index whose configuration, tokenizer and integer tensors the output takes.
        models: N input indices.
        weights: N weights of the models (of the first tensor, where they vary).
        notes: What the user should know.
        statistics: The folders of statistics that are read.
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
    statistics: tuple[Input, ...] = ()

    @cached_property
    def points(self) -> tuple[int, ...]:
        """Input indices of the rows of every distance table: the base first, where there is one, then the models."""
        return ((self.base,) if self.base is not None else ()) + self.models

    @property
    def offset(self) -> int:
        """Row of the first model in a distance table."""
        return len(self.points) - len(self.models)

    def chunks(self, file: int) -> tuple[Chunk, ...]:
        """Return the chunks that are written of one output file, in the order of its bytes."""
        return tuple(chunk for tensor in self.files[file].tensors for chunk in self.written_chunks(tensor))

    def measured_chunks(self, tensor: int) -> tuple[Chunk, ...]:
        """Return what is measured of a tensor: the written chunks; all at once where the factors tell the distances."""
        plan = self.tensors[tensor]
        if self.settings.measured and (plan.unchanged or not self.is_weighed(tensor)):
            return ()
        if plan.factored:
            return chunks_of(tensor, plan.elements, max(1, plan.elements))
        return self.written_chunks(tensor)

    def written_chunks(self, tensor: int) -> tuple[Chunk, ...]:
        """Return the chunks of a tensor: all at once where factors are written, whole rows where they are needed.

        Those are needed where updates are added, and where a metric of matrices maps rows.
        """
        plan = self.tensors[tensor]
        if plan.merged_rank is not None:
            length = plan.elements
        elif plan.updates or (plan.metric is not None and plan.metric.kind != "diagonal"):
            length = max(1, self.chunk_elements // max(1, plan.columns)) * plan.columns
        else:
            length = self.chunk_elements
        return chunks_of(tensor, plan.elements, max(1, length))

    def is_weighed(self, tensor: int) -> bool:
        """Return whether a tensor takes part in distances: in a metric, if it has a statistic, or is only copied."""
        plan = self.tensors[tensor]
        return self.settings.metric is None or plan.metric is not None or plan.group < 0

    def is_one_chunk(self, tensor: int) -> bool:
        """Return whether a tensor is a group by itself and so small that it is measured and written by one read."""
        group = self.tensors[tensor].group
        alone = group >= 0 and self.groups[group].elements == self.tensors[tensor].elements
        return alone and len(self.measured_chunks(tensor)) <= 1 and len(self.written_chunks(tensor)) <= 1

    def dense_input(self, tensor: int, index: int) -> int:
        """Return the input that holds the values of a tensor of input `index` before its update."""
        if self.tensors[tensor].sources[index] is not None:
            return index
        over = self.inputs[index].over
        if over is None:
            raise ValueError(f"input {index} holds no {self.tensors[tensor].name} and stands on nothing")
        return over

    def model_names(self) -> tuple[str, ...]:
        """Return the N names of the models as the recipe has them."""
        return tuple(self.inputs[index].name for index in self.models)

    @cached_property
    def storage(self) -> StorageOptions:
        """How stores are opened, as the recipe says: it is saved with the plan, and no part of the fingerprint."""
        pipeline = self.recipe.get("pipeline")
        found = pipeline.get("storage") if isinstance(pipeline, Mapping) else None
        return StorageOptions(found) if isinstance(found, Mapping) else NO_OPTIONS

    def to_json(self) -> dict[str, object]:
        """Return the plan as JSON-ready data, fingerprints included."""
        body = dataclasses.asdict(self)
        return {"schema": PLAN_SCHEMA, "fingerprint": self.fingerprint, "parts": self.parts, **body}

    @cached_property
    def parts(self) -> dict[str, str]:
        """Digests of what the plan depends on, one by one, so that a mismatch can say which part changed."""
        return {
            "recipe": _digest(_without_places(self.recipe)),
            "sources": _digest([dataclasses.asdict(item) for item in (*self.inputs, *self.statistics)]),
            "layout": _digest(
                [
                    [PLAN_SCHEMA, self.chunk_elements, _without_absent(dataclasses.asdict(self.settings))],
                    [_without_absent(dataclasses.asdict(tensor)) for tensor in self.tensors],
                    [dataclasses.asdict(file) for file in self.files],
                    [dataclasses.asdict(group) for group in self.groups],
                ]
            ),
        }

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that determines the output's bits."""
        return _digest(self.parts)


# Words of a recipe that change neither the result nor its layout: a merge resumes when they are corrected.
_NO_RESULT = frozenset({"bandwidth", "storage"})


def _without_places(recipe: Mapping[str, object]) -> dict[str, object]:
    """Return a recipe without its words that only project time or say how stores are reached."""
    settings = recipe.get("pipeline")
    kept = (
        {key: value for key, value in settings.items() if key not in _NO_RESULT}
        if isinstance(settings, Mapping)
        else {}
    )
    return {**recipe, "pipeline": kept}


# What plans of methods without second moments have nothing of; they are the same plans as before there were any.
_MOMENTS = ("system", "solver", "metric")


def _without_absent(body: dict[str, object]) -> dict[str, object]:
    """Return a part of a plan without what it says about second moments, where that is nothing."""
    return {key: value for key, value in body.items() if key not in _MOMENTS or value is not None}


def _digest(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
