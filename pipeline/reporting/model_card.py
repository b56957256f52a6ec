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
# Columns, one a model, of the table by group: wider ones no page shows.
_COLUMNS = 24


def model_card(report: dict[str, Any], recipe_text: str) -> str:
    """Return the card as Markdown with the front matter that the Hugging Face hub reads.

    Args:
        report: The merge's report.
        recipe_text: The recipe as the user wrote it; credentials in its URLs are left out.
    """
    models = [entry["model"] for entry in report["models"]]
    base = [report["base_model"]] if report["base_model"] else []
    as_adapter = report["output"] == "adapter"
    # The hub draws a line to each of these; peft's own cards name the base alone.
    parents = base if base and (as_adapter or len(models) > _ROWS) else [*base, *models]
    front = yaml.safe_dump(
        {
            "library_name": "peft" if as_adapter else "transformers",
            "tags": ["merge", "geomerge"],
            "base_model": parents,
        },
        sort_keys=False,
    )
    return "\n".join(
        [
            f"---\n{front}---",
            "# Merged adapter" if as_adapter else "# Merged model",
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
    if "treatments" in report:
        return _solved_sentence(report)
    if report["method"] != "geometric_median":
        return f"The weighted average of {count} models."
    if not report["groups"]:
        return f"What all {count} models have in common: they do not differ."
    worst = max(group["relative_gap"] for group in report["groups"])
    scopes = {"model": "the full parameter vector", "block": "each block", "tensor": "each tensor"}
    over = scopes.get(report["scope"], "each group of tensors")
    certified = f"certified optimal to a relative gap of {worst:.1e} before rounding to the output's dtype"
    if report["rank"]:
        kept = 1.0 - report["discarded_energy"]
        certified += f" and truncation to rank {report['rank']}, which keeps {kept:.2%} of its squared norm"
    median = f"The geometric median of {count} models over {over}, {certified}."
    scales = sorted({group["scale"] for group in report["groups"]})
    if scales == [1.0]:
        return median
    span = f"{scales[0]:.4g}" if len(scales) == 1 else f"{scales[0]:.4g} to {scales[-1]:.4g}"
    return f"{median} Written is not the median itself but base + λ·(median − base), with λ = {span}."


def _solved_sentence(report: dict[str, Any]) -> str:
    """Return what a method that solves systems has made."""
    solver, kinds = report["solver"], report["treatments"]
    how = {"quotient": "in closed form", "gradient_matching": "in closed form", "direct": "directly"}
    solved = how.get(
        solver["rule"], f"by at most {solver['iterations']} conjugate gradient steps from {solver['start']}"
    )
    parts = [f"{kinds[kind]['tensors']} {kind}" for kind in ("averaged", "copied") if kinds[kind]["tensors"]]
    rest = f"; {' and '.join(parts)}" if parts else ""
    return (
        f"{report['method']} of {len(report['models'])} models: {kinds['solved']['tensors']} tensors are solutions of"
        f" linear systems with {solver['objective']} moments, solved {solved}{rest}."
    )


def _table(report: dict[str, Any], models: list[str]) -> list[str]:
    """Return the coefficients: one row a group, or where there is one group only, one row a model."""
    groups = report["groups"]
    if "treatments" in report:
        rows = ["| model | weight |", "| --- | --- |"]
        rows += [
            f"| {model} | {weight:.4g} |" for model, weight in zip(models[:_ROWS], report["weights"], strict=False)
        ]
        return rows + _more(len(models) - _ROWS, "models")
    if not groups:
        return ["All models have the same values: nothing was solved."]
    if len(groups) > 1:
        shown = min(len(models), _COLUMNS)
        rows = [
            "| group | " + " | ".join(f"c{index + 1}" for index in range(shown)) + " |",
            "| --- |" + " --- |" * shown,
        ]
        for group in groups[:_ROWS]:
            rows.append(f"| {group['name']} | " + " | ".join(f"{c:.4f}" for c in group["coefficients"][:shown]) + " |")
        rows += _more(len(groups) - _ROWS, "groups") + _more(len(models) - shown, "models")
        return ["Coefficients of the models, in the recipe's order:", "", *rows]
    group = groups[0]
    norms = group["norms"] or [None] * len(models)
    rows = ["| model | coefficient | norm of the task vector |", "| --- | --- | --- |"]
    for model, coefficient, norm in list(zip(models, group["coefficients"], norms, strict=True))[:_ROWS]:
        rows.append(f"| {model} | {coefficient:.6f} | {'' if norm is None else f'{norm:.4g}'} |")
    return rows + _more(len(models) - _ROWS, "models")


def _more(count: int, what: str) -> list[str]:
    """Return a line that counts what a table leaves out."""
    return [f"\n… and {count} more {what} in the report."] if count > 0 else []
