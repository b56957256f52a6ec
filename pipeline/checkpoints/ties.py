"""Tied embeddings: one tensor under two names, stored once by some models and twice by others.

Owns which names mean the same tensor in a family. Must not read data: names, shapes and configs decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.header import TensorEntry

# Output embeddings by the end of their names, whole parts.
_OUTPUTS = (
    "lm_head.weight",
    "lm_head.decoder.weight",
    "predictions.decoder.weight",
    "generator_lm_head.weight",
    "vocab_projector.weight",
    "embed_out.weight",
    "output.weight",
    "output_layer.weight",
)
# Copies of `shared.weight` in encoder-decoder models; input embeddings of their own where nothing is shared.
_SHARED_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_SHARED = ("shared.weight",)
# Input embeddings.
_INPUTS = (
    *_SHARED,
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
    "embedding.weight",
)


def tied_aliases(checkpoints: Sequence[Checkpoint]) -> Mapping[str, str]:
    """Return, for a family, alias name -> name of the input embedding that it is the same tensor as.

    An alias holds when every model is tied: its config says `tie_word_embeddings: true`, or says nothing while some
    model does not store the alias. One model that says false unties all; an alias that every model stores and not
    every config declares is an independent tensor.

    Args:
        checkpoints: The models that are to be merged.
    """
    declared = [_declares_ties(checkpoint.config) for checkpoint in checkpoints]
    if False in declared:
        return {}
    found: dict[str, str] = {}
    ambiguous: set[str] = set()
    for checkpoint in checkpoints:
        for alias, source in _pairs(checkpoint.tensors):
            if found.setdefault(alias, source) != source:
                ambiguous.add(alias)
    return {
        alias: source
        for alias, source in sorted(found.items())
        if alias not in ambiguous
        and (all(declared) or any(alias not in checkpoint.tensors for checkpoint in checkpoints))
    }


def _declares_ties(config: Mapping[str, object]) -> bool | None:
    """Return what a config says of its embeddings; a false at either level prevails, None when it says nothing."""
    text = config.get("text_config")
    levels = (config, text) if isinstance(text, Mapping) else (config,)
    said = [level.get("tie_word_embeddings") for level in levels]
    if any(value is False for value in said):
        return False
    return True if any(value is True for value in said) else None


def _pairs(tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[str, str]]:
    """Yield the stored aliases of one model with the only input embedding of equal shape and dtype."""
    shares = any(_ends(name, _SHARED) for name in tensors)
    aliases = (*_OUTPUTS, *(_SHARED_COPIES if shares else ()))
    sources = [entry for name, entry in tensors.items() if _ends(name, _INPUTS) and not _ends(name, aliases)]
    for name, entry in tensors.items():
        if not _ends(name, aliases) or len(entry.shape) != 2:
            continue
        equal = [source for source in sources if (source.shape, source.dtype) == (entry.shape, entry.dtype)]
        if len(equal) == 1:
            yield name, equal[0].name


def is_output_embedding(name: str) -> bool:
    """Return whether a tensor's name is that of a language model's head."""
    return _ends(name, _OUTPUTS)


def _ends(name: str, endings: Sequence[str]) -> bool:
    """Return whether a name ends with one of these, whole parts."""
    return any(name == ending or name.endswith("." + ending) for ending in endings)
