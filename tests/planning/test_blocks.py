"""Groups and layers by tensor names."""

import pytest

from pipeline.errors import RecipeError
from pipeline.planning.blocks import REST, block_of, group_names, layer_count, layer_of
from pipeline.recipe import NamedPatterns

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.10.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize(
    ("name", "block", "layer"),
    [
        ("model.layers.7.mlp.up_proj.weight", "model.layers.7", 7),
        ("encoder.layer.3.attention.self.query.bias", "encoder.layer.3", 3),
        ("transformer.h.11.ln_1.weight", "transformer.h.11", 11),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", "decoder.block.0", 0),
        ("model.layers.4.mlp.experts.5.w1.weight", "model.layers.4", 4),
        ("0.auto_model.encoder.layer.2.output.dense.weight", "0.auto_model.encoder.layer.2", 2),
        ("model.embed_tokens.weight", REST, None),
        ("model.norm.weight", REST, None),
        ("layer2.weight", REST, None),
        ("model.layers.weight.7", REST, None),
        ("", REST, None),
    ],
)
def test_block_and_layer_of_a_name(name: str, block: str, layer: int | None) -> None:
    assert block_of(name) == block
    assert layer_of(name) == layer


def test_the_number_of_layers_is_one_more_than_the_largest_index() -> None:
    assert layer_count(NAMES) == 11
    assert layer_count(["model.norm.weight"]) == 0
    assert layer_count([]) == 0


def test_scopes() -> None:
    assert group_names(NAMES, "model") == ("model",) * 6
    assert group_names(NAMES, "tensor") == NAMES
    assert group_names(NAMES, "block") == (REST, "model.layers.0", "model.layers.0", "model.layers.10", REST, REST)


def test_the_first_pattern_that_matches_wins_and_what_is_left_is_the_rest() -> None:
    scope = (
        NamedPatterns(name="ends", tensors=("*embed*", "lm_head.weight")),
        NamedPatterns(name="mlp of one digit", tensors=("*.layers.?.mlp.*",)),
        NamedPatterns(name="layers", tensors=("model.layers.*",)),
    )
    assert group_names(NAMES, scope) == ("ends", "mlp of one digit", "layers", "layers", REST, "ends")


def test_patterns_match_whole_names_and_their_case() -> None:
    for pattern in ("embed", "MODEL.*", "model"):
        with pytest.raises(RecipeError, match="matches no tensor"):
            group_names(NAMES, (NamedPatterns(name="x", tensors=(pattern,)),))


def test_every_idle_pattern_is_named_with_its_group() -> None:
    scope = (
        NamedPatterns(name="all layers", tensors=("model.layers.*", "*.norm.weight")),
        NamedPatterns(name="late", tensors=("*.mlp.*", "*.router.*")),
    )
    with pytest.raises(RecipeError) as caught:
        group_names(NAMES, scope)
    # The first is in an earlier group already, the second is nowhere.
    assert [problem.where for problem in caught.value.problems] == ["pipeline.scope, group 'late'"] * 2
    assert "'*.mlp.*'" in caught.value.problems[0].what
    assert "'*.router.*'" in caught.value.problems[1].what
