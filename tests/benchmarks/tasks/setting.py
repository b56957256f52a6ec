"""What a run is made of: the tasks, how many rows, how experts are trained. Knows nothing of models or merges."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything that decides what the experts become.

    Attributes:
        family: "encoder" or "decoder".
        tasks: Their names.
        train_rows: At most, of a task; so are the others.
        tokens: Of a text; the rest is cut off.
        head_decay: Half the factor of the squared length of the head's weights, added to the mean loss.
        train_embeddings: False where the embedding is most of the model and rows are few.
    """

    family: str
    tasks: tuple[str, ...]
    train_rows: int
    validation_rows: int
    test_rows: int
    tokens: int
    epochs: int
    learning_rate: float
    batch_rows: int = 16
    head_decay: float = 0.3
    train_embeddings: bool = True
    seed: int = 0

    def digest(self) -> str:
        """Return a text that differs when any of it does."""
        return sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


ENCODER = Setting(
    family="encoder",
    tasks=("newsgroups", "reuters", "tweets", "films"),
    train_rows=640,
    validation_rows=100,
    test_rows=400,
    tokens=48,
    epochs=3,
    learning_rate=1e-4,
)
# A model six times as large and of thirty layers: fewer and shorter texts.
DECODER = Setting(
    family="decoder",
    tasks=("reuters", "tweets", "films"),
    train_rows=128,
    validation_rows=48,
    test_rows=128,
    tokens=32,
    epochs=2,
    learning_rate=5e-5,
    train_embeddings=False,
)
