"""A merge from recipe to commit, as one call: what the command line runs and what a program imports.

Owns the wiring of the rooms; every decision lives in one of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.engine.bandwidth import given_rates, measure_rates
from pipeline.engine.claim import Claim
from pipeline.engine.driver import Driver, Outcome
from pipeline.engine.executors import create_executor, takes_ray
from pipeline.engine.executors.base import Executor
from pipeline.engine.output import State, commit, examine, prepare, untried
from pipeline.engine.process import cores
from pipeline.engine.progress import Progress
from pipeline.engine.refusals import refuse_inputs
from pipeline.engine.result_tables import save_tables
from pipeline.engine.reuse import Earlier, refuse_useless, reuse_statistics
from pipeline.engine.run_folder import REPORT, read_json
from pipeline.engine.runs import newest_run
from pipeline.engine.worker import Job
from pipeline.errors import OutputError, PipelineError, Problem, RecipeError, StorageError
from pipeline.events import Committed, Listener, Note, ignore
from pipeline.methods import registry
from pipeline.planning.adapter_output import merged_adapter_config
from pipeline.planning.build import build_plan
from pipeline.planning.cost import Cost, Rates, project_cost
from pipeline.planning.memory import Memory, project_memory
from pipeline.planning.plan import Plan
from pipeline.planning.sources import Sources, open_sources
from pipeline.planning.traffic import one_read_bytes
from pipeline.recipe import Recipe, parse_recipe
from pipeline.reporting.model_card import model_card
from pipeline.reporting.report import build_report
from pipeline.storage import MissingObject, Store, open_store, shown_url, split_url
from pipeline.storage.page_cache import page_cache_bytes
from pipeline.units import format_bytes

# Enough for 20 models in flight and a good part of a small family kept in memory, on any machine that trains models.
DEFAULT_MEMORY_BYTES = 4_000_000_000
# A recipe of a thousand models has a tenth of it; what is longer is another file, perhaps a model's.
_RECIPE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Where a merge runs and with what; nothing here changes a bit of the output.

    Attributes:
        executor: "auto", "local" or "ray".
        address: Of a Ray cluster, or None.
        workers: How many workers.
        memory_bytes: What each worker may hold.
        device: "auto", "cpu" or "cuda".
    """

    executor: str = "auto"
    address: str | None = None
    workers: int = 1
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan with its resources: all that `geomerge plan` shows."""

    plan: Plan
    sources: Sources
    memory: Memory
    cost: Cost
    rates: Rates | None
    workers: int
    seconds: float


def load_recipe(url: str) -> tuple[Recipe, str]:
    """Return a recipe and its text.

    Raises:
        RecipeError: It cannot be found, is too long, or cannot be read as text or understood.
    """
    shown = shown_url(url)
    if Path(url).is_dir():
        raise RecipeError(Problem(what="is a folder", where=f"recipe {shown}", remedy="name the recipe's file"))
    folder, name = split_url(url)
    store = open_store(folder)
    try:
        _refuse_long(store, name, shown)
        text = store.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(Problem(what="is no UTF-8 text", where=f"recipe {shown}")) from error
    except StorageError as error:
        problem = error.problems[0]
        remedy = "name an existing recipe file" if isinstance(error, MissingObject) else problem.remedy
        raise RecipeError(Problem(what=problem.what, where=f"recipe {shown}", remedy=remedy)) from error
    methods = {name: method.schema for name, method in registry().items()}
    return parse_recipe(text, source=shown, methods=methods), text


def _refuse_long(store: Store, name: str, shown: str) -> None:
    """Raise for a file that cannot be a recipe, before it is read."""
    try:
        size_bytes = store.stat(name).size_bytes
    except MissingObject:
        raise
    except StorageError:
        # Web servers need not tell a size, and may show a signed URL to readers alone.
        if not store.url.startswith(("http://", "https://")):
            raise
        return
    if size_bytes > _RECIPE_BYTES:
        what = f"is {format_bytes(size_bytes)} long, which no recipe is: at most {format_bytes(_RECIPE_BYTES)}"
        raise RecipeError(Problem(what=what, where=f"recipe {shown}", remedy="name the recipe's file"))


def open_output(recipe: Recipe, url: str) -> Store:
    """Return the store of an output folder, opened as the recipe says."""
    return open_store(url, recipe.pipeline.storage.of(url))


def plan_merge(
    recipe: Recipe, output: Store, resources: Resources, *, probe: bool, on_ray: bool | None = None
) -> Planned:
    """Plan a merge: headers only, all mismatches at once, memory and cost projected.

    Args:
        recipe: The recipe.
        output: Where the result would go; it is not touched.
        resources: What workers may use.
        probe: For whoever only plans: measure this machine's rates for the projected time, unless the recipe gives a
            bandwidth, and note what in the output folder would stop the merge.
        on_ray: Whether workers are Ray actors; None to tell by the resources.

    Raises:
        PipelineError: Recipe, models, output or budget do not fit.
    """
    started = time.perf_counter()
    sources = open_sources(recipe)
    plan = build_plan(recipe, registry()[recipe.merge_method], sources)
    refuse_inputs(plan, output)
    if probe:
        plan = replace(plan, notes=(*plan.notes, *_obstacles(plan, output), *_idle(plan, resources.workers)))
    workers = resources.workers
    # An actor has one CPU; a local worker its share of this machine.
    if on_ray is None:
        on_ray = takes_ray(resources.executor, address=resources.address)
    threads = 1 if on_ray else max(1, cores() // workers)
    memory = project_memory(
        plan,
        budget_bytes=resources.memory_bytes,
        threads=threads,
        remote_output=not output.is_local,
        cache_bytes=page_cache_bytes(),
    )
    seconds = time.perf_counter() - started
    rates = None
    if recipe.pipeline.bandwidth_bytes is not None:
        rates = given_rates(recipe.pipeline.bandwidth_bytes)
    elif probe:
        rates = measure_rates(plan, memory, workers=workers, output=output)
    cost = project_cost(plan, memory, workers=workers, rates=rates)
    return Planned(plan=plan, sources=sources, memory=memory, cost=cost, rates=rates, workers=workers, seconds=seconds)


def _idle(plan: Plan, workers: int) -> Iterator[str]:
    """Yield that some workers will have nothing to do: an output file is the unit of their work."""
    files = len(plan.files)
    if workers > files:
        remedy = "a smaller pipeline: {file_size: ...} makes more"
        yield f"{workers} workers, but the output has {files} file{'s' if files > 1 else ''}: {remedy}"


def _obstacles(plan: Plan, output: Store) -> Iterator[str]:
    """Yield what a merge into a folder would be refused for now, or find done; reads only."""
    try:
        if examine(plan, output, overwrite=False) is State.COMMITTED:
            yield "the output holds this very merge, finished"
        else:
            yield from map(str, untried(plan, output))
        run = newest_run(output)
        if run is not None and run.lives_here() is not False:
            yield f"the output may be in use: {run.who}"
    except PipelineError as error:
        yield from map(str, error.problems)


def merge(
    recipe_url: str,
    output_url: str,
    *,
    resources: Resources | None = None,
    overwrite: bool = False,
    listener: Listener = ignore,
    executor: Executor | None = None,
    reuse: Sequence[str] = (),
    same_models: Sequence[str] = (),
) -> dict[str, Any]:
    """Merge what a recipe says into a folder and return the report.

    A second call with the same recipe resumes an interrupted merge, or returns the report of a finished one.

    Args:
        recipe_url: Path or URL of the recipe.
        output_url: Path or URL of the output folder.
        resources: Where to run and with what.
        overwrite: Start again: replace what is in the output folder, be it another merge or model or this one. What an
            earlier run with it has begun of this merge, and could not end, is gone on with.
        listener: Told what happens.
        executor: Runs the workers instead of one that `resources` names; it may have served other merges, and is left
            open for more.
        reuse: Outputs of earlier merges of the same models, or of more of them: distances that are there are not
            measured again.
        same_models: The same, but only of merges whose models prove to be the same in the same order.

    Raises:
        PipelineError: Anything that stands in the way; nothing is committed then.
    """
    resources = resources or Resources()
    recipe, text = load_recipe(recipe_url)
    with ExitStack() as opened:
        output = opened.enter_context(closing(open_output(recipe, output_url)))
        if executor is None:
            executor = opened.enter_context(
                closing(create_executor(resources.executor, address=resources.address, listener=listener))
            )
        earlier = [
            Earlier(store=opened.enter_context(closing(open_output(recipe, url))), exact=not asked, asked=asked)
            for asked, urls in ((True, reuse), (False, same_models))
            for url in urls
        ]
        return _merge(recipe, text, output, resources, executor, earlier, overwrite=overwrite, listener=listener)


def _merge(
    recipe: Recipe,
    text: str,
    output: Store,
    resources: Resources,
    executor: Executor,
    earlier: Sequence[Earlier],
    *,
    overwrite: bool,
    listener: Listener,
) -> dict[str, Any]:
    """Merge a recipe that was read into a folder that was opened."""
    for folder in earlier:
        refuse_useless(folder.store, output)
    planned = plan_merge(recipe, output, resources, probe=False, on_ray=executor.name == "ray")
    plan = planned.plan
    for note in (*plan.notes, *_idle(plan, planned.workers)):
        listener(Note(text=note))
    # Reads only: a finished merge is left as it is, also where nothing can be written, and so is what is refused.
    if examine(plan, output, overwrite=overwrite) is State.COMMITTED:
        return _finished(output, listener)
    # Before the claim: whoever cannot work keeps nobody else from it.
    executor.reach(workers=planned.workers, memory_bytes=planned.memory.total_bytes)
    progress = Progress(listener, executor.waiting)
    with Claim.take(output, describe=progress.snapshot, overwrite=overwrite, listener=listener) as claim:
        state = prepare(plan, output, overwrite=overwrite, continues=claim.continues)
        if state is State.COMMITTED:
            return _finished(output, listener)
        if overwrite and state is State.FRESH:
            claim.begun_anew()
        taken = reuse_statistics(plan, output, earlier, listener)
        planned = replace(planned, plan=replace(plan, notes=(*plan.notes, *taken)))
        job = Job(plan=plan, output_url=output.url, memory=planned.memory, device=resources.device)
        driver = Driver(
            plan=plan,
            output=output,
            executor=executor,
            job=job,
            workers=planned.workers,
            listener=progress,
            guard=claim.guard,
        )
        outcome = driver.run()
        return _commit(planned, outcome, output, text, listener=listener, check=claim.check)


def _finished(output: Store, listener: Listener) -> dict[str, Any]:
    """Return the report of a merge that an earlier run has committed; its presence is part of being committed."""
    listener(Note(text="already merged by the same recipe from the same files; nothing to do"))
    report = read_json(output, REPORT)
    if report is None:
        raise OutputError(Problem(what="changed while it was read", where=f"output {output.location()}"))
    return report


def _commit(
    planned: Planned, outcome: Outcome, output: Store, text: str, *, listener: Listener, check: Callable[[], None]
) -> dict[str, Any]:
    """Write what a merge leaves beside the weights, make it visible, and return its report."""
    plan = planned.plan
    shares = save_tables(plan, outcome, output)
    report = build_report(plan, outcome, input_bytes=one_read_bytes(plan), unchanged_shares=shares)
    for note in report["notes"][len(plan.notes) :]:
        listener(Note(text=note))
    documents = {
        REPORT: (json.dumps(report, indent=1) + "\n").encode(),
        "README.md": model_card(report, text).encode(),
    }
    as_adapter = plan.settings.output == "adapter"
    config = merged_adapter_config(plan, planned.sources) if as_adapter else None
    written = {file.name: file.sha256 for file in outcome.written}
    commit(plan, output, planned.sources.donors(plan.donor), documents, config, written=written, check=check)
    listener(Committed(location=output.location()))
    return report
