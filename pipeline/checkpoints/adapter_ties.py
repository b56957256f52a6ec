"""Adapters that touch an embedding which the base shares between several places.

Owns the refusal of changes that a base with tied embeddings cannot hold. Must not read data: names, shapes and configs
decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from pipeline.checkpoints.adapter_config import MERGE_FIRST
from pipeline.checkpoints.adapter_names import Factors
from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.header import TensorEntry
from pipeline.checkpoints.ties import is_output_embedding, tied_aliases
from pipeline.errors import Problem

# The head of most architectures, asked for where the base does not store its own.
_HEAD = "lm_head.weight"
# Ends of the names of architectures with a language model's head.
_GENERATORS = ("ForCausalLM", "LMHeadModel", "LMHead", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
# The one embedding of encoder-decoder models, which both halves use whatever the config says of the head.
_SHARED = ("shared.weight", "model.shared.weight")
_HALVES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def shared_embeddings(names: Sequence[str], base: Checkpoint) -> dict[str, str]:
    """Return, for tensors that an adapter touches, alias -> input embedding that the base takes for the same.

    Args:
        names: Tensors that the adapter touches, in the base's words; the base may lack an alias.
        base: What it stands on.

    Returns:
        All aliases, stored by the base or not, of the embeddings among or behind the names.
    """
    aliases = dict(tied_aliases([base]))
    for shared in _SHARED:
        if shared in base.tensors:
            halves = [shared.removesuffix(_SHARED[0]) + half for half in _HALVES]
            aliases |= {half: shared for half in halves if half in base.tensors or half in names}
    if not any(map(is_output_embedding, base.tensors)) and _has_head(base.config):
        wanted = [name for name in names if is_output_embedding(name)] or [_HEAD]
        shapes = {base.tensors[name].shape for name in names if name in base.tensors}
        for head in wanted:
            if source := _source_of(head, base, None if head in names else shapes):
                aliases[head] = source
    return aliases


def tie_problems(
    updates: Mapping[str, Factors],
    replaced: Mapping[str, TensorEntry],
    base: Checkpoint,
    aliases: Mapping[str, str],
    where: str,
) -> Iterator[Problem]:
    """Yield the changes that would make two tensors of what the base holds once.

    Args:
        updates: By the base's tensor names.
        replaced: Likewise.
        base: What the adapter stands on.
        aliases: What `shared_embeddings` found.
        where: The adapter, for messages.
    """
    remedy = f"{MERGE_FIRST}, every model with tie_word_embeddings: false"
    for source in dict.fromkeys([*aliases.values(), *(name for name in _SHARED if name in base.tensors)]):
        members = [source, *(alias for alias, name in aliases.items() if name == source)]
        others = {name: ", ".join(other for other in members if other != name) for name in members}
        for name in members:
            if name in updates:
                what = f"adds to an embedding that the base ties to {others[name] or 'those of encoder and decoder'}"
                yield Problem(what=what, where=f"{where}, tensor {name}", remedy=remedy)
        held = [name for name in members if name in replaced]
        # The halves of an encoder-decoder model that the base does not store follow the shared embedding.
        lacking = [name for name in members if name not in replaced and (name in base.tensors or not _is_half(name))]
        if held and lacking:
            what = f"replaces an embedding but not {', '.join(lacking)}, which the base ties to it"
            yield Problem(what=what, where=f"{where}, tensor {held[0]}", remedy=remedy)
        kinds = {(replaced[name].dtype, replaced[name].shape) for name in held}
        if len(kinds) > 1:
            what = f"replaces {' and '.join(held)}, which the base ties, by tensors of different types or shapes"
            yield Problem(what=what, where=where, remedy=remedy)


def _is_half(name: str) -> bool:
    return name.removeprefix("model.") in _HALVES


def _has_head(config: Mapping[str, object]) -> bool:
    """Return whether a model has a language model's head; one that says nothing of its architecture may have."""
    architectures = config.get("architectures")
    return not isinstance(architectures, list) or any(str(name).endswith(_GENERATORS) for name in architectures)


def _source_of(head: str, base: Checkpoint, shapes: set[tuple[int, ...]] | None) -> str | None:
    """Return the input embedding that a head the base does not store would be tied to."""
    kinds = {(entry.dtype, entry.shape): entry for entry in base.tensors.values() if len(entry.shape) == 2}
    for (_, shape), entry in kinds.items():
        if shapes is not None and shape not in shapes:
            continue
        # The question is put as if another model of the family stored the head.
        stored = dataclasses.replace(base, tensors={**base.tensors, head: dataclasses.replace(entry, name=head)})
        if source := tied_aliases([stored, base]).get(head):
            return source
    return None
