"""Whether the models' config files describe the same computation.

Owns the knowledge which keys of a config.json change what the weights mean and which only describe their history.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pipeline.checkpoints.checkpoint import Checkpoint
from pipeline.checkpoints.ties import is_output_embedding
from pipeline.errors import Problem

# Keys that change the computation: two models that differ here are two functions, and their mean is neither.
_COMPUTATION = re.compile(
    r"^(model_type|architectures|tie_word_embeddings|hidden_act\w*|activation\w*|dense_act_fn|feed_forward_proj|is_gated_act"
    r"|hidden_size|intermediate_size|d_model|d_ff|d_kv|n_embd|n_head|n_layer|num_\w*heads|num_\w*layers|head_dim|\w*head_dim"
    r"|rope_\w+|rotary_\w+|partial_rotary_factor|mrope_section|beta_fast|beta_slow|factor|mscale\w*|(low|high)_freq_factor"
    r"|original_max_position_embeddings|rope_type|position_embedding_type|alibi\w*|relative_attention_\w+"
    r"|(\w+_)?(eps|epsilon)|norm_type|sliding_window\w*|use_sliding_window|layer_types|max_window_layers"
    r"|attention_bias|mlp_bias|use_bias|qkv_bias|attn_logit_softcapping|final_logit_softcapping|logit_scale|attention_multiplier"
    r"|embedding_multiplier|residual_multiplier|logits_scaling|query_pre_attn_scalar|scale_\w+|use_parallel_residual|parallel_attn"
    r"|num_experts\w*|num_local_experts|n_routed_experts|n_shared_experts|norm_topk_prob|routed_scaling_factor|topk_\w+"
    r"|scoring_func|moe_\w+|decoder_sparse_step|type_vocab_size|pooling_mode\w*|is_decoder|add_cross_attention)$"
)
# Keys that never matter to a merge: history, training-only settings, labels of the serializer.
_HISTORY = re.compile(
    r"^(_.*|transformers_version|torch_dtype|dtype|use_cache|\w*dropout\w*|\w*_pdrop|initializer_\w+|gradient_checkpointing"
    r"|finetuning_task|problem_type|id2label(\..*)?|label2id(\..*)?|output_\w+|return_dict|unsloth_\w+|auto_map(\..*)?"
    r"|router_aux_loss_coef|pretraining_tp|vocab_size|chunk_size_feed_forward|num_labels)$"
)

# Where configs keep what concerns rotary position embeddings.
_ROPE = ("rope_parameters", "rope_scaling")
# Tensors of a PEFT adapter: the two factors, and what else it stores beside them.
_ADAPTER = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")


def compare_configs(checkpoints: Sequence[Checkpoint]) -> tuple[list[Problem], list[str]]:
    """Return what differs between the config files: problems where it changes the computation, notes elsewhere.

    A key that one file leaves out is compared only when both state it: its default is the library's affair.

    Args:
        checkpoints: The family, reference first; models without a config.json are not compared.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    with_config = [checkpoint for checkpoint in checkpoints if checkpoint.config]
    if not with_config:
        return problems, notes
    reference = with_config[0]
    wanted = _flat(reference.config)
    for model in with_config[1:]:
        found = _flat(model.config)
        for key in [key for key in wanted if key in found and wanted[key] != found[key]]:
            leaf = key.rpartition(".")[2]
            text = f"{key} is {_short(found[key])}, but {_short(wanted[key])} in {reference.url}"
            if _COMPUTATION.match(leaf) or _COMPUTATION.match(key):
                problems.append(
                    Problem(
                        what=text,
                        where=f"model {model.url}, config.json",
                        remedy="the two compute different functions; leave one out or correct its config",
                    )
                )
            elif not (_HISTORY.match(leaf) or _HISTORY.match(key)):
                notes.append(f"{model.url}: config.json {text}; the output takes the reference's")
    return problems, notes


def quantization_problems(checkpoint: Checkpoint) -> list[Problem]:
    """Return a problem when the weights are codes of a quantizer, whose elements must not be averaged."""
    method = checkpoint.config.get("quantization_config")
    scales = [name for name in checkpoint.tensors if name.endswith(("weight_scale", "weight_scale_inv", "qzeros"))]
    if not method and not scales:
        return []
    reason = f"config.json has a quantization_config ({_short(method)})" if method else f"it stores {scales[0]}"
    return [
        Problem(
            what=f"the weights are quantized: {reason}",
            where=f"model {checkpoint.url}",
            remedy="merge the unquantized checkpoints and quantize the result",
        )
    ]


def adapter_problems(checkpoint: Checkpoint) -> list[Problem]:
    """Return a problem when the weights are an adapter's factors: their means are no factors of the mean."""
    factors = [name for name in checkpoint.tensors if _ADAPTER.search(name)]
    if not factors:
        return []
    return [
        Problem(
            what=f"is an adapter, or has one inside: it stores {factors[0]}",
            where=f"model {checkpoint.url}",
            remedy="name the folder with its adapter_config.json, or merge it into its base (peft: merge_and_unload)",
        )
    ]


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return a config as dotted keys; `rope_parameters` and `rope_scaling` count as the older top-level spelling."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if key == "rope_scaling" and value is None:
            continue
        if isinstance(value, Mapping):
            inner = prefix if key in _ROPE else f"{prefix}{key}."
            flat.update(_flat(value, inner))
        else:
            flat[prefix + key] = value
    _settle_rope(config, flat, prefix)
    return flat


def _settle_rope(config: Mapping[str, object], flat: dict[str, object], prefix: str) -> None:
    """Spell out the kind of rotary embedding, so that a model with scaled positions differs from one without."""
    inner = [value for key in _ROPE if isinstance(value := config.get(key), Mapping)]
    if any(isinstance(part, Mapping) for value in inner for part in value.values()):
        return  # one setting per kind of layer: each names its own
    if inner or "rope_scaling" in config or "rope_theta" in config:
        older = flat.pop(f"{prefix}type", "default")
        kind = flat.get(f"{prefix}rope_type", older)
        # transformers reads the older name of Qwen2-VL as the newer one.
        flat[f"{prefix}rope_type"] = "default" if kind == "mrope" else kind


def _short(value: object) -> str:
    """Return a value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def headless_problems(checkpoint: Checkpoint) -> list[Problem]:
    """Return a problem when a language model stores no output embedding although it is not tied: its head is lost."""
    architectures = checkpoint.config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    generates = any(str(name).endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names)
    text = checkpoint.config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    tied = checkpoint.config.get("tie_word_embeddings", nested)
    if not generates or tied is not False or any(is_output_embedding(name) for name in checkpoint.tensors):
        return []
    return [
        Problem(
            what="has no output embedding (lm_head), and config.json says that it is not tied to the input embedding",
            where=f"model {checkpoint.url}",
            remedy="use a complete checkpoint, or set tie_word_embeddings to true if the head is tied",
        )
    ]
