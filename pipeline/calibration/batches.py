"""Examples as tensors: padded, and with the masks that say which tokens count.

Owns the padding and the shift of what is to be predicted. Importing this module imports torch.

B examples of a batch, T tokens of the longest one (S of the encoder where there are two sides).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.calibration.examples import Example
from pipeline.calibration.settings import Task

# Targets that nobody asks for.
NOT_ASKED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Special:
    """Token ids with a meaning: what pads, and what a decoder begins with."""

    padding: int
    begin: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some examples as a model takes them.

    Attributes:
        numbers: Of the examples.
        inputs: The model's arguments by name.
        mask_BT: Which tokens are no padding, bool; of the decoder where there are two sides.
        encoder_mask_BS: Those of the encoder; None where there is one side.
        targets_BT: What follows each token, int64, `NOT_ASKED` where it does not count; None for "classification".
        labels_B: Classes, int64; None where there are none.
    """

    numbers: tuple[int, ...]
    inputs: dict[str, torch.Tensor]
    mask_BT: torch.Tensor
    encoder_mask_BS: torch.Tensor | None = None
    targets_BT: torch.Tensor | None = None
    labels_B: torch.Tensor | None = None


def batches(
    examples: Sequence[Example], size: int, task: Task, special: Special, device: str = "cpu"
) -> Iterator[Batch]:
    """Yield the examples in their order, `size` at a time, the last batch with what is left."""
    for start in range(0, len(examples), size):
        yield make_batch(examples[start : start + size], task, special, device)


def make_batch(examples: Sequence[Example], task: Task, special: Special, device: str = "cpu") -> Batch:
    """Return examples as one batch, padded on the right.

    Args:
        examples: At least one.
        task: What the model does.
        special: The tokens that pad and begin.
        device: torch's name.
    """
    tokens_BT = _padded([example.tokens for example in examples], special.padding, device)
    mask_BT = _mask([len(example.tokens) for example in examples], device)
    inputs = {"input_ids": tokens_BT, "attention_mask": mask_BT.long()}
    if any(example.types for example in examples):
        inputs["token_type_ids"] = _padded([example.types for example in examples], 0, device)
    numbers = tuple(example.number for example in examples)
    if task == "classification":
        labels = [example.label for example in examples if example.label is not None]
        labels_B = torch.tensor(labels, device=device) if len(labels) == len(examples) else None
        return Batch(numbers=numbers, inputs=inputs, mask_BT=mask_BT, labels_B=labels_B)
    if task == "causal":
        following = [_following(example) for example in examples]
        targets_BT = _padded(following, NOT_ASKED, device)
        return Batch(numbers=numbers, inputs=inputs, mask_BT=mask_BT, targets_BT=targets_BT)
    begin = special.padding if special.begin is None else special.begin
    said_BT = _padded([(begin, *example.targets[:-1]) for example in examples], special.padding, device)
    decoder_mask_BT = _mask([len(example.targets) for example in examples], device)
    inputs |= {"decoder_input_ids": said_BT, "decoder_attention_mask": decoder_mask_BT.long()}
    return Batch(
        numbers=numbers,
        inputs=inputs,
        mask_BT=decoder_mask_BT,
        encoder_mask_BS=mask_BT,
        targets_BT=_padded([example.targets for example in examples], NOT_ASKED, device),
    )


def _following(example: Example) -> tuple[int, ...]:
    """Return for each token the one that follows, where it is to be predicted."""
    asked = (
        token if place >= example.unasked else NOT_ASKED for place, token in enumerate(example.tokens[1:], start=1)
    )
    return (*asked, NOT_ASKED)


def _padded(rows: Sequence[Sequence[int]], padding: int, device: str) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=torch.int64, device=device)


def _mask(lengths: Sequence[int], device: str) -> torch.Tensor:
    places_T = torch.arange(max(lengths), device=device)
    return places_T[None, :] < torch.tensor(lengths, device=device)[:, None]
