"""The command line: `geomerge merge|batch|plan|verify|status|clean|calibrate|methods|schema`.

Owns arguments, exit codes, and what goes to which stream: with --json one document to stdout, everything else
to stderr. The texts live in `pipeline.reporting`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from typing import Any, NoReturn, TextIO

import click

from pipeline import __version__, cli_options, signals
from pipeline.errors import PipelineError, Problem, WorkerError
from pipeline.events import Event, Listener

# Every option of the command line; a test compares them with what click knows, so that none is added by accident.
OPTIONS = (
    *("--executor", "--address", "--workers", "--memory", "--device", "--overwrite", "--json", "--progress"),
    *("--older-than", "--dry-run", "--reuse"),
    *("--statistics", "--labels", "--task", "--examples", "--max-length", "--batch", "--reduction", "--seed"),
    *("--text-field", "--label-field", "--scratch"),
)


# What Python says when the system starts no thread.
_NO_THREAD = "can't start new thread"


class _Main(click.Group):
    """The commands, of which one whose progress is read by a program says in the same form what it was called with."""

    def main(self, *positional: Any, **named: Any) -> Any:
        """Run the command line, as click's own does."""
        args = positional[0] if positional else named.get("args")
        given = list(sys.argv[1:] if args is None else args)
        if not (named.get("standalone_mode", True) and signals.wants_lines(given)):
            return super().main(*positional, **named)
        try:
            sys.exit(super().main(*positional, **{**named, "standalone_mode": False}))
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            remedy = f"see {context.command_path} --help" if context else "see geomerge --help"
            problem = Problem(what=error.format_message(), remedy=remedy)
            _fail(PipelineError(problem), error.exit_code, sys.stderr, as_lines=True)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="geomerge")
def main() -> None:
    """Merge fine-tuned models by the exact geometric median, out of core, on one machine or a Ray cluster."""


@main.command(short_help="Merge the models of RECIPE into OUTPUT.")
@click.argument("recipe")
@click.argument("output")
@cli_options.resources
@click.option("--overwrite", is_flag=True, help="Start again: replace any merge or model in OUTPUT.")
@click.option("--reuse", multiple=True, metavar="URL", help="An earlier merge of these models, to measure less.")
@cli_options.progress
@cli_options.as_json
def merge(recipe: str, output: str, overwrite: bool, progress: str, as_json: bool, **options: Any) -> None:
    """Merge the models of RECIPE into the folder OUTPUT; run again to resume."""

    def body(listener: Listener) -> dict[str, Any]:
        from pipeline.merging import merge as run_merge

        given = {"overwrite": overwrite, "reuse": options.pop("reuse"), "listener": listener}
        return run_merge(recipe, output, resources=_to_resources(options), **given)

    report = _run_told(body, progress, resumes=not overwrite)
    from pipeline.reporting.text_view import report_view
    from pipeline.storage import shown_url

    _emit(report, as_json, lambda: report_view(report, shown_url(output)))


@main.command(short_help="Merge every recipe in RECIPES into OUTPUTS.")
@click.argument("recipes")
@click.argument("outputs")
@cli_options.resources
@click.option("--overwrite", is_flag=True, help="Replace what was merged from another recipe or other files.")
@cli_options.progress
@cli_options.as_json
def batch(recipes: str, outputs: str, overwrite: bool, progress: str, as_json: bool, **options: Any) -> None:
    """Merge every *.yaml and *.yml in the folder RECIPES into a folder of its name in OUTPUTS.

    What is merged already is left as it is, and one that fails does not stop the others. Exit code 0 when all are
    merged.
    """

    def body(listener: Listener) -> dict[str, Any]:
        from pipeline.batch import batch as run_batch

        return run_batch(recipes, outputs, resources=_to_resources(options), overwrite=overwrite, listener=listener)

    summary = _run_told(body, progress)
    from pipeline.reporting.batch_view import batch_view

    _emit(summary, as_json, lambda: batch_view(summary))
    sys.exit(summary["exit_code"])


@main.command(short_help="Show what a merge would read, hold and write.")
@click.argument("recipe")
@click.argument("output")
@cli_options.resources
@cli_options.as_json
def plan(recipe: str, output: str, as_json: bool, **options: Any) -> None:
    """Show what a merge would read, hold, write and take; reads headers, and a second's sample for the rates."""

    def body() -> dict[str, Any]:
        from pipeline.merging import load_recipe, open_output, plan_merge
        from pipeline.reporting.plan_view import plan_summary

        read = load_recipe(recipe)[0]
        planned = plan_merge(read, open_output(read, output), _to_resources(options), probe=True)
        return plan_summary(planned.plan, planned.memory, planned.cost, planned.rates, planned.workers, planned.seconds)

    summary = _run(body)
    from pipeline.reporting.text_view import plan_view

    _emit(summary, as_json, lambda: plan_view(summary))


@main.command(short_help="Collect statistics of MODEL from DATA into OUTPUT.")
@click.argument("model")
@click.argument("data")
@click.argument("output")
@cli_options.calibration
@cli_options.progress
@cli_options.as_json
def calibrate(model: str, data: str, output: str, progress: str, as_json: bool, **options: Any) -> None:
    """Collect second moments of MODEL from the examples in DATA, for methods that weigh by them.

    OUTPUT is a folder of its own; run again to resume.
    """

    def body(listener: Listener) -> dict[str, Any]:
        from pipeline.calibration.settings import Settings

        given = {name: options.pop(name) for name in ("device", "memory", "scratch")}
        settings = Settings(**options)
        from pipeline.calibration.command import calibrate as run_calibrate

        places = {"memory_bytes": given["memory"], "device": given["device"], "scratch_url": given["scratch"]}
        return run_calibrate(model, data, output, settings, listener=listener, **places)

    result = _run_told(body, progress)
    from pipeline.reporting.calibration_view import calibrated_view

    _emit(result, as_json, lambda: calibrated_view(result))


@main.command(short_help="Read a finished OUTPUT again and check it.")
@click.argument("output")
@cli_options.as_json
def verify(output: str, as_json: bool) -> None:
    """Read a finished OUTPUT again: headers, checksums, finiteness, names."""

    def body() -> dict[str, Any]:
        from pipeline.engine.verify import verify as run_verify
        from pipeline.storage import open_store

        return run_verify(open_store(output))

    result = _run(body)
    from pipeline.reporting.text_view import verified_view

    _emit(result, as_json, lambda: verified_view(result))


@main.command()
@click.argument("output")
@cli_options.as_json
def status(output: str, as_json: bool) -> None:
    """Tell how far the merge into OUTPUT is."""

    def body() -> dict[str, Any]:
        from pipeline.engine.status import status as run_status
        from pipeline.storage import open_store

        return run_status(open_store(output))

    result = _run(body)
    from pipeline.reporting.text_view import status_view

    _emit(result, as_json, lambda: status_view(result))


@main.command(short_help="Remove what killed runs left unfinished below URL.")
@click.argument("url")
@click.option(
    "--older-than", type=cli_options.Duration(), default="1h", show_default=True, help="Leave alone what is younger."
)
@click.option("--dry-run", is_flag=True, help="Only list it.")
@cli_options.as_json
def clean(url: str, older_than: float, dry_run: bool, as_json: bool) -> None:
    """Remove unfinished uploads and temporary files of runs that were killed, below the folder or prefix URL.

    Finished files are never touched, nor anything of a merge that runs.
    """

    def body() -> dict[str, Any]:
        from pipeline.cleaning import clean as run_clean

        return run_clean(url, older_than_s=older_than, dry_run=dry_run)

    result = _run(body)
    from pipeline.reporting.text_view import cleaned_view

    _emit(result, as_json, lambda: cleaned_view(result))


@main.command()
@cli_options.as_json
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
    from pipeline.reporting.text_view import methods_view

    _emit(found, as_json, lambda: methods_view(found))


@main.command()
@cli_options.as_json
def schema(as_json: bool) -> None:
    """Print the JSON Schema of a recipe, for editors."""

    def body() -> dict[str, Any]:
        from pipeline.methods import registry
        from pipeline.recipe import recipe_schema

        return recipe_schema({name: method.schema for name, method in registry().items()})

    document = _run(body)
    _emit(document, True, lambda: ())


def _to_resources(options: dict[str, Any]) -> Any:
    from pipeline.merging import Resources

    same = {name: options[name] for name in ("executor", "address", "workers", "device")}
    return Resources(memory_bytes=options["memory"], **same)


def _run_told(body: Callable[[Listener], dict[str, Any]], progress: str, *, resumes: bool = True) -> dict[str, Any]:
    """Run a command of hours, its progress shown as asked.

    `resumes` says whether the same command goes on from what is done when this one was stopped.
    """
    from pipeline.engine.process import raise_descriptor_limit
    from pipeline.reporting.json_lines import only_lines
    from pipeline.reporting.progress import listening

    as_lines = progress == "json"

    def told(stream: TextIO) -> dict[str, Any]:
        raise_descriptor_limit()
        with listening(progress, stream) as listener:

            def listen(event: Event) -> None:
                # Ray puts a handler of its own in place of ours when it starts.
                signals.install()
                listener(event)

            return body(listen)

    with only_lines(sys.stderr) if as_lines else nullcontext(sys.stderr) as stream:
        return _run(lambda: told(stream), stream, as_lines=as_lines, resumes=resumes)


def _run(
    body: Callable[[], dict[str, Any]], stream: TextIO | None = None, *, as_lines: bool = False, resumes: bool = True
) -> dict[str, Any]:
    """Return what a command found; an error of ours ends the process with its text and exit code, no traceback."""
    stream = stream or sys.stderr
    _start_logging(stream, as_lines)
    try:
        with signals.Unwinding():
            return body()
    except PipelineError as error:
        _fail(error, error.exit_code, stream, as_lines)
    except KeyboardInterrupt:
        _fail(_stopped(resumes), signals.INTERRUPTED, stream, as_lines, prefix="")
    except SystemExit as end:
        code = signals.exit_code(end.code)
        if code is None:
            raise
        _fail(_stopped(resumes), code, stream, as_lines, prefix="")
    except (MemoryError, RuntimeError) as error:
        refused = _refused(error)
        if refused is None:
            raise
        _fail(refused, refused.exit_code, stream, as_lines)


def _refused(error: Exception) -> WorkerError | None:
    """Return the error for what the system would not give this process; None for anything else."""
    if isinstance(error, MemoryError):
        what, remedy = "memory", "a smaller --memory, or a higher ulimit -v"
    elif str(error) == _NO_THREAD:
        what, remedy = "another thread", "a higher ulimit -u, ulimit -v, or limit of the container's processes"
    else:
        return None
    return WorkerError(Problem(what=f"the system refuses this process {what}", remedy=f"{remedy}; then run again"))


def _stopped(resumes: bool) -> PipelineError:
    anew = "stopped; the same command begins anew, and without --overwrite it resumes what this one has begun"
    return PipelineError(Problem(what=signals.STOPPED if resumes else anew))


def _fail(error: PipelineError, code: int, stream: TextIO, as_lines: bool, prefix: str = "error: ") -> NoReturn:
    if as_lines:
        from pipeline.reporting.json_lines import error_fields, write_line

        write_line(stream, {**error_fields(error), "exit_code": code})
    else:
        # Nobody may read it any more; the code tells it, too.
        with suppress(OSError):
            click.echo(f"{prefix}{error}", file=stream)
    sys.exit(code)


def _start_logging(stream: TextIO, as_lines: bool) -> None:
    """Send what this package has to tell, and the warnings of others, to standard error."""
    handler: logging.Handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if as_lines:
        from pipeline.reporting.json_lines import JsonLogs

        handler = JsonLogs(stream)
        logging.captureWarnings(True)
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO)


def _emit(document: dict[str, Any], as_json: bool, view: Callable[[], Iterable[Any]]) -> None:
    """Show what a command found: as JSON, or as the view's lines and tables."""
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    from rich.console import Console

    for part in view():
        if isinstance(part, str):
            click.echo(part)
        else:
            Console().print(part)
