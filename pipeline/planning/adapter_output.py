"""What an adapter output holds: the tensors that adapters touch, and what each is stored as.

Owns the choice between factors and whole tensors, and the refusals of families that make no adapter.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence

from pipeline.checkpoints.adapter import Adapter
from pipeline.checkpoints.adapter_names import PREFIX
from pipeline.checkpoints.adapter_output import factor_names, merged_config, replaced_name, stored_shapes
from pipeline.errors import CheckpointError, Problem, RecipeError
from pipeline.numerics.kernels import total_factor
from pipeline.numerics.low_rank import truncated_rank
from pipeline.planning.family import Aligned, Family
from pipeline.planning.plan import GroupPlan, Plan, Stored, TensorPlan
from pipeline.planning.sources import Sources
from pipeline.recipe.references import without_credentials


def adapter_family(family: Family, sources: Sources) -> Family:
    """Return the part of a family that its adapters touch: all that a merged adapter holds.

    Raises:
        CheckpointError: A model is no adapter, adapters stand on different models, or a tensor cannot be replaced.
    """
    problems = []
    overs = dict.fromkeys(sources.overs[index] for index in sources.models)
    for index in sources.models:
        if not isinstance(sources.members[index], Adapter):
            problems.append(
                Problem(
                    what="is a full model: the merge of this family is no low-rank update of a base",
                    where=f"model {without_credentials(sources.names[index])}",
                    remedy="give each model its own weight: one for all models counts for the base too"
                    if index == sources.base
                    else "leave pipeline.output out to write a full model, or list adapters only",
                )
            )
    if not problems and len(overs) > 1:
        names = " and ".join(without_credentials(sources.names[over]) for over in overs if over is not None)
        problems.append(
            Problem(
                what=f"the adapters stand on different models ({names}), so their merge is no adapter of one of them",
                remedy="leave pipeline.output out to write a full model",
            )
        )
    if not problems and sources.base is not None and sources.base not in overs:
        problems.append(
            Problem(
                what="is not the model that the adapters stand on: the merged adapter would start from another",
                where=f"base model {without_credentials(sources.names[sources.base])}",
                remedy="leave base_model out, or pipeline.output",
            )
        )
    if not problems:
        problems = [
            Problem(
                what="is replaced by an adapter, and the base ties it to another: an adapter file would untie the two",
                where=f"tensor {aligned.name}",
                remedy="leave pipeline.output out to write a full model",
            )
            for aligned in family.tensors
            if any(aligned.copies[index] for index in sources.models)
        ]
    if problems:
        raise CheckpointError(*problems)
    _refuse_partial_biases(family)
    touched = tuple(
        aligned
        for aligned in family.tensors
        if aligned.updates or any(aligned.entries[index] is not None for index in sources.models)
    )
    return dataclasses.replace(family, tensors=touched)


def _refuse_partial_biases(family: Family) -> None:
    """Raise when some adapted modules have a bias on B and others have none: peft wants it for all or none."""
    biased = {module_name(aligned, family) for aligned in family.tensors if _is_bias(aligned)}
    plain = {module_name(aligned, family) for aligned in family.tensors if aligned.updates and not _is_bias(aligned)}
    if biased and biased != plain:
        raise CheckpointError(
            Problem(
                what="the adapters have biases on B (lora_bias) for some of their modules only",
                where=f"module {sorted(biased ^ plain)[0]}",
                remedy="leave pipeline.output out to write a full model",
            )
        )


def _is_bias(aligned: Aligned) -> bool:
    return any(factors.right is None for _, factors in aligned.updates)


def refuse_sums(groups: Sequence[GroupPlan]) -> None:
    """Raise when the recipe's weights make a multiple of the base beside the updates, which no adapter holds.

    Raises:
        RecipeError: Names the sum.
    """
    for group in groups:
        total = 1.0 if group.coefficients is None else total_factor(group.coefficients)
        if total != 1.0:
            raise RecipeError(
                Problem(
                    what=f"the weights sum to {total:g}: the base would be in it as often",
                    where=f"group {group.name}",
                    remedy="leave parameters.normalize out, or pipeline.output",
                )
            )


def stored_as(
    aligned: Aligned, family: Family, rank: int | None, *, factored: bool, wrapped: Collection[str]
) -> tuple[tuple[Stored, ...], int | None]:
    """Return what a merged adapter stores of a tensor, and the rank of its factors.

    Two factors; or of a bias the sum of its columns, which has rank 0 here; or the whole tensor, which has none.

    Args:
        aligned: A tensor that adapters touch.
        family: Its family; the first adapter's names are the merged one's.
        rank: The recipe's, or None for the exact one.
        factored: Whether the adapters do nothing but add to it.
        wrapped: Modules that are stored as factors: peft gives their other tensors another name.
    """
    shape = aligned.reference.shape
    if not factored:
        return (Stored(name=replaced_name(aligned.name, wrapped, family.correction), shape=shape),), None
    factors = dataclasses.replace(aligned.updates[0][1], module=module_name(aligned, family))
    names = factor_names(factors)
    if factors.right is None:
        return (Stored(name=names[0], shape=shape),), 0
    ranks = [update.rank for _, update in aligned.updates]
    columns = aligned.reference.elements // max(1, shape[0])
    merged = sum(ranks) if rank is None else truncated_rank(shape[0], columns, ranks, rank)
    shapes = stored_shapes(factors, shape, merged)
    return tuple(Stored(name=name, shape=part) for name, part in zip(names, shapes, strict=True)), merged


def module_name(aligned: Aligned, family: Family) -> str:
    """Return the path of a tensor's module in the words of the first adapter."""
    return family.correction.to_adapter(aligned.name).rpartition(".")[0]


def merged_adapter_config(plan: Plan, sources: Sources) -> dict[str, object]:
    """Return the adapter_config.json of the merged adapter of a plan.

    Args:
        plan: A plan whose output is an adapter.
        sources: Its open inputs.
    """
    over = sources.overs[plan.models[0]]
    base, donor = sources.members[over or 0], sources.members[plan.models[0]]
    names = {tensor.name for tensor in plan.tensors}
    ranks = {module_of(tensor): tensor.merged_rank for tensor in plan.tensors if tensor.merged_rank}
    whole = [tensor for tensor in plan.tensors if tensor.merged_rank is None]
    complete = [
        tensor
        for tensor in whole
        if module_of(tensor) not in ranks
        and all(n in names for n in base.tensors if _parent(n) == _parent(tensor.name))
    ]
    saved = list(dict.fromkeys(module_of(tensor) for tensor in complete))
    biases = any(tensor.name.endswith(".bias") and module_of(tensor) not in saved for tensor in whole)
    return merged_config(
        donor.config,
        ranks=ranks,
        modules_to_save=saved,
        bias="all" if biases else "none",
        lora_bias=any(tensor.merged_rank == 0 for tensor in plan.tensors),
    )


def module_of(tensor: TensorPlan) -> str:
    """Return the module that a stored tensor of a merged adapter belongs to, in the adapter's words."""
    path = tensor.entries[0].name.removeprefix(PREFIX)
    return re.sub(r"\.(base_layer\.[^.]+|lora_[AB]\.[^.]+|lora_embedding_[AB]|[^.]+)$", "", path)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
