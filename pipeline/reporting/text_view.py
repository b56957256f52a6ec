"""The documents of the commands as text for people: lines, and one table.

Owns the wording on standard output. Must not print: it returns lines and tables, and the command line shows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

# Rows of a list before the rest is counted.
_ROWS = 12
# Models in the table of results before the rest is counted.
_TABLE_ROWS = 40
# The number of a layer in a tensor's name.
_LAYER = re.compile(r"\.\d+(?=\.|$)")


def report_view(report: Mapping[str, Any], output: str) -> Iterator[str | Table]:
    """Yield a finished merge: one table of models, one line of facts.

    Args:
        report: The report.
        output: The output as the user named it.
    """
    # Where tensors are solved, coefficients are those of the few that are averaged.
    groups = [] if "systems" in report else report["groups"]
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{report['method']} of {counted(len(report['models']), 'model')}")
    table.add_column("model")
    table.add_column("weight", justify="right")
    if "systems" not in report:
        table.add_column("coefficient" if len(groups) == 1 else "mean coefficient", justify="right")
    if any(group["norms"] for group in groups):
        table.add_column("norm", justify="right")
    for row, model in enumerate(report["models"][:_TABLE_ROWS]):
        shares = [group["coefficients"][row] for group in groups]
        norms = [group["norms"][row] for group in groups if group["norms"]]
        norm = [f"{sum(value**2 for value in norms) ** 0.5:.4g}"] if norms else []
        mean = [f"{sum(shares) / len(shares):.6f}" if shares else ""] if "systems" not in report else []
        table.add_row(Text(model["model"]), f"{report['weights'][row]:.4g}", *mean, *norm)
    yield table
    if len(report["models"]) > _TABLE_ROWS:
        yield f"and {len(report['models']) - _TABLE_ROWS} more models, in geomerge_report.json"
    resumed = f" ({counted(report['resumed_files'], 'file')} found done)" if report["resumed_files"] else ""
    yield (
        f"{output}: {_findings(report)}{'' if 'systems' in report else counted(len(groups), 'group') + ', '}"
        f"{counted(len(report['files']), 'file')}{resumed},"
        # Also said of a merge that was found finished, so not as if it were done just now.
        f" {format_bytes(report['bytes_written'])}; the run that committed it took"
        f" {counted(report['passes'], 'pass')} over the inputs, {format_seconds(sum(report['seconds'].values()))}"
    )


def _findings(report: Mapping[str, Any]) -> str:
    """Return what the solve proved and the writing kept, each part with its separator."""
    groups = report["groups"]
    gaps = [group["relative_gap"] for group in groups if group["relative_gap"] is not None]
    text = f"certified to a relative gap of {max(gaps):.1e}; " if gaps else ""
    if "treatments" in report:
        kinds = ((kind, entry["tensors"]) for kind, entry in report["treatments"].items())
        text += ", ".join(f"{kind} {counted(number, 'tensor')}" for kind, number in kinds if number) + "; "
        left = sum(not entry["converged"] for entry in report["systems"])
        text += f"{counted(left, 'system')} did not reach the tolerance; " if left else ""
    if report["rank"]:
        text += f"rank {report['rank']} keeps {1.0 - report['discarded_energy']:.2%} of the update's squared norm; "
    scales = {group["scale"] for group in groups}
    return text + (f"scale {max(scales):.4g}, " if len(scales) == 1 and scales != {1.0} else "")


def plan_view(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a plan."""
    yield (
        f"{summary['method']} of {len(summary['models'])} models, scope {summary['scope']}:"
        f" {summary['tensors']} tensors, {summary['elements']:,} elements, {summary['chunks']} chunks"
    )
    if "treatments" in summary:
        yield from _treatments(summary)
    else:
        yield f"groups   {len(summary['groups'])}: " + _listed([group["name"] for group in summary["groups"]])
    yield (
        f"read     {format_bytes(summary['bytes_to_read'])} in {counted(summary['passes'], 'pass')};"
        f" write {format_bytes(summary['bytes_to_write'])} in {_sized([file['bytes'] for file in summary['files']])}"
    )
    memory = summary["memory_per_worker"]
    terms = " + ".join(f"{name} {format_bytes(size)}" for name, size in memory["terms"].items())
    yield f"memory   {format_bytes(memory['total'])} per worker = {terms}"
    if summary["seconds"]:
        parts = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in summary["seconds"].items())
        yield f"time     {format_seconds(sum(summary['seconds'].values()))} ({parts}; rates {summary['rates']})"
    for note in summary["notes"]:
        yield f"note     {note}"


def _treatments(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield what becomes of every tensor, and how systems are solved."""
    solver = summary["solver"]
    parts = [f"{solver['objective']} moments, {solver['rule'].replace('_', ' ')}, start {solver['start']}"]
    if solver["iterations"] is not None:
        parts.append(f"at most {solver['iterations']} iterations to {solver['tolerance']:g}")
    yield f"systems  {', '.join(parts)}"
    for kind, entry in summary["treatments"].items():
        if entry["tensors"]:
            # Of what is solved the names would be most of the model.
            names = "" if kind == "solved" else f": {_listed(layer_patterns(entry['names']))}"
            yield f"{kind:8} {counted(entry['tensors'], 'tensor')}, {entry['elements']:,} elements{names}"


def verified_view(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the line of a finished merge that was read again."""
    yield (
        f"{result['output']}: {counted(result['files'], 'file')}, {counted(result['tensors'], 'tensor')},"
        f" {format_bytes(result['bytes'])}: all as written"
    )


def status_view(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield how far a merge is, what its run does, waits for or ended by, and when that last gave a sign of life."""
    yield (
        f"{result['output']}: {result['state']}; {result['files_measured']} measured and"
        f" {result['files_written']} written of {counted(result['files'], 'file')},"
        f" {format_bytes(result['bytes_written'])} of {format_bytes(result['bytes'])}"
    )
    run = result["run"]
    if result["state"] == "damaged" and not (run and run["alive"]):
        whole = result["fingerprint"] is not None
        yield (
            "  the same command writes what is gone" if whole else "  the plan cannot be read; --overwrite starts again"
        )
    if run is None:
        return
    if run["alive"]:
        yield f"  at the last sign of life {_pace(result)}"
    if result["waiting_for"]:
        yield f"  waits for {result['waiting_for']}"
    if result["state"] == "failed":
        yield f"  ended by: {result['error']}"
    yield (
        f"  process {run['pid']} on {run['host']}, since {run['started']},"
        f" last sign of life {result['last_sign_of_life']}"
    )
    # An error that asks for --overwrite says itself what to do.
    if result["state"] in ("interrupted", "failed") and "--overwrite" not in (result["error"] or ""):
        yield "  the same command resumes"


def _pace(result: Mapping[str, Any]) -> str:
    """Return what a run does, how fast, and how long it will take.

    Files that are measured and written are counted anew by whoever looks, so they are not told once more as the run
    knew them then.
    """
    iteration = f", iteration {result['iteration']}" if result["iteration"] else ""
    parts = []
    if result["total_bytes"]:
        parts.append(f"{format_bytes(result['done_bytes'])} of {format_bytes(result['total_bytes'])}")
    if result["files_total"] and result["phase"] not in ("measure", "write"):
        parts.append(f"{result['files_done']} of {counted(result['files_total'], 'file')}")
    if result["rate"] is not None:
        parts.append(f"{format_bytes(result['rate'])}/s")
    if result["seconds_left"] is not None:
        parts.append(f"{format_seconds(result['seconds_left'])} left")
    return f"{result['phase']}{iteration}" + (f": {', '.join(parts)}" if parts else "")


def methods_view(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the merge methods with their parameters."""
    for name, entry in found.items():
        yield f"{name}\n    {entry['summary']}\n    {entry['reference']}"
        for parameter, facts in entry["parameters"].items():
            yield f"    {parameter} (default {facts['default']}): {facts['description']}"


def cleaned_view(result: Mapping[str, Any]) -> Iterator[str | Table]:
    """Yield what lay unfinished below a URL and what became of it."""
    if result["found"]:
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for name in ("path", "kind"):
            table.add_column(name, overflow="fold")
        for name in ("size", "age"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("")
        for entry in result["found"]:
            size = "" if entry["bytes"] is None else format_bytes(entry["bytes"])
            age = "" if entry["age_seconds"] is None else format_seconds(entry["age_seconds"])
            table.add_row(*(Text(cell) for cell in (entry["path"], entry["kind"], size, age, entry["done"])))
        yield table
    verb = "would be removed" if result["dry_run"] else "removed"
    yield f"{result['url']}: {counted(len(result['found']), 'leftover')}, {result['removed']} {verb}"


def counted(number: float, noun: str) -> str:
    """Return a number with its noun: "1 file", "2 files", "1.8 passes"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:g} {noun if number == 1 else plural}"


def _sized(sizes: Sequence[int]) -> str:
    """Return how many files there are and how large: "2 files of 5 GB", "3 files of 1.2 MB to 5 GB"."""
    least, most = (format_bytes(size) for size in (min(sizes), max(sizes)))
    return f"{counted(len(sizes), 'file')} of {least}" + (f" to {most}" if most != least else "")


def layer_patterns(names: Sequence[str]) -> list[str]:
    """Return names with a star for the number of their layer, and how many each is short for."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_LAYER.sub(".*", name), []).append(name)
    return [same[0] if len(same) == 1 else f"{pattern} ({len(same)})" for pattern, same in found.items()]


def _listed(items: Sequence[str]) -> str:
    more = f", and {len(items) - _ROWS} more" if len(items) > _ROWS else ""
    return ", ".join(items[:_ROWS]) + more
