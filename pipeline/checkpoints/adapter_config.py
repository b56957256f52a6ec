"""What an adapter_config.json says of the scale of each update, and which of its settings are no plain updates at all.

Owns every field of peft's LoraConfig: read, harmless, or refused by name; and peft's matching of patterns to modules.
Must not know tensors or files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.checkpoints.json_text import short
from pipeline.errors import CheckpointError, Problem

MERGE_FIRST = "peft: merge_and_unload with its base, and list the result"

# Fields that are read here or elsewhere, or that say nothing of what the stored tensors mean: history, the choice of
# modules (the tensors themselves tell), settings of training, and of initialisations that leave the base as it is.
# Source: LoraConfig of peft 0.21; then fields of older versions and of other trainers.
_HARMLESS = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "fan_in_fan_out",
        "bias",
        "lora_bias",
        "modules_to_save",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "ensure_weight_tying",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "qalora_group_size",
        "runtime_config",
        "merge_weights",
        "unsloth_fixed",
    }
)
# Fields whose use makes the update something else than scale · B · A added to one tensor.
_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA rescales the whole weight, so it is no low-rank update",
    "use_qalora": "QALoRA pools the input, so its factors do not have the weight's shape",
    "use_bdlora": "its factors are block-diagonal and stored as blocks",
    "alora_invocation_tokens": "an activated adapter acts on some tokens only, so no weights express it",
    "layer_replication": "it repeats layers of the base, so the model has another shape",
    "trainable_token_indices": "it changes single rows of an embedding",
    "target_parameters": "it adds to parameters that are no module's weight, nested in one another",
    "megatron_config": "it is split over Megatron's parallel layers",
    "arrow_config": "it routes between adapters by the input, so no weights express it",
    "monteclora_config": "MonteCLoRA samples its factors",
    "kasa_config": "KaSA truncates the base and puts a diagonal between the factors",
    "enable_lora": "it is of an old kind that adapts parts of a fused matrix",
}
# Initialisations that leave the base as it is.
_NEUTRAL_STARTS = ("gaussian", "eva", "orthogonal", "mica")
# Initialisations that subtract the factors' first value from the base.
_MUTATING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Of one pattern: so many repetitions of anything take milliseconds on the longest names, more take for ever.
_MOST_REPEATS = 4
_LONGEST_PATTERN = 1000
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Rank and scale of every module of an adapter.

    Attributes:
        rank: Where no pattern matches.
        alpha: Where no pattern matches.
        ranks: Pattern and rank, the first that matches counts.
        alphas: Pattern and alpha, likewise.
        rank_stabilized: Whether the scale is alpha / √rank and not alpha / rank.
        fan_in_fan_out: Whether linear weights are said to be stored as (in, out).
    """

    rank: int
    alpha: float
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    rank_stabilized: bool
    fan_in_fan_out: bool

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, by its path in the adapter."""
        return next((rank for pattern, rank in self.ranks if pattern.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Return what multiplies B · A in a module.

        Source: Hu et al., LoRA (2021), §4.1; Kalajdzievski, rank-stabilized LoRA (2023), eq. 3.
        """
        rank = self.rank_of(module)
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.match(module)), self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


def lora_settings(config: Mapping[str, object], where: str) -> LoraSettings:
    """Return what a config says of ranks and scales.

    Args:
        config: The content of adapter_config.json.
        where: Its place, for messages.

    Raises:
        CheckpointError: All that makes it no plain LoRA adapter, or that is no number where one is needed.
    """
    found = [*_kind_problems(config), *_field_problems(config)]
    if not found:
        found += _value_problems(config)
    if found:
        raise CheckpointError(*(Problem(what=what, where=where, remedy=remedy) for what, remedy in found))
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    return LoraSettings(
        rank=rank if isinstance(rank, int) else 0,
        alpha=_number(alpha) or 0.0,
        ranks=tuple((_compiled(key), int(_number(value) or 0)) for key, value in _pairs(config, "rank_pattern")),
        alphas=tuple((_compiled(key), _number(value) or 0.0) for key, value in _pairs(config, "alpha_pattern")),
        rank_stabilized=config.get("use_rslora") is True,
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
    )


def _kind_problems(config: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the method and the start: fact and remedy."""
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {short(kind)}, only 'LORA' is known here", MERGE_FIRST
    start = config.get("init_lora_weights")
    if start is None or isinstance(start, bool):
        return
    name = str(start).lower()
    if name.startswith(_MUTATING_STARTS):
        yield (
            f"init_lora_weights is {short(start)}, which changed the base: these factors do not fit the original",
            f"{MERGE_FIRST}; or convert it by save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    elif name not in _NEUTRAL_STARTS:
        yield f"init_lora_weights is {short(start)}, which is unknown: it may have changed the base", MERGE_FIRST


def _field_problems(config: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield the fields in use that are refused or unknown: fact and remedy."""
    for name, value in config.items():
        # Null, false and empty lists switch a field off; {} switches a method on with its defaults.
        if name in _HARMLESS or (not value and not (name in _REFUSED and value == {})):
            continue
        if name in _REFUSED:
            yield f"{name} is {short(value)}: {_REFUSED[name]}", MERGE_FIRST
        else:
            yield f"has the unknown setting {short(name)}: {short(value)}, which may change what it means", MERGE_FIRST


def _value_problems(config: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield numbers, switches and patterns that are none: fact and remedy."""
    remedy = "correct it to what the adapter was trained with"
    numbers = [("r", config.get("r", 8)), ("lora_alpha", config.get("lora_alpha", 8))]
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, Mapping):
            yield f"{name} is {short(config[name])}, which is no mapping from modules to numbers", remedy
            continue
        numbers += [(f"{name} of {short(key)}", value) for key, value in _pairs(config, name)]
        for key, _ in _pairs(config, name):
            if _is_endless(key):
                yield f"{name} has {short(key)}, which may take for ever to match", "name the modules in simpler words"
                continue
            try:
                _compiled(key)
            except (re.error, OverflowError, RecursionError) as error:
                yield f"{name} has {short(key)}, which is no regular expression: {error}", remedy
    for name, value in numbers:
        is_rank = name == "r" or name.startswith("rank_pattern")
        if is_rank and (type(value) is not int or value <= 0):
            yield f"{name} is {short(value)}, which is no positive integer", remedy
        elif not is_rank and _number(value) is None:
            yield f"{name} is {short(value)}, which is no finite number", remedy
    for name in ("use_rslora", "fan_in_fan_out", "lora_bias"):
        if not isinstance(config.get(name) or False, bool):
            yield f"{name} is {short(config[name])}, which is neither true nor false", remedy
    if (bias := config.get("bias", "none")) not in _BIASES:
        yield f"bias is {short(bias)}, known are {', '.join(_BIASES)}", remedy


def _number(value: object) -> float | None:
    """Return a finite number, or None; JSON's true is an int to Python."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _pairs(config: Mapping[str, object], name: str) -> tuple[tuple[str, object], ...]:
    found = config.get(name)
    return tuple(found.items()) if isinstance(found, Mapping) else ()


def _is_endless(pattern: str) -> bool:
    """Return whether matching may take exponential time: repetitions inside of repetitions, or many of them.

    Errs on the safe side; the patterns that peft's users write are names with a range or two.
    """
    groups, repeats, in_set = [False], 0, False
    previous = ""
    for index, letter in enumerate(pattern):
        if previous == "\\":
            previous = ""
            continue
        if in_set:
            in_set = letter != "]"
        elif letter == "[":
            in_set = True
        elif letter == "(":
            groups.append(False)
        elif letter == ")" and len(groups) > 1:
            inner = groups.pop()
            if inner and pattern[index + 1 : index + 2] in ("*", "+", "{"):
                return True
            groups[-1] = groups[-1] or inner
        elif letter in "*+{":
            groups[-1] = True
            repeats += 1
        previous = letter
    return repeats > _MOST_REPEATS or len(pattern) > _LONGEST_PATTERN


def _compiled(pattern: str) -> re.Pattern[str]:
    """Return the expression by which peft matches the end of a module's path, whole parts: `get_pattern_key`."""
    return re.compile(rf"(.*\.)?({pattern})$")
