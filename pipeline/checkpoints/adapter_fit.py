"""How an adapter's names and shapes meet those of a base: exact, or corrected in one way that leaves no choice.

Owns the correction of names, the orientation of linear weights, and every mismatch. Must not read data, nor know
families of models.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.checkpoints.adapter_names import FLOATS, Factors
from pipeline.checkpoints.header import TensorEntry
from pipeline.checkpoints.ties import is_output_embedding
from pipeline.errors import Problem

# Names listed in one message before "and n more".
_SHOWN = 4
_OTHER_BASE = "name the base that it was trained on, resized as it was then"


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """One leading component by which an adapter's names differ from its base's.

    Attributes:
        removed: What the adapter's names begin with and the base's do not, with its dot; "" for nothing.
        added: What the base's names begin with and the adapter's do not, likewise.
    """

    removed: str = ""
    added: str = ""

    def to_base(self, name: str) -> str:
        """Return the base's name for an adapter's."""
        return self.added + name.removeprefix(self.removed)

    def to_adapter(self, name: str) -> str:
        """Return the adapter's name for a base's."""
        return self.removed + name.removeprefix(self.added)


def find_correction(names: Sequence[str], base: Mapping[str, TensorEntry]) -> Correction:
    """Return what makes all of an adapter's tensor names those of the base; nothing when any is so already.

    Args:
        names: In the adapter's words.
        base: The base's tensors.

    Returns:
        The only correction by one leading component after which every name matches; none if there are two.
    """
    if not names or any(name in base for name in names):
        return Correction()
    heads = dict.fromkeys(name.partition(".")[0] + "." for name in names)
    possible = [Correction(removed=head) for head in heads if len(heads) == 1]
    possible += [Correction(added=head) for head in dict.fromkeys(name.partition(".")[0] + "." for name in base)]
    fitting = [correction for correction in possible if all(correction.to_base(name) in base for name in names)]
    return fitting[0] if len(fitting) == 1 else Correction()


def leftover_problems(names: Sequence[str], base: Mapping[str, TensorEntry], where: str) -> Iterator[Problem]:
    """Yield one problem for names that the base does not have, with the nearest that it has."""
    if not names:
        return
    shown = []
    for name in names[:_SHOWN]:
        near = difflib.get_close_matches(name, base, n=1)
        shown.append(name + (f" (nearest: {near[0]})" if near else ""))
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    count = "a tensor" if len(names) == 1 else f"{len(names)} tensors"
    yield Problem(
        what=f"changes {count} that its base does not have: {', '.join(shown)}{more}",
        where=where,
        remedy="name the base that it was trained on; if its names differ, merge it there with peft first",
    )


def orientations(
    base: Mapping[str, TensorEntry], updates: Mapping[str, Factors]
) -> tuple[dict[str, bool | None], dict[str, bool | None]]:
    """Return, for module paths of the base, whether the linear weights below are stored as (in, out).

    A weight that is not square tells it by its bias, which has the length of the outputs; or by an update, which fits
    one way round. A path below which both are found is None. The model as a whole tells nothing: a head is no block.

    Args:
        base: The base's tensors.
        updates: Of an adapter, by the base's names.

    Returns:
        What the base's biases tell, and what these or the updates tell.
    """
    by_bias: dict[str, bool | None] = {}
    for name, entry in base.items():
        path, _, leaf = name.rpartition(".")
        bias = base.get(f"{path}.bias")
        if leaf != "weight" or len(entry.shape) != 2 or entry.shape[0] == entry.shape[1] or bias is None:
            continue
        if bias.shape not in (entry.shape[:1], entry.shape[1:]):
            continue
        _note_orientation(by_bias, path, bias.shape == entry.shape[1:])
    told = dict(by_bias)
    for name, factors in updates.items():
        shape = _shape(factors)
        tensor = base.get(name)
        if factors.kind == "linear" and tensor is not None and len(shape) == 2 and shape[0] != shape[1]:
            _note_orientation(told, name.rpartition(".")[0], tensor.shape != shape)
    return by_bias, told


def _note_orientation(found: dict[str, bool | None], path: str, flipped: bool) -> None:
    while path:
        found[path] = flipped if found.get(path, flipped) == flipped else None
        path = path.rpartition(".")[0]


def oriented(
    factors: Factors,
    tensor: TensorEntry,
    turned: tuple[Mapping[str, bool | None], Mapping[str, bool | None]],
    *,
    said: bool,
) -> Factors:
    """Return a linear update as the base stores the weight; peft asks the kind of the layer, headers must infer it.

    Args:
        factors: Not transposed yet; other kinds are returned as they are.
        tensor: The base's weight.
        turned: What `orientations` found.
        said: The config's `fan_in_fan_out`: what the last layer that peft adapted was.
    """
    if factors.kind != "linear" or factors.right is None or len(tensor.shape) != 2:
        return factors
    rows, columns = factors.left.shape[0], factors.right.shape[1]
    by_bias, told = (_nearest(found, tensor.name) for found in turned)
    if rows == columns:
        flip = said if told is None else told
    else:
        # Where the shape fits only one way round it decides, unless nothing else speaks for the turned one.
        flip = tensor.shape == (columns, rows) and (said or by_bias is True)
    return dataclasses.replace(factors, left=factors.right, right=factors.left, transposed=True) if flip else factors


def _nearest(found: Mapping[str, bool | None], name: str) -> bool | None:
    """Return what is known at the lowest path above a tensor."""
    path = name.rpartition(".")[0]
    while path and path not in found:
        path = path.rpartition(".")[0]
    return found.get(path)


def update_problems(factors: Factors, tensor: TensorEntry, where: str) -> Iterator[Problem]:
    """Yield what keeps an update from being added to a tensor."""
    where = f"{where}, tensor {tensor.name}"
    shape = _shape(factors)
    if tensor.dtype not in FLOATS:
        what = f"adds to a tensor of {tensor.dtype}, sums are made of {', '.join(FLOATS)}"
        yield Problem(what=what, where=where, remedy="name the unquantized base")
    elif shape != tensor.shape:
        grouped = factors.kind == "conv" and len(shape) == len(tensor.shape) and shape[1] != tensor.shape[1]
        what = f"the update has shape {list(shape)}, the base's tensor {list(tensor.shape)}"
        if grouped and tensor.shape[1] and shape[1] % tensor.shape[1] == 0:
            what += "; a grouped convolution's update is no product of its factors"
        yield Problem(what=what + _vocabularies(shape, tensor), where=where, remedy=_OTHER_BASE)


def replacement_problems(entry: TensorEntry, tensor: TensorEntry, where: str) -> Iterator[Problem]:
    """Yield what keeps a stored tensor from standing for the base's."""
    where = f"{where}, tensor {tensor.name}"
    if entry.shape != tensor.shape:
        what = f"is stored whole with shape {list(entry.shape)}, the base's has {list(tensor.shape)}"
        yield Problem(what=what + _vocabularies(entry.shape, tensor), where=where, remedy=_OTHER_BASE)
    elif entry.dtype != tensor.dtype and not (entry.dtype in FLOATS and tensor.dtype in FLOATS):
        what = f"is stored whole with dtype {entry.dtype}, the base's has {tensor.dtype}"
        yield Problem(what=what, where=where, remedy="name the unquantized base, or save the adapter in a float type")


def _shape(factors: Factors) -> tuple[int, ...]:
    """Return the shape of the tensor that an update can be added to."""
    if factors.right is None:
        return factors.left.shape
    if factors.transposed:
        return (factors.left.shape[1], factors.right.shape[0])
    return (factors.left.shape[0], *factors.right.shape[1:])


def _vocabularies(shape: tuple[int, ...], tensor: TensorEntry) -> str:
    """Return a hint where only the numbers of tokens differ, by the names the libraries use."""
    embeds = is_output_embedding(tensor.name) or any(word in tensor.name for word in ("embed", "wte", "shared"))
    if not embeds or len(shape) != 2 or shape[1:] != tensor.shape[1:]:
        return ""
    return f": vocabularies of {shape[0]} and {tensor.shape[0]} tokens"
