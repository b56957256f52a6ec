"""What the tensors of a LoRA file are, told by their names: factors of an update, or whole tensors of the base.

Owns the names that peft gives to an adapter's tensors, and the checks that need nothing but the file and its config.
Must not know the base. Legend: M rows and K columns of a base tensor seen as a matrix, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.checkpoints.adapter_config import MERGE_FIRST, LoraSettings
from pipeline.checkpoints.header import TensorEntry
from pipeline.checkpoints.json_text import short
from pipeline.errors import CheckpointError, Problem

# What peft puts before the name that a module has in the model.
PREFIX = "base_model.model."
# The element types that arithmetic is done on.
FLOATS = ("F64", "F32", "F16", "BF16")
# peft leaves the adapter's own name out; trainers that save the state themselves do not.
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<slot>lora_[AB])(\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<module>.+)\.(?P<slot>lora_embedding_[AB])(\.(?P<adapter>[^.]+))?")
# Copies that peft keeps beside a module of modules_to_save, stored with `bias: all`, and never loads.
_SHADOW = re.compile(r"(?P<module>.+)\.(original_module|modules_to_save)\.(?P<rest>.+)")
# What peft calls the module that it wraps.
_WRAPPED = "base_layer"
# A state of VeLoRA's backward pass; the update itself is plain.
_TRAINING_STATE = "lora_velora_embed"
# One damaged or foreign file can make thousands of problems; the first ones tell enough.
_MOST_PROBLEMS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The update of one base tensor, seen as an M × K matrix: scale · left_MR @ right_RK.

    A kernel (out, in, ...) is seen as out rows of in·... columns, a bias as one column.

    Attributes:
        module: Its path in the adapter, without "base_model.model." and without correction.
        kind: "linear", "embedding", "conv" or "bias".
        left: Stored (M, R), or (R, M) when transposed; a bias (M,).
        right: Stored (R, K), or (K, R) when transposed, a kernel (R, in, ...); None stands for the matrix [[1]].
        rank: R; 1 for a bias.
        scale: alpha / R, or alpha / √R where it is rank-stabilised.
        transposed: Whether the tensor holds (B · A)ᵀ: then left is A, right is B.
    """

    module: str
    kind: str
    left: TensorEntry
    right: TensorEntry | None
    rank: int
    scale: float
    transposed: bool


def sort_tensors(
    tensors: Mapping[str, TensorEntry], settings: LoraSettings, where: str
) -> tuple[dict[str, Factors], dict[str, TensorEntry]]:
    """Return updates and replacements by the name that the tensor they concern has in the model, by peft's word.

    Whether a linear layer is stored as (out, in) only its base can tell: none is transposed here.

    Args:
        tensors: All of an adapter file.
        settings: Ranks and scales.
        where: The file, for messages.

    Raises:
        CheckpointError: Tensors that are no plain LoRA, unpaired, of other ranks than configured, or not of floats.
    """
    slots: dict[str, dict[str, TensorEntry]] = {}
    whole: dict[str, TensorEntry] = {}
    problems: list[Problem] = []
    names = {name.removeprefix(PREFIX) for name in tensors}
    saved: set[str | None] = set()
    for entry in tensors.values():
        name = entry.name.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name) or _EMBEDDING.fullmatch(name)
        if match:
            leaf = ".bias" if match.groupdict().get("leaf") == "bias" else ""
            held, key = slots.setdefault(match["module"], {}), match["slot"] + leaf
            saved.add(match["adapter"])
        elif _is_passive(name, names):
            continue
        elif any(part.startswith("lora_") for part in name.split(".")):
            problems.append(_foreign(entry, where))
            continue
        else:
            held, key = whole, _unwrapped(name)
        if key in held:
            problems.append(_twice(held[key], entry, where))
        held[key] = entry
    updates: dict[str, Factors] = {}
    for module, found in slots.items():
        mistakes = [*_slot_problems(module, found, where)] or [*_shape_problems(module, found, settings, where)]
        problems += mistakes
        if not mistakes:
            updates |= _factors(module, found, settings)
    if len(saved) > 1:
        listed = ", ".join(sorted(short(name or "") for name in saved))
        problems.append(
            Problem(what=f"has factors of several adapters: {listed}", where=where, remedy="save one adapter a folder")
        )
    if not problems and not updates and not whole:
        problems.append(Problem(what="has no tensors", where=where, remedy="save the adapter again"))
    raise_all(problems)
    return updates, whole


def raise_all(problems: list[Problem]) -> None:
    """Raise what was found wrong, if anything, the tail of long lists counted.

    Raises:
        CheckpointError: There are problems.
    """
    if len(problems) > _MOST_PROBLEMS:
        problems = [*problems[:_MOST_PROBLEMS], Problem(what=f"and {len(problems) - _MOST_PROBLEMS} more of this kind")]
    if problems:
        raise CheckpointError(*problems)


def _unwrapped(name: str) -> str:
    """Return the model's name for a whole tensor: without the wrapper that an adapted module is in."""
    module, _, leaf = name.rpartition(".")
    return f"{module.removesuffix('.' + _WRAPPED)}.{leaf}" if module.endswith("." + _WRAPPED) else name


def _is_passive(name: str, names: set[str]) -> bool:
    """Return whether a tensor has no part in the adapted model."""
    if _TRAINING_STATE in name.split("."):
        return True
    match = _SHADOW.fullmatch(name)
    if match is None:
        return False
    # The adapter's own name may stand between the wrapper and the rest.
    rests = (match["rest"], match["rest"].partition(".")[2])
    return any(f"{match['module']}.{rest}" in names for rest in rests)


def _foreign(entry: TensorEntry, where: str) -> Problem:
    dora = "lora_magnitude_vector" in entry.name
    what = "belongs to DoRA, which rescales the whole weight" if dora else "is no factor of a plain LoRA"
    return Problem(what=what, where=f"{where}: tensor {short(entry.name)}", remedy=MERGE_FIRST)


def _twice(first: TensorEntry, second: TensorEntry, where: str) -> Problem:
    return Problem(
        what=f"tensors {short(first.name)} and {short(second.name)} are the same of one module",
        where=where,
        remedy="save one adapter a folder",
    )


def _slot_problems(module: str, found: Mapping[str, TensorEntry], where: str) -> Iterator[Problem]:
    """Yield what is wrong with the set of a module's tensors, and with their types."""
    where = f"{where}: module {short(module)}"
    parts = module.split(".")
    if _WRAPPED in parts or "modules_to_save" in parts:
        what = "adapts a parameter inside of a wrapped module (target_parameters, or torch's MultiheadAttention)"
        yield Problem(what=what, where=where, remedy=MERGE_FIRST)
        return
    embeds = any("embedding" in slot for slot in found)
    wanted = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A", "lora_B")
    for slot in wanted:
        if slot not in found:
            yield Problem(what=f"has no {slot}", where=where, remedy="save the adapter again, whole")
    for slot, entry in found.items():
        if slot not in (*wanted, "lora_B.bias") or (embeds and slot == "lora_B.bias"):
            yield Problem(what=f"has {slot} beside {wanted[0]}", where=where, remedy=MERGE_FIRST)
        elif entry.dtype not in FLOATS:
            yield Problem(
                what=f"{slot} is of {entry.dtype}, factors must be of {', '.join(FLOATS)}",
                where=where,
                remedy="save the adapter unquantized",
            )


def _shape_problems(
    module: str, found: Mapping[str, TensorEntry], settings: LoraSettings, where: str
) -> Iterator[Problem]:
    """Yield what is wrong with the shapes of a complete set: matrices or kernels of the configured rank are wanted."""
    where = f"{where}: module {short(module)}"
    (a, b), bias = _pair(found), found.get("lora_B.bias")
    shapes = f"A {list(a.shape)}, B {list(b.shape)}"
    flat = len(a.shape) == 2 or "lora_A" in found
    if not 2 <= len(a.shape) == len(b.shape) or not flat or any(size != 1 for size in b.shape[2:]):
        what = f"{shapes}: factors are (rank, in) and (out, rank), or such kernels"
        yield Problem(what=what, where=where, remedy="save the adapter again; under ZeRO-3 or FSDP gather it first")
        return
    rank = settings.rank_of(module)
    if (a.shape[0], b.shape[1]) != (rank, rank):
        what = f"{shapes}: adapter_config.json says rank {rank}"
        remedy = "correct r or rank_pattern; the scale depends on it"
        yield Problem(what=what, where=where, remedy=remedy)
    if bias is not None and bias.shape != b.shape[:1]:
        what = f"{shapes}, lora_B.bias {list(bias.shape)}: it must have one element for each row of B"
        yield Problem(what=what, where=where, remedy="save the adapter again")


def _pair(found: Mapping[str, TensorEntry]) -> tuple[TensorEntry, TensorEntry]:
    """Return A and B."""
    kind = "lora_" if "lora_A" in found else "lora_embedding_"
    return found[kind + "A"], found[kind + "B"]


def _factors(module: str, found: Mapping[str, TensorEntry], settings: LoraSettings) -> dict[str, Factors]:
    """Return the updates of one module by tensor name."""
    (a, b), rank, scale = _pair(found), settings.rank_of(module), settings.scale_of(module)
    embeds = "lora_A" not in found
    weight = Factors(
        module=module,
        kind="embedding" if embeds else "conv" if len(a.shape) > 2 else "linear",
        left=a if embeds else b,
        right=b if embeds else a,
        rank=rank,
        scale=scale,
        # Embeddings have one row per token: (B · A)ᵀ.
        transposed=embeds,
    )
    updates = {f"{module}.weight": weight}
    if (bias := found.get("lora_B.bias")) is not None:
        updates[f"{module}.bias"] = Factors(
            module=module, kind="bias", left=bias, right=None, rank=1, scale=scale, transposed=False
        )
    return updates
