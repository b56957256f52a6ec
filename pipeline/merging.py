"""A merge from recipe to commit, as one call: what the command line runs and what a program imports.

Owns the wiring of the rooms; every decision lives in one of them.
"""

from __future__ import annotations

import json
import posixpath
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engine.bandwidth import given_rates, measure_rates
from pipeline.engine.driver import Driver
from pipeline.engine.executors import create_executor, takes_ray
from pipeline.engine.output import State, commit, prepare, refuse_inputs
from pipeline.engine.process import cores
from pipeline.engine.result_tables import save_tables
from pipeline.engine.run_folder import REPORT, read_json
from pipeline.engine.worker import Job
from pipeline.errors import PipelineError, Problem, RecipeError
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
from pipeline.storage import Store, open_store

# Enough for 20 models in flight and a good part of a small family kept in memory, on any machine that trains models.
DEFAULT_MEMORY_BYTES = 4_000_000_000


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
        RecipeError: It cannot be found, read as text, or understood.
    """
    if Path(url).is_dir():
        raise RecipeError(Problem(what="is a folder", where=f"recipe {url}", remedy="name the recipe's file"))
    folder, name = posixpath.split(url)
    store = open_store(folder or ".")
    try:
        text = store.read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(Problem(what="is no UTF-8 text", where=f"recipe {url}")) from error
    except PipelineError as error:
        raise RecipeError(
            Problem(what=str(error.problems[0].what), where=f"recipe {url}", remedy="name an existing recipe file")
        ) from error
    methods = {name: method.schema for name, method in registry().items()}
    return parse_recipe(text, source=url, methods=methods), text


def plan_merge(recipe: Recipe, output: Store, resources: Resources, *, probe: bool) -> Planned:
    """Plan a merge: headers only, all mismatches at once, memory and cost projected.

    Args:
        recipe: The recipe.
        output: Where the result would go; it is not touched.
        resources: What workers may use.
        probe: Measure this machine's rates for the projected time, unless the recipe gives a bandwidth.

    Raises:
        PipelineError: Recipe, models, output or budget do not fit.
    """
    started = time.perf_counter()
    sources = open_sources(recipe)
    plan = build_plan(recipe, registry()[recipe.merge_method], sources)
    refuse_inputs(plan, output)
    workers = resources.workers
    # An actor has one CPU; a local worker its share of this machine.
    on_ray = takes_ray(resources.executor, address=resources.address)
    threads = 1 if on_ray else max(1, cores() // workers)
    memory = project_memory(
        plan, budget_bytes=resources.memory_bytes, threads=threads, remote_output=not output.is_local
    )
    seconds = time.perf_counter() - started
    rates = None
    if recipe.pipeline.bandwidth_bytes is not None:
        rates = given_rates(recipe.pipeline.bandwidth_bytes)
    elif probe:
        rates = measure_rates(plan, memory, workers=workers)
    cost = project_cost(plan, memory, workers=workers, rates=rates)
    return Planned(plan=plan, sources=sources, memory=memory, cost=cost, rates=rates, workers=workers, seconds=seconds)


def merge(
    recipe_url: str,
    output_url: str,
    *,
    resources: Resources | None = None,
    overwrite: bool = False,
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Merge what a recipe says into a folder and return the report.

    A second call with the same recipe resumes an interrupted merge, or returns the report of a finished one.

    Args:
        recipe_url: Path or URL of the recipe.
        output_url: Path or URL of the output folder.
        resources: Where to run and with what.
        overwrite: Start again: replace what is in the output folder, be it another merge or model or this one.
        listener: Told what happens.

    Raises:
        PipelineError: Anything that stands in the way; nothing is committed then.
    """
    recipe, text = load_recipe(recipe_url)
    with closing(open_store(output_url)) as output:
        return _merge(recipe, text, output, resources or Resources(), overwrite=overwrite, listener=listener)


def _merge(
    recipe: Recipe, text: str, output: Store, resources: Resources, *, overwrite: bool, listener: Listener
) -> dict[str, Any]:
    """Merge a recipe that was read into a folder that was opened."""
    planned = plan_merge(recipe, output, resources, probe=False)
    plan = planned.plan
    for note in plan.notes:
        listener(Note(text=note))
    if prepare(plan, output, overwrite=overwrite) is State.COMMITTED:
        report = read_json(output, REPORT)
        if report is not None:
            listener(Note(text="already merged by the same recipe from the same files; nothing to do"))
            return report
    job = Job(plan=plan, output_url=output.url, memory=planned.memory, device=resources.device)
    driver = Driver(
        plan=plan,
        output=output,
        executor=create_executor(resources.executor, address=resources.address),
        job=job,
        workers=planned.workers,
        listener=listener,
    )
    outcome = driver.run()
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
    commit(plan, output, planned.sources.donors(plan.donor), documents, config)
    listener(Committed(location=output.location()))
    return report
