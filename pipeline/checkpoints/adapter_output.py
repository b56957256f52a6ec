"""Adapters to be written: what peft calls their tensors, how it stores them, and the config by which it adds them.

Owns the names, shapes and adapter_config.json of a merged adapter. Must not know how factors are merged or who writes.
Legend: R the merged rank.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from pipeline.checkpoints.adapter_fit import Correction
from pipeline.checkpoints.adapter_names import PREFIX, Factors
from pipeline.storage.redaction import bare_name

# peft's word for an adapter without factors.
_NO_MODULES = "dummy-target-modules"
# What a donor tells of the adapter's place that holds for the merge too.
_KEPT = ("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "peft_version", "revision", "task_type")


def factor_names(factors: Factors) -> tuple[str, ...]:
    """Return the names in the file of left and right, as peft stores them; of a bias only the one.

    Args:
        factors: Any update of the tensor: its kind, module and orientation count.
    """
    if factors.kind == "bias":
        return (f"{PREFIX}{factors.module}.lora_B.bias",)
    ends = ("embedding_B", "embedding_A") if factors.kind == "embedding" else ("B.weight", "A.weight")
    left, right = ends[::-1] if factors.transposed else ends
    return f"{PREFIX}{factors.module}.lora_{left}", f"{PREFIX}{factors.module}.lora_{right}"


def stored_shapes(factors: Factors, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes in the file of left and right, as peft stores them; of a bias only the one.

    Args:
        factors: Any update of the tensor: its kind and orientation count.
        shape: The base tensor's.
        rank: R.
    """
    if factors.kind == "bias":
        return (tuple(shape),)
    if factors.transposed:
        return (rank, shape[0]), (shape[1], rank)
    # A kernel's B is a kernel of size one.
    return (shape[0], rank, *(1 for _ in shape[2:])), (rank, *shape[1:])


def replaced_name(name: str, modules: Collection[str] = (), correction: Correction | None = None) -> str:
    """Return the name in the file of a tensor that is stored whole.

    Args:
        name: The base's name for it.
        modules: Paths, in the adapter's words, of the modules that the adapter has factors for: peft wraps these.
        correction: How the adapters' names became the base's.
    """
    path, _, leaf = (correction or Correction()).to_adapter(name).rpartition(".")
    return f"{PREFIX}{path}.base_layer.{leaf}" if path in modules else f"{PREFIX}{path}.{leaf}"


def merged_config(
    donor: Mapping[str, object],
    *,
    ranks: Mapping[str, int],
    modules_to_save: Sequence[str] = (),
    bias: str = "none",
    lora_bias: bool = False,
) -> dict[str, object]:
    """Return the adapter_config.json of a merged adapter, by which peft adds exactly B · A to every module.

    Whole tensors need no word here: peft loads them by their names.

    Args:
        donor: The config of one of the merged adapters.
        ranks: Of every module with factors, by its path in the adapter; positive.
        modules_to_save: Paths of modules of which every tensor is stored whole, which peft then keeps apart from the
            base; those of `ranks` excluded.
        bias: "all" or "lora_only" where the adapters trained the base's biases.
        lora_bias: Whether B has a bias; then it must be stored for every module of `ranks`.

    Returns:
        A JSON object, keys sorted.
    """
    counts = Counter(ranks.values())
    # The most common rank needs no pattern; of equally common ones the smallest.
    common = min(counts, key=lambda rank: (-counts[rank], rank), default=1)
    # Anchored, so that peft's search for a matching end finds this module alone.
    pattern = {"^" + re.escape(module): rank for module, rank in ranks.items() if rank != common}
    config: dict[str, object] = {name: donor[name] for name in _KEPT if name in donor}
    if isinstance(stated := config.get("base_model_name_or_path"), str):
        config["base_model_name_or_path"] = bare_name(stated)
    config |= {
        "peft_type": "LORA",
        "r": common,
        # Equal to the rank: the scale is one.
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "target_modules": list(ranks) or _NO_MODULES,
        "modules_to_save": list(modules_to_save) or None,
        "bias": bias,
        "lora_bias": lora_bias,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return dict(sorted(config.items()))
