"""Whether n checkpoints are one family: same tensors, same shapes, same computation.

Owns every comparison between models that headers and config files allow, so that all mismatches are reported together
before a data byte is read. Legend: I inputs (checkpoints, the reference first).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.checkpoints.adapter import Factors
from pipeline.checkpoints.adapter_fit import Correction
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.dtypes import DTYPES
from pipeline.checkpoints.header import TensorEntry
from pipeline.checkpoints.ties import tied_aliases
from pipeline.errors import CheckpointError, Problem
from pipeline.numerics.dtypes import is_mergeable
from pipeline.planning.configs import adapter_problems, compare_configs, headless_problems, quantization_problems

# Names listed in one message before "and n more".
_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligned:
    """One tensor in every input.

    Attributes:
        name: Its name, the same everywhere.
        entries: I header entries; None where an adapter does not replace the tensor.
        copies: I lists of entries of further, tied copies that must hold the same bytes.
        merged: False for integer and boolean tensors, which are copied.
        updates: Input index and factors of every adapter that adds to it.
    """

    name: str
    entries: tuple[TensorEntry | None, ...]
    copies: tuple[tuple[TensorEntry, ...], ...]
    merged: bool
    updates: tuple[tuple[int, Factors], ...] = ()

    @property
    def reference(self) -> TensorEntry:
        """The first input's entry: a checkpoint's, never an adapter's."""
        first = self.entries[0]
        if first is None:
            raise ValueError(f"the reference does not hold {self.name}")
        return first


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The tensors of a family.

    Attributes:
        tensors: Aligned, in the reference's order.
        aliases: Tied copy -> the tensor that it is a copy of.
        correction: How the first adapter's names became the base's.
        notes: What should be said about the family.
    """

    tensors: tuple[Aligned, ...]
    aliases: Mapping[str, str]
    notes: tuple[str, ...]
    correction: Correction = field(default_factory=Correction)


def align(checkpoints: Sequence[Checkpoint]) -> Family:
    """Return the tensors that all full checkpoints share, which must be all tensors.

    Args:
        checkpoints: I open checkpoints; the first is the reference (the base, or the first model).

    Raises:
        CheckpointError: Every mismatch, in the order of the models.
    """
    reference = checkpoints[0]
    aliases = tied_aliases(checkpoints)
    problems: list[Problem] = []
    for checkpoint in checkpoints:
        problems += adapter_problems(checkpoint)
        problems += _tie_problems(checkpoint, aliases)
        problems += headless_problems(checkpoint)
        problems += quantization_problems(checkpoint)
        problems += _unreadable(checkpoint)
    for checkpoint in checkpoints[1:]:
        if adapter_problems(checkpoint):
            continue  # said already; what its names and shapes are not follows from that
        problems += _name_problems(reference, checkpoint, aliases)
        problems += _shape_problems(reference, checkpoint, aliases)
    config_problems, notes = compare_configs(checkpoints)
    problems += config_problems
    if problems:
        raise CheckpointError(*problems)
    stored = [_by_name(checkpoint.tensors, aliases) for checkpoint in checkpoints]
    tensors = tuple(_aligned(name, [entries[name] for entries in stored]) for name in stored[0])
    notes = [*notes, *(f"{alias} is tied to {source} and written once" for alias, source in sorted(aliases.items()))]
    return Family(tensors=tensors, aliases=aliases, notes=tuple(notes))


def _by_name(tensors: Mapping[str, TensorEntry], aliases: Mapping[str, str]) -> dict[str, list[TensorEntry]]:
    """Return the entries of every tensor under its source's name; of a tied pair either or both may be stored.

    The source's own entry comes first where it is stored.
    """
    entries: dict[str, list[TensorEntry]] = {}
    for name, entry in tensors.items():
        members = entries.setdefault(aliases.get(name, name), [])
        members.insert(len(members) if name in aliases else 0, entry)
    return entries


def _aligned(name: str, stored: Sequence[Sequence[TensorEntry]]) -> Aligned:
    entries = tuple(members[0] for members in stored)
    return Aligned(
        name=name,
        entries=entries,
        copies=tuple(tuple(members[1:]) for members in stored),
        merged=is_mergeable(entries[0].dtype),
    )


def _unreadable(checkpoint: Checkpoint) -> list[Problem]:
    """Return the tensors whose element type can be neither merged nor copied."""
    return [
        Problem(
            what=f"tensor {entry.name} has dtype {entry.dtype}, which cannot be merged",
            where=f"model {checkpoint.url}",
            remedy="convert the model to BF16, F16, F32 or F64",
        )
        for entry in checkpoint.tensors.values()
        if not is_mergeable(entry.dtype) and DTYPES[entry.dtype].kind not in ("integer", "boolean")
    ]


def _name_problems(reference: Checkpoint, model: Checkpoint, aliases: Mapping[str, str]) -> list[Problem]:
    """Return missing and extra tensors of one model, tied copies left aside."""
    problems = []
    held = {aliases.get(name, name) for name in model.tensors}
    wanted = {aliases.get(name, name) for name in reference.tensors}
    missing = [name for name in reference.tensors if aliases.get(name, name) not in held]
    extra = [name for name in model.tensors if aliases.get(name, name) not in wanted]
    if missing:
        untied = any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in missing)
        problems.append(
            Problem(
                what=f"lacks {_listed(missing)} that {reference.url} has"
                + ("; its embeddings are not tied, so the head cannot be inferred" if untied else ""),
                where=f"model {model.url}",
                remedy="use a complete checkpoint of the same architecture",
            )
        )
    if extra:
        problems.append(
            Problem(
                what=f"has {_listed(extra)} that {reference.url} lacks",
                where=f"model {model.url}",
                remedy="use checkpoints of one architecture; remove what does not belong",
            )
        )
    return problems


def _tie_problems(model: Checkpoint, aliases: Mapping[str, str]) -> list[Problem]:
    """Return tied copies that cannot be the same tensor: another shape or dtype."""
    return [
        Problem(
            what=f"{copy.dtype} {list(copy.shape)}, but tied to {first.name}, which is"
            f" {first.dtype} {list(first.shape)}",
            where=f"model {model.url}, tensor {copy.name}",
            remedy="store it in one type, or once; or set tie_word_embeddings to false in every config.json",
        )
        for first, *copies in _by_name(model.tensors, aliases).values()
        for copy in copies
        if (copy.shape, copy.dtype) != (first.shape, first.dtype)
    ]


def _shape_problems(reference: Checkpoint, model: Checkpoint, aliases: Mapping[str, str]) -> list[Problem]:
    """Return shapes and kinds of elements that differ from the reference's."""
    problems = []
    found = _by_name(model.tensors, aliases)
    for name, (wanted, *_) in _by_name(reference.tensors, aliases).items():
        if name not in found:
            continue
        entry = found[name][0]
        where = f"model {model.url}, tensor {name}"
        if entry.shape != wanted.shape:
            vocabulary = len(entry.shape) == 2 and entry.shape[1:] == wanted.shape[1:] and _is_vocabulary(name)
            problems.append(
                Problem(
                    what=f"shape {list(entry.shape)}, but {list(wanted.shape)} in {reference.url}"
                    + (f": vocabularies of {entry.shape[0]} and {wanted.shape[0]} tokens" if vocabulary else ""),
                    where=where,
                    remedy="bring the models to one vocabulary first" if vocabulary else "leave this model out",
                )
            )
        elif is_mergeable(entry.dtype) != is_mergeable(wanted.dtype) or (
            not is_mergeable(entry.dtype) and entry.dtype != wanted.dtype
        ):
            problems.append(
                Problem(
                    what=f"dtype {entry.dtype}, but {wanted.dtype} in {reference.url}",
                    where=where,
                    remedy="convert one of the two: floats are merged, integers and booleans must agree exactly",
                )
            )
    return problems


def _is_vocabulary(name: str) -> bool:
    """Return whether a tensor has one row per token, by the names the libraries use."""
    return any(word in name for word in ("embed", "lm_head", "wte", "shared.weight", "decoder.weight", "output.weight"))


def _listed(names: Sequence[str]) -> str:
    """Return "tensor a" or "3 tensors (a, b, c)" with the tail of long lists counted."""
    if len(names) == 1:
        return f"tensor {names[0]}"
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensors ({', '.join(names[:_SHOWN])}{more})"
