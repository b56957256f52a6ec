"""Squares and outer products of gradients against transformers' own loss, an example at a time, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.calibration.batches import make_batch
from pipeline.calibration.examples import Example
from pipeline.calibration.fisher import GradientMoments
from pipeline.calibration.likelihood import scores
from pipeline.calibration.opening import open_model
from pipeline.calibration.settings import Settings
from tests.calibration import models
from tests.calibration.runs import assert_close, collect, raw_values, value

LABELLED = models.token_rows(5, seed=1, label=models.label)
PAIRS = models.token_rows(5, seed=2, target=models.tokens)


def squares(model: Any, losses: list[tuple[float, Callable[[], torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Σ weight · (∂loss)² by parameter."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for weight, loss in losses:
        model.zero_grad()
        loss().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += weight * parameter.grad**2
    return sums


def given(row: dict[str, Any], label: object) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([label])}


def check(found: Any, wanted: dict[str, torch.Tensor], examples: int) -> None:
    assert found.parameters("diagonal") == tuple(name for name in wanted if found.find("diagonal", name))
    assert not found.reasons
    for name, total in wanted.items():
        assert_close(value(found, "diagonal", name), total / examples, 1e-4)


def test_empirical_fisher_of_a_classifier(bert: Path, tmp_path: Path) -> None:
    found = collect(bert, LABELLED, tmp_path / "out", statistics="fisher")
    model = models.loaded(bert).double()
    losses = [(1.0, lambda row=row: model(**given(row, row["label"])).loss) for row in LABELLED]
    check(found, squares(model, losses), len(LABELLED))
    assert (found.facts.normalisation, found.facts.labels) == ("examples", "empirical")


def test_exact_fisher_is_the_sum_over_the_classes(bert: Path, tmp_path: Path) -> None:
    found = collect(bert, LABELLED, tmp_path / "out", statistics="fisher", labels="exact")
    model = models.loaded(bert).double()
    losses = []
    for row in LABELLED:
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([row["input_ids"]])).logits.softmax(-1)[0]
        for label in range(models.CLASSES):
            losses.append((float(chances[label]), lambda row=row, label=label: model(**given(row, label)).loss))
    check(found, squares(model, losses), len(LABELLED))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_fisher_of_both_language_models(llama: Path, t5: Path, tmp_path: Path, reduction: str) -> None:
    rows = models.token_rows(4, seed=3)
    found = collect(llama, rows, tmp_path / "llama", statistics="fisher", reduction=reduction)
    model = models.loaded(llama).double()

    def times(count: int) -> int:
        return count if reduction == "sum" else 1

    losses = [
        (1.0, lambda row=row: times(len(row["input_ids"]) - 1) * model(**given(row, row["input_ids"])).loss)
        for row in rows
    ]
    check(found, squares(model, losses), len(rows))
    found = collect(t5, PAIRS, tmp_path / "t5", statistics="fisher", reduction=reduction)
    model = models.loaded(t5).double()
    losses = [
        (1.0, lambda row=row: times(len(row["target"])) * model(**given(row, row["target"])).loss) for row in PAIRS
    ]
    check(found, squares(model, losses), len(PAIRS))


def test_only_the_continuation_of_a_prompt_counts(llama: Path, tmp_path: Path) -> None:
    rows = models.token_rows(3, seed=4, answer=models.tokens)
    found = collect(llama, rows, tmp_path / "out", statistics="fisher", label_field="answer")
    model = models.loaded(llama).double()

    def loss(row: dict[str, Any]) -> torch.Tensor:
        prompt, said = row["input_ids"], row["answer"]
        asked = {"input_ids": torch.tensor([[*prompt, *said]]), "labels": torch.tensor([[-100] * len(prompt) + said])}
        return model(**asked).loss

    check(found, squares(model, [(1.0, lambda row=row: loss(row)) for row in rows]), len(rows))


def test_blocks_are_outer_products_of_vectors(bert: Path, tmp_path: Path) -> None:
    found = collect(bert, LABELLED, tmp_path / "out", statistics="block")
    model = models.loaded(bert).double()
    sums: dict[str, torch.Tensor] = {}
    for row in LABELLED:
        model.zero_grad()
        model(**given(row, row["label"])).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                sums[name] = sums.get(name, 0) + torch.outer(parameter.grad, parameter.grad)
    assert set(found.parameters("block")) == set(sums)
    for name, total in sums.items():
        assert_close(value(found, "block", name), total / len(LABELLED), 1e-4)
    assert found.outside("classifier.weight") == "no vector"


def test_little_room_takes_more_passes_and_the_same_bits(bert: Path, tmp_path: Path) -> None:
    stages = []

    def listen(event: object) -> None:
        if type(event).__name__ == "StageEnded":
            stages.append(event)

    once = collect(bert, LABELLED, tmp_path / "once", statistics="fisher", listener=listen)
    assert len(stages) == 1
    little = collect(bert, LABELLED, tmp_path / "little", statistics="fisher", memory_bytes=33_700_000, listener=listen)
    assert len(stages) > 2
    assert raw_values(once) == raw_values(little)


def test_drawn_labels_depend_on_the_seed_alone(llama: Path, tmp_path: Path) -> None:
    rows = models.token_rows(4, seed=3)

    def drawn(name: str, **settings: Any) -> dict[str, bytes]:
        return raw_values(collect(llama, rows, tmp_path / name, statistics="fisher", labels="sampled", **settings))

    first = drawn("first", seed=1)
    assert drawn("again", seed=1, batch=2) == first
    assert drawn("other", seed=2) != first


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_drawn_labels_follow_the_model_s_probabilities(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    model = open_model(str(folder), None, "cpu")
    # The same text many times: only the number of the example differs.
    examples = [Example(number=number, tokens=(3, 5, 7)) for number in range(3000)]
    batch = make_batch(examples, model.task, model.special)
    logits = torch.tensor([0.5, -1.0, 0.2, 1.0]).expand(len(examples), 4).clone().requires_grad_(True)
    if model.task == "causal":
        logits = logits[:, None].expand(-1, 3, -1)
    ((weight_B, loglik_B),) = scores(logits, batch, Settings(statistics="fisher", labels="sampled"))
    assert bool((weight_B == 1).all())
    chances = torch.tensor([0.5, -1.0, 0.2, 1.0]).softmax(-1)
    if model.task == "causal":
        # The mean of two independent tokens: its mean is the negative entropy.
        assert float(loglik_B.detach().mean()) == pytest.approx(float((chances * chances.log()).sum()), abs=0.05)
        return
    for chance in chances:
        share = float((loglik_B.exp() - chance).abs().lt(1e-5).float().mean())
        # Five standard deviations of a share of 3000.
        assert abs(share - float(chance)) < 5 * float((chance * (1 - chance) / 3000).sqrt())


def test_squares_of_a_batch_are_refused(bert: Path) -> None:
    model = open_model(str(bert), None, "cpu")
    model.load(model.parameters.values())
    moments = GradientMoments(model.parameters)
    moments.gather([("diagonal", "classifier.bias")])
    mixed = model.parameters["classifier.bias"].value[:2] * 1.0
    with pytest.raises(ValueError, match="batch"):
        moments.add([(torch.ones(2), mixed)])
