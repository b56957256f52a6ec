"""Grams against what transformers' own model sees, an example at a time and unpadded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.calibration import models
from tests.calibration.runs import assert_close, collect, value

ROWS = {
    "bert": models.token_rows(7, label=models.label),
    "llama": models.token_rows(7),
    "t5": models.token_rows(7, target=models.tokens),
}


def arguments(name: str, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the model takes for one row: no padding, hence no masks."""
    tokens = {"input_ids": torch.tensor([row["input_ids"]])}
    return {**tokens, "labels": torch.tensor([row["target"]])} if name == "t5" else tokens


@contextmanager
def inputs_of(model: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record the rows that every linear layer gets, by the layer's name."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def hook(module: nn.Module, given: tuple[torch.Tensor], name: str = name) -> None:
                seen.setdefault(f"{name}.weight", []).append(given[0].detach().double().flatten(0, -2))

            handles.append(module.register_forward_pre_hook(hook))
    yield seen
    for handle in handles:
        handle.remove()


def dense_grams(name: str, folder: Path) -> dict[str, torch.Tensor]:
    model = models.loaded(folder)
    with inputs_of(model) as seen, torch.no_grad():
        for row in ROWS[name]:
            model(**arguments(name, row))
    joined = {layer: torch.cat(rows) for layer, rows in seen.items()}
    return {layer: rows.T @ rows / len(rows) for layer, rows in joined.items()}


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_grams_are_those_of_single_unpadded_examples(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    wanted = dense_grams(name, folder)
    found = collect(folder, ROWS[name], tmp_path / "out", statistics="gram")
    # T5's config of transformers ties the scores to the embedding, whatever it is asked for.
    missing = {"lm_head.weight"} if name == "t5" else set()
    assert set(found.parameters("input_gram")) == set(wanted) - missing
    for layer in found.parameters("input_gram"):
        assert_close(value(found, "input_gram", layer), wanted[layer])
    assert (found.facts.examples, found.facts.labels, found.facts.reduction) == (7, "none", "none")
    assert found.facts.tokens == sum(len(row["input_ids"]) + len(row.get("target", ())) for row in ROWS[name])


def test_layers_with_one_input_share_one_gram(llama: Path, bert: Path, t5: Path, tmp_path: Path) -> None:
    found = collect(llama, ROWS["llama"], tmp_path / "llama", statistics="gram")
    layer = "model.layers.1."
    q_proj = found.find("input_gram", layer + "self_attn.q_proj.weight")
    gate_proj = found.find("input_gram", layer + "mlp.gate_proj.weight")
    for follower in ("self_attn.k_proj", "self_attn.v_proj"):
        assert found.find("input_gram", f"{layer}{follower}.weight") == q_proj
    assert found.find("input_gram", layer + "mlp.up_proj.weight") == gate_proj
    assert len({q_proj, gate_proj, found.find("input_gram", layer + "self_attn.o_proj.weight")}) == 3
    found = collect(bert, ROWS["bert"], tmp_path / "bert", statistics="gram")
    prefix = "bert.encoder.layer.0.attention.self."
    assert len({found.find("input_gram", f"{prefix}{name}.weight") for name in ("query", "key", "value")}) == 1
    found = collect(t5, ROWS["t5"], tmp_path / "t5", statistics="gram")
    # What looks at the encoder's output: keys and values of all decoder layers.
    crossing = [f"decoder.block.{n}.layer.1.EncDecAttention.{name}.weight" for n in range(3) for name in "kv"]
    assert len({found.find("input_gram", name) for name in crossing}) == 1
    query = found.find("input_gram", "decoder.block.0.layer.1.EncDecAttention.q.weight")
    assert query != found.find("input_gram", crossing[0])


def test_every_tensor_has_a_statistic_or_a_reason(bert: Path, tmp_path: Path) -> None:
    found = collect(bert, ROWS["bert"], tmp_path / "gram", statistics="gram")
    for name, parameter in models.loaded(bert).named_parameters():
        has_gram = found.find("input_gram", name) is not None
        assert has_gram == (found.outside(name) is None)
        assert has_gram == (parameter.dim() == 2 and "embeddings" not in name)
    assert found.outside("bert.embeddings.word_embeddings.weight") == "embedding"
    assert found.outside("bert.embeddings.LayerNorm.bias") == "bias"
    assert found.outside("bert.embeddings.LayerNorm.weight") == "norm"


def numeric_scores(
    model: nn.Module, layer: nn.Linear, given: dict[str, torch.Tensor], picked: list[tuple[int, int]]
) -> torch.Tensor:
    """The gradient of log-probabilities [token of the target, or class] by a layer's output [token, element].

    By differences of fourth order: nothing of autograd is used. Norms of some models compute in fp32 whatever they get,
    so the step is large.
    """
    step = 1e-2
    with torch.no_grad():
        width = layer.out_features
        length = int(given["input_ids" if "labels" not in given else "labels"].shape[1])
        found = torch.zeros(len(picked), length, width, dtype=torch.float64)
        for place in range(length):
            for element in range(width):
                values = []
                for times in (1.0, -1.0, 2.0, -2.0):

                    def nudge(
                        module: nn.Module,
                        given: object,
                        output: torch.Tensor,
                        at: tuple[int, int] = (place, element),
                        by: float = times * step,
                    ) -> torch.Tensor:
                        moved = output.clone()
                        moved[0, at[0], at[1]] += by
                        return moved

                    handle = layer.register_forward_hook(nudge)
                    logs = model(**given).logits.log_softmax(-1)[0]
                    handle.remove()
                    values.append(torch.stack([logs[index] for index in picked]))
                near, far = values[0] - values[1], values[2] - values[3]
                found[:, place, element] = (8 * near - far) / (12 * step)
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_output_grams_match_finite_differences_of_a_causal_model(llama: Path, tmp_path: Path, reduction: str) -> None:
    rows = models.token_rows(3, seed=5)
    found = collect(llama, rows, tmp_path / "out", statistics="kfac", reduction=reduction)
    model = models.loaded(llama).double()
    name = "model.layers.1.self_attn.k_proj.weight"
    layer = model.get_submodule(name.removesuffix(".weight"))
    sums, count = torch.zeros(layer.out_features, layer.out_features, dtype=torch.float64), 0
    for row in rows:
        tokens = row["input_ids"]
        picked = [(place, tokens[place + 1]) for place in range(len(tokens) - 1)]
        scores = numeric_scores(model, layer, {"input_ids": torch.tensor([tokens])}, picked).sum(0)
        scores /= len(picked) if reduction == "mean" else 1
        sums += scores.T @ scores
        count += len(tokens)
    assert_close(value(found, "output_gram", name), sums / count, 2e-4)


def test_exact_output_grams_weigh_every_class_by_its_probability(bert: Path, tmp_path: Path) -> None:
    rows = models.token_rows(4, seed=6)
    found = collect(bert, rows, tmp_path / "out", statistics="kfac", labels="exact")
    model = models.loaded(bert).double()
    name = "bert.encoder.layer.2.output.dense.weight"
    layer = model.get_submodule(name.removesuffix(".weight"))
    sums, count = torch.zeros(layer.out_features, layer.out_features, dtype=torch.float64), 0
    for row in rows:
        given = {"input_ids": torch.tensor([row["input_ids"]])}
        with torch.no_grad():
            chances = model(**given).logits.softmax(-1)[0]
        scores = numeric_scores(model, layer, given, [(label,) for label in range(models.CLASSES)])
        sums += sum(chance * (score.T @ score) for chance, score in zip(chances, scores, strict=True))
        count += len(row["input_ids"])
    assert_close(value(found, "output_gram", name), sums / count, 2e-4)


def test_output_grams_of_two_sides_do_not_see_padding(t5: Path, tmp_path: Path) -> None:
    together = collect(t5, ROWS["t5"], tmp_path / "together", statistics="kfac", batch=7)
    alone = collect(t5, ROWS["t5"], tmp_path / "alone", statistics="kfac", batch=1)
    names = together.parameters("output_gram")
    assert names == alone.parameters("output_gram")
    assert len(names) == 47
    for kind in ("input_gram", "output_gram"):
        for name in names:
            assert_close(value(together, kind, name), value(alone, kind, name))
    assert together.find("output_gram", "lm_head.weight") is None
