from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.checkpoints.ties import tied_aliases

from .models import write_model

EMBED, HEAD, SHARED = "model.embed_tokens.weight", "lm_head.weight", "shared.weight"
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def model(folder: Path, *names: str, config: dict[str, object] | None = None, **shapes: tuple[int, ...]) -> Checkpoint:
    tensors = {name: torch.zeros(shapes.get(name.replace(".", "_"), (6, 4))) for name in names}
    return open_checkpoint(str(write_model(folder, {**tensors, "norm.weight": torch.zeros(4)}, config)))


@pytest.mark.parametrize(
    ("configs", "stored", "tied"),
    [
        # Every config says true: tied, wherever it is stored.
        ((TIED, TIED), (True, True), True),
        ((TIED, TIED), (True, False), True),
        # Nothing is said: tied when some model does without.
        (({}, {}), (True, False), True),
        (({}, {}), (True, True), False),
        ((None, None), (True, False), True),
        # One says true, the other nothing.
        ((TIED, {}), (True, False), True),
        ((TIED, {}), (False, True), True),
        ((TIED, {}), (True, True), False),
        # One says false: never.
        ((TIED, UNTIED), (False, True), False),
        ((UNTIED, {}), (True, False), False),
        ((UNTIED, UNTIED), (True, True), False),
        # No model stores the alias: nothing to say.
        ((TIED, TIED), (False, False), False),
    ],
)
def test_when_a_family_is_tied(
    tmp_path: Path,
    configs: tuple[dict[str, object] | None, ...],
    stored: tuple[bool, ...],
    tied: bool,
) -> None:
    family = [
        model(tmp_path / str(number), EMBED, *([HEAD] if has else []), config=config)
        for number, (config, has) in enumerate(zip(configs, stored, strict=True))
    ]
    expected = {HEAD: EMBED} if tied else {}
    assert tied_aliases(family) == expected
    assert tied_aliases(family[::-1]) == expected


@pytest.mark.parametrize(
    ("alias", "source"),
    [
        ("lm_head.weight", "transformer.wte.weight"),
        ("embed_out.weight", "gpt_neox.embed_in.weight"),
        ("output.weight", "tok_embeddings.weight"),
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("transformer.lm_head.weight", "transformer.word_embeddings.weight"),
        ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
        ("lm_head.weight", "model.decoder.embed_tokens.weight"),
        ("lm_head.weight", "backbone.embeddings.weight"),
    ],
)
def test_names_of_known_architectures(tmp_path: Path, alias: str, source: str) -> None:
    names = (alias, source, "bert.embeddings.position_embeddings.weight")
    checkpoint = model(tmp_path, *names, config=TIED)
    assert tied_aliases([checkpoint]) == {alias: source}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_encoder_decoder_models_share_one_embedding(tmp_path: Path, prefix: str) -> None:
    aliases = (HEAD, f"{prefix}decoder.embed_tokens.weight", f"{prefix}encoder.embed_tokens.weight")
    checkpoint = model(tmp_path, *aliases, prefix + SHARED, config=TIED)
    assert tied_aliases([checkpoint]) == dict.fromkeys(aliases, prefix + SHARED)


def test_two_vocabularies_share_nothing(tmp_path: Path) -> None:
    names = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", HEAD)
    assert tied_aliases([model(tmp_path, *names, config=TIED)]) == {}


def test_shape_and_dtype_must_be_equal(tmp_path: Path) -> None:
    other_shape = model(tmp_path / "shape", EMBED, HEAD, config=TIED, lm_head_weight=(7, 4))
    assert tied_aliases([other_shape]) == {}
    tensors = {EMBED: torch.zeros(6, 4), HEAD: torch.zeros(6, 4, dtype=torch.bfloat16)}
    assert tied_aliases([open_checkpoint(str(write_model(tmp_path / "dtype", tensors, TIED)))]) == {}


def test_similar_names_are_no_aliases(tmp_path: Path) -> None:
    names = ("my_lm_head.weight", "layers.0.output.dense.weight", "lm_head.weight.scale", EMBED)
    assert tied_aliases([model(tmp_path, *names, config=TIED)]) == {}


def test_models_that_disagree_on_the_source_share_nothing(tmp_path: Path) -> None:
    family = [
        model(tmp_path / "a", HEAD, EMBED, config=TIED),
        model(tmp_path / "b", HEAD, "transformer.wte.weight", config=TIED),
    ]
    assert tied_aliases(family) == {}


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"tie_word_embeddings": None, "text_config": None}, False),
        ({"tie_word_embeddings": "yes"}, False),
    ],
)
def test_the_nested_config_is_asked_too(tmp_path: Path, config: dict[str, object], tied: bool) -> None:
    assert bool(tied_aliases([model(tmp_path, EMBED, HEAD, config=config)])) is tied


def test_no_models_have_no_aliases() -> None:
    assert tied_aliases([]) == {}
