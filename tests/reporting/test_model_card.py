"""The card's front matter, sentence and table."""

from typing import Any

import pytest
import yaml

from pipeline import __version__
from pipeline.reporting.model_card import model_card

RECIPE = "merge_method: geometric_median\nmodels: [{model: /a}]\n\n"


def report(groups: int = 1, **keys: object) -> dict[str, Any]:
    entries = [
        {
            "name": f"g{number}",
            "coefficients": [0.25, 0.75],
            "norms": [1.0, 12.34567],
            "scale": 1.0,
            "relative_gap": 10.0 ** -(12 + number),
        }
        for number in range(groups)
    ]
    models = [{"model": "/a: b"}, {"model": "s3://bucket/c"}]
    facts = {"method": "geometric_median", "scope": "model", "base_model": "/base", "notes": ["look out"]}
    facts |= {"output": "model", "rank": None, "discarded_energy": 0.0}
    return {**facts, "models": models, "groups": entries, **keys}


def front_matter(card: str) -> Any:
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front)


def test_the_hub_can_read_it() -> None:
    assert front_matter(model_card(report(), RECIPE)) == {
        "library_name": "transformers",
        "tags": ["merge", "geomerge"],
        "base_model": ["/base", "/a: b", "s3://bucket/c"],
    }


def test_the_scale_and_the_notes_are_said() -> None:
    scaled = report(2)
    scaled["groups"][1]["scale"] = 2.5
    assert "base + λ·(median − base), with λ = 1 to 2.5." in model_card(scaled, RECIPE)
    assert "λ" not in model_card(report(2), RECIPE)
    assert "\n* look out\n" in model_card(report(), RECIPE)


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        ("model", "over the full parameter vector"),
        ("block", "over each block"),
        ("tensor", "over each tensor"),
        ("patterns", "over each group of tensors"),
    ],
)
def test_the_sentence_names_scope_and_worst_gap(scope: str, words: str) -> None:
    card = model_card(report(3, scope=scope), RECIPE)
    assert f"The geometric median of 2 models {words}, certified optimal to a relative gap of 1.0e-12" in card
    assert f"geomerge {__version__}" in card


def test_an_average_claims_no_certificate() -> None:
    groups = [{"name": "model", "coefficients": [0.5, 0.5], "norms": None, "relative_gap": None}]
    card = model_card(report(method="linear", groups=0) | {"groups": groups}, RECIPE)
    assert "The weighted average of 2 models." in card
    assert "certified" not in card
    assert "| /a: b | 0.500000 |  |" in card


def test_one_group_is_a_table_of_models() -> None:
    lines = model_card(report(), RECIPE).splitlines()
    assert "| /a: b | 0.250000 | 1 |" in lines
    assert "| s3://bucket/c | 0.750000 | 12.35 |" in lines


def test_many_groups_are_a_table_of_groups_and_then_counted() -> None:
    lines = model_card(report(45), RECIPE).splitlines()
    assert "| group | c1 | c2 |" in lines
    assert sum(line.startswith("| g") and line.endswith("| 0.2500 | 0.7500 |") for line in lines) == 40
    assert "… and 5 more groups in the report." in lines
    few = model_card(report(40), RECIPE)
    assert "more groups" not in few


def test_a_thousand_models_are_a_table_of_the_first_and_then_counted() -> None:
    many = report() | {"models": [{"model": f"/m{number}"} for number in range(1000)]}
    many["groups"][0] |= {"coefficients": [0.001] * 1000, "norms": [1.0] * 1000}
    lines = model_card(many, RECIPE).splitlines()
    assert sum(line.startswith("| /m") for line in lines) == 40
    assert "… and 960 more models in the report." in lines
    # The hub draws a line to each of these: not to a thousand.
    assert front_matter("\n".join(lines))["base_model"] == ["/base"]
    many["groups"] = [many["groups"][0] | {"name": f"g{number}"} for number in range(3)]
    lines = model_card(many, RECIPE).splitlines()
    assert {line.count("|") for line in lines if line.startswith("|")} == {26}
    assert "… and 976 more models in the report." in lines


def test_every_table_has_rows_of_one_width() -> None:
    for groups in (1, 3):
        rows = [line for line in model_card(report(groups), RECIPE).splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1
        assert len(rows) == 2 + (2 if groups == 1 else 3)


def test_the_recipe_stands_as_it_was_written() -> None:
    card = model_card(report(), RECIPE)
    assert card.endswith(f"```yaml\n{RECIPE.rstrip()}\n```\n")


def test_but_without_credentials() -> None:
    card = model_card(report(), "models: [{model: ftp://user:hunter2@host/a}, {model: https://h/b?token=hunter2}]")
    assert "hunter2" not in card
    assert "ftp://host/a" in card
    assert "https://h/b" in card


def test_an_adapter_names_its_base_alone_and_what_it_lost() -> None:
    card = model_card(report(output="adapter", rank=8, discarded_energy=0.25), RECIPE)
    assert front_matter(card) == {"library_name": "peft", "tags": ["merge", "geomerge"], "base_model": ["/base"]}
    assert "# Merged adapter" in card
    assert "truncation to rank 8, which keeps 75.00% of its squared norm" in card


def test_a_merge_without_a_group_has_no_table() -> None:
    assert "nothing was solved" in model_card(report(groups=0), RECIPE)
