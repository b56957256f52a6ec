"""The command line: `geomerge merge|plan|verify|status|methods|schema`.

Owns arguments, terminal output and exit codes. With --json one document goes to stdout and everything else to stderr.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import click

from pipeline import __version__
from pipeline.errors import PipelineError
from pipeline.units import format_bytes, format_seconds, parse_bytes

F = TypeVar("F", bound=Callable[..., Any])

# Every option of the command line; a test compares them with what click knows, so that none is added by accident.
OPTIONS = ("--executor", "--address", "--workers", "--memory", "--device", "--overwrite", "--json")
# Rows of a list before the rest is counted.
_ROWS = 12
# Models in the table of results before the rest is counted.
_TABLE_ROWS = 40


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """A size such as 4GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _resources(command: F) -> F:
    """Add the options that say where a merge runs and with what."""
    for option in (
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute."),
        click.option("--memory", type=_Size(), default="4GB", show_default=True, help="What each worker may hold."),
        click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="How many workers."),
        click.option("--address", help="A Ray cluster's address."),
        click.option(
            "--executor",
            type=click.Choice(["auto", "local", "ray"]),
            default="auto",
            show_default=True,
            help="auto: Ray inside a Ray job or with --address, else this process.",
        ),
    ):
        command = option(command)
    return command


def _json(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="geomerge")
def main() -> None:
    """Merge fine-tuned models by the exact geometric median, out of core, on one machine or a Ray cluster."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


@main.command(short_help="Merge the models of RECIPE into OUTPUT.")
@click.argument("recipe")
@click.argument("output")
@_resources
@click.option("--overwrite", is_flag=True, help="Start again: replace any merge or model in OUTPUT.")
@_json
def merge(recipe: str, output: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Merge the models of RECIPE into the folder OUTPUT; run again to resume."""

    def body() -> dict[str, Any]:
        from rich.console import Console

        from pipeline.engine.process import raise_descriptor_limit
        from pipeline.merging import merge as run_merge
        from pipeline.reporting.progress import LogLines, TerminalProgress

        raise_descriptor_limit()
        console = Console(stderr=True)
        live = TerminalProgress(console) if console.is_terminal else None
        with live or nullcontext():
            return run_merge(
                recipe, output, resources=_to_resources(options), overwrite=overwrite, listener=live or LogLines()
            )

    report = _run(body)
    _emit(report, as_json, lambda: _show_report(report, output))


@main.command(short_help="Show what a merge would read, hold and write.")
@click.argument("recipe")
@click.argument("output")
@_resources
@_json
def plan(recipe: str, output: str, as_json: bool, **options: Any) -> None:
    """Show what a merge would read, hold, write and take; reads headers, and a second's sample for the rates."""

    def body() -> dict[str, Any]:
        from pipeline.merging import load_recipe, plan_merge
        from pipeline.reporting.plan_view import plan_summary
        from pipeline.storage import open_store

        planned = plan_merge(load_recipe(recipe)[0], open_store(output), _to_resources(options), probe=True)
        return plan_summary(planned.plan, planned.memory, planned.cost, planned.rates, planned.workers, planned.seconds)

    summary = _run(body)
    _emit(summary, as_json, lambda: _show_plan(summary))


@main.command(short_help="Read a finished OUTPUT again and check it.")
@click.argument("output")
@_json
def verify(output: str, as_json: bool) -> None:
    """Read a finished OUTPUT again: headers, checksums, finiteness, names."""

    def body() -> dict[str, Any]:
        from pipeline.engine.verify import verify as run_verify
        from pipeline.storage import open_store

        return run_verify(open_store(output))

    result = _run(body)
    _emit(
        result,
        as_json,
        lambda: click.echo(
            f"{result['output']}: {_counted(result['files'], 'file')}, {_counted(result['tensors'], 'tensor')},"
            f" {format_bytes(result['bytes'])}: all as written"
        ),
    )


@main.command()
@click.argument("output")
@_json
def status(output: str, as_json: bool) -> None:
    """Tell how far the merge into OUTPUT is."""

    def body() -> dict[str, Any]:
        from pipeline.engine.status import status as run_status
        from pipeline.storage import open_store

        return run_status(open_store(output))

    result = _run(body)
    _emit(
        result,
        as_json,
        lambda: click.echo(
            f"{result['output']}: {result['state']}; {result['files_measured']} measured and"
            f" {result['files_written']} written of {result['files']} files,"
            f" {format_bytes(result['bytes_written'])} of {format_bytes(result['bytes'])}"
        ),
    )


@main.command()
@_json
def methods(as_json: bool) -> None:
    """List the merge methods and their parameters."""

    def body() -> dict[str, Any]:
        from pipeline.methods import registry

        return {
            name: {
                "summary": method.summary,
                "reference": method.reference,
                "parameters": {
                    p.name: {"default": p.default, "per_model": p.per_model, "description": p.description}
                    for p in method.schema.parameters
                },
            }
            for name, method in registry().items()
        }

    found = _run(body)

    def show() -> None:
        for name, entry in found.items():
            click.echo(f"{name}\n    {entry['summary']}\n    {entry['reference']}")
            for parameter, facts in entry["parameters"].items():
                click.echo(f"    {parameter} (default {facts['default']}): {facts['description']}")

    _emit(found, as_json, show)


@main.command()
@_json
def schema(as_json: bool) -> None:
    """Print the JSON Schema of a recipe, for editors."""

    def body() -> dict[str, Any]:
        from pipeline.methods import registry
        from pipeline.recipe import recipe_schema

        return recipe_schema({name: method.schema for name, method in registry().items()})

    document = _run(body)
    _emit(document, True, lambda: None)


def _to_resources(options: dict[str, Any]) -> Any:
    from pipeline.merging import Resources

    return Resources(
        executor=options["executor"],
        address=options["address"],
        workers=options["workers"],
        memory_bytes=options["memory"],
        device=options["device"],
    )


def _run(body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a command found; an error of ours ends the process with its text and exit code, no traceback."""
    try:
        return body()
    except PipelineError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command again to resume", err=True)
        sys.exit(130)


def _emit(document: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=1))
    else:
        show()


def _show_report(report: dict[str, Any], output: str) -> None:
    """Print a finished merge for people: one table of models, one line of facts."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    groups = report["groups"]
    table = Table(title=f"{report['method']} of {_counted(len(report['models']), 'model')}")
    table.add_column("model")
    table.add_column("weight", justify="right")
    table.add_column("coefficient" if len(groups) == 1 else "mean coefficient", justify="right")
    if any(group["norms"] for group in groups):
        table.add_column("norm", justify="right")
    for row, model in enumerate(report["models"][:_TABLE_ROWS]):
        shares = [group["coefficients"][row] for group in groups]
        norms = [group["norms"][row] for group in groups if group["norms"]]
        norm = [f"{sum(value**2 for value in norms) ** 0.5:.4g}"] if norms else []
        mean = f"{sum(shares) / len(shares):.6f}" if shares else ""
        table.add_row(model["model"], f"{report['weights'][row]:.4g}", mean, *norm)
    console.print(table)
    if len(report["models"]) > _TABLE_ROWS:
        click.echo(f"and {len(report['models']) - _TABLE_ROWS} more models, in geomerge_report.json")
    gaps = [group["relative_gap"] for group in groups if group["relative_gap"] is not None]
    certificate = f"certified to a relative gap of {max(gaps):.1e}; " if gaps else ""
    if report["rank"]:
        certificate += (
            f"rank {report['rank']} keeps {1.0 - report['discarded_energy']:.2%} of the update's squared norm; "
        )
    scales = {group["scale"] for group in groups}
    scale = f"scale {max(scales):.4g}, " if len(scales) == 1 and scales != {1.0} else ""
    resumed = f" ({_counted(report['resumed_files'], 'file')} found done)" if report["resumed_files"] else ""
    click.echo(
        f"{output}: {certificate}{scale}{_counted(len(groups), 'group')},"
        f" {_counted(len(report['files']), 'file')}{resumed},"
        f" {format_bytes(report['bytes_written'])} written, {_counted(report['passes'], 'pass')} over the inputs,"
        f" {format_seconds(sum(report['seconds'].values()))}"
    )


def _show_plan(summary: dict[str, Any]) -> None:
    """Print a plan for people."""
    click.echo(
        f"{summary['method']} of {len(summary['models'])} models, scope {summary['scope']}:"
        f" {summary['tensors']} tensors, {summary['elements']:,} elements, {summary['chunks']} chunks"
    )
    click.echo(f"groups   {len(summary['groups'])}: " + _listed([group["name"] for group in summary["groups"]]))
    click.echo(
        f"read     {format_bytes(summary['bytes_to_read'])} in {_counted(summary['passes'], 'pass')};"
        f" write {format_bytes(summary['bytes_to_write'])} in {_counted(len(summary['files']), 'file')}: "
        + _listed([f"{file['name']} {format_bytes(file['bytes'])}" for file in summary["files"]])
    )
    memory = summary["memory_per_worker"]
    terms = " + ".join(f"{name} {format_bytes(size)}" for name, size in memory["terms"].items())
    click.echo(f"memory   {format_bytes(memory['total'])} per worker = {terms}")
    if summary["seconds"]:
        parts = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in summary["seconds"].items())
        click.echo(f"time     {format_seconds(sum(summary['seconds'].values()))} ({parts}; rates {summary['rates']})")
    for note in summary["notes"]:
        click.echo(f"note     {note}")


def _counted(number: float, noun: str) -> str:
    """Return a number with its noun: "1 file", "2 files", "1.8 passes"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:g} {noun if number == 1 else plural}"


def _listed(items: list[str]) -> str:
    more = f", and {len(items) - _ROWS} more" if len(items) > _ROWS else ""
    return ", ".join(items[:_ROWS]) + more
