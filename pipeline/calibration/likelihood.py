"""The log-likelihood whose gradient is the score: of the data's labels, of drawn ones, of all.

Owns reduction over tokens and the drawing. Must not know what is done with the gradients.

B examples, T tokens, V tokens of the vocabulary, C classes. One score is a pair (weight_B, loglik_B): the Fisher
information is the sum over the scores of weight · (∂loglik)(∂loglik)ᵀ, in the mean over the examples.
"""

from __future__ import annotations

import hashlib

import torch

from pipeline.calibration.batches import NOT_ASKED, Batch
from pipeline.calibration.settings import Settings

Score = tuple[torch.Tensor, torch.Tensor]


def scores(logits: torch.Tensor, batch: Batch, settings: Settings) -> list[Score]:
    """Return the weighted log-likelihoods of a batch.

    Args:
        logits: [B, C] or [B, T, V], with their graph.
        batch: The examples.
        settings: Labels, reduction and seed.

    Returns:
        One score, or one a class for "exact"; the weights are without a graph.

    Source: Martens 2020, "New insights and perspectives on the natural gradient method", §5 (drawn labels against the
        data's); Matena & Raffel 2022, "Merging models with Fisher-weighted averaging", eq. 4 (the sum over classes).
    """
    if batch.targets_BT is None:
        return _of_classes(logits.log_softmax(-1), batch, settings)
    targets_BT = batch.targets_BT
    if settings.labels == "sampled":
        targets_BT = _drawn_tokens(logits, batch, settings.seed)
    asked_BT = targets_BT != NOT_ASKED
    picked_BT = logits.log_softmax(-1).gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]
    total_B = torch.where(asked_BT, picked_BT, 0.0).sum(-1)
    if settings.reduction == "mean":
        total_B = total_B / asked_BT.sum(-1)
    return [(torch.ones_like(total_B.detach()), total_B)]


def _of_classes(logs_BC: torch.Tensor, batch: Batch, settings: Settings) -> list[Score]:
    if settings.labels == "exact":
        weights_BC = logs_BC.detach().exp()
        return [(weights_BC[:, label], logs_BC[:, label]) for label in range(logs_BC.shape[1])]
    if settings.labels == "sampled":
        draws = [
            _draw(logs_C.detach().exp()[None], settings.seed, number)
            for logs_C, number in zip(logs_BC, batch.numbers, strict=True)
        ]
        labels_B = torch.cat(draws).to(logs_BC.device)
    elif batch.labels_B is None:
        raise ValueError("the examples have no labels")
    else:
        labels_B = batch.labels_B
    chosen_B = logs_BC.gather(1, labels_B[:, None])[:, 0]
    return [(torch.ones_like(chosen_B.detach()), chosen_B)]


def _drawn_tokens(logits: torch.Tensor, batch: Batch, seed: int) -> torch.Tensor:
    """Return targets drawn from the model's own probabilities, one for every token that the data asks for."""
    asked = batch.targets_BT
    if asked is None:
        raise ValueError("the examples have no targets")
    drawn_BT = asked.clone()
    for row, number in enumerate(batch.numbers):
        places_T = asked[row] != NOT_ASKED
        chances = logits[row][places_T].detach().softmax(-1)
        drawn_BT[row, places_T] = _draw(chances, seed, number).to(drawn_BT.device)
    return drawn_BT


def _draw(chances_TV: torch.Tensor, seed: int, number: int) -> torch.Tensor:
    """Return a draw from each row, the same for the same seed and example wherever it stands in a batch."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    # Seeds of torch have 64 bits, signed.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.multinomial(chances_TV.to("cpu", torch.float64), 1, generator=generator)[:, 0]
