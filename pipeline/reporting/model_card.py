"""The model card of a merged checkpoint: a README.md that says what it is and how it was made.

Owns the card's words.
"""

from __future__ import annotations

from typing import Any

import yaml

from pipeline import __version__
from pipeline.storage.redaction import redacted

# Rows of the table before the rest is left to the report.
_ROWS = 40


def model_card(report: dict[str, Any], recipe_text: str) -> str:
    """Return the card as Markdown with the front matter that the Hugging Face hub reads.

    Args:
        report: The merge's report.
        recipe_text: The recipe as the user wrote it; credentials in its URLs are left out.
    """
    models = [entry["model"] for entry in report["models"]]
    base = [report["base_model"]] if report["base_model"] else []
    front = yaml.safe_dump(
        {"library_name": "transformers", "tags": ["merge", "geomerge"], "base_model": [*base, *models]}, sort_keys=False
    )
    return "\n".join(
        [
            f"---\n{front}---",
            "# Merged model",
            "",
            f"{_sentence(report)} Made by geomerge {__version__}; `geomerge_report.json` has all figures.",
            "",
            *_table(report, models),
            "",
            *[f"* {note}" for note in report["notes"]],
            *([""] if report["notes"] else []),
            "## Recipe",
            "",
            "```yaml",
            redacted(recipe_text.rstrip(), ()),
            "```",
            "",
        ]
    )


def _sentence(report: dict[str, Any]) -> str:
    count = len(report["models"])
    if report["method"] != "geometric_median":
        return f"The weighted average of {count} models."
    worst = max(group["relative_gap"] for group in report["groups"])
    scopes = {"model": "the full parameter vector", "block": "each block", "tensor": "each tensor"}
    over = scopes.get(report["scope"], "each group of tensors")
    certified = f"certified optimal to a relative gap of {worst:.1e} before rounding to the output's dtype"
    median = f"The geometric median of {count} models over {over}, {certified}."
    scales = sorted({group["scale"] for group in report["groups"]})
    if scales == [1.0]:
        return median
    span = f"{scales[0]:.4g}" if len(scales) == 1 else f"{scales[0]:.4g} to {scales[-1]:.4g}"
    return f"{median} Written is not the median itself but base + λ·(median − base), with λ = {span}."


def _table(report: dict[str, Any], models: list[str]) -> list[str]:
    """Return the coefficients by group, one row a model."""
    groups = report["groups"]
    if len(groups) > 1:
        rows = [
            "| group | " + " | ".join(f"c{index + 1}" for index in range(len(models))) + " |",
            "| --- |" + " --- |" * len(models),
        ]
        for group in groups[:_ROWS]:
            rows.append(f"| {group['name']} | " + " | ".join(f"{c:.4f}" for c in group["coefficients"]) + " |")
        if len(groups) > _ROWS:
            rows.append(f"\n… and {len(groups) - _ROWS} more groups in the report.")
        return ["Coefficients of the models, in the recipe's order:", "", *rows]
    group = groups[0]
    norms = group["norms"] or [None] * len(models)
    rows = ["| model | coefficient | norm of the task vector |", "| --- | --- | --- |"]
    for model, coefficient, norm in zip(models, group["coefficients"], norms, strict=True):
        rows.append(f"| {model} | {coefficient:.6f} | {'' if norm is None else f'{norm:.4g}'} |")
    return rows
