"""A folder of recipes, merged one after the other on the same workers: what a nightly job runs.

Owns the order, and what a failure means for the others. Every merge is `pipeline.merging.merge`; how a
batch looks lives in `pipeline.reporting`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pipeline import signals
from pipeline.engine.claim import Claim
from pipeline.engine.executors import create_executor
from pipeline.engine.executors.base import Executor
from pipeline.engine.run_folder import PLAN, read_json, write_json
from pipeline.errors import (
    ClaimedError,
    OutputError,
    PipelineError,
    Problem,
    StorageError,
    VerificationError,
    WorkerError,
)
from pipeline.events import Listener, Note, ignore
from pipeline.merging import Resources, load_recipe, merge, open_output, plan_merge
from pipeline.recipe_folder import entangled, find, find_recipes, rows_of
from pipeline.reporting.batch_summary import SUMMARY, TABLE, Row, Watch, as_text, exit_code, now, save, summary
from pipeline.reporting.batch_view import RecipeEnded, RecipeStarted
from pipeline.storage import Store, join_url, open_store, place_of, redacted, shown_url

__all__ = ["FOLDER", "SUMMARY", "TABLE", "Row", "batch", "exit_code", "find_recipes"]

_log = logging.getLogger(__name__)

# Beside the outputs; holds the summary, and the claim of the batch that is at it.
FOLDER = "_geomerge_batch"


def batch(
    recipes_url: str,
    outputs_url: str,
    *,
    resources: Resources | None = None,
    overwrite: bool = False,
    listener: Listener = ignore,
) -> dict[str, Any]:
    """Merge every recipe of a folder into a folder of its name, on the same workers, and return the summary.

    What is committed already is left as it is; one that fails does not stop the others. The summary is saved in
    `_geomerge_batch/` of the outputs after every recipe, and also when the batch is interrupted.

    Args:
        recipes_url: A folder or prefix that holds `*.yaml` and `*.yml`; folders in it are not looked into.
        outputs_url: A folder or prefix; a recipe's output is its name below.
        resources: Where to run and with what.
        overwrite: Merge again what was merged before from another recipe or other files; the rest is left as it is.
        listener: Told what happens.

    Raises:
        RecipeError: There are no recipes, or two would have one output.
        OutputError: There is no such place for outputs, or another batch is at it.
        StorageError: Recipes cannot be listed, or the summary cannot be saved.
    """
    if not outputs_url.strip():
        raise OutputError(
            Problem(what="the URL of the outputs is empty", remedy="give a folder or a URL such as s3://bucket/prefix")
        )
    names = find(recipes_url, listener)
    for text in entangled(recipes_url, outputs_url):
        listener(Note(text=text))
    with closing(open_store(join_url(outputs_url, FOLDER))) as place, ExitStack() as opened:
        run = _Batch(
            rows=rows_of(names, recipes_url, outputs_url),
            urls={stem: (join_url(recipes_url, name), join_url(outputs_url, stem)) for stem, name in names.items()},
            place=place,
            resources=resources or Resources(),
            overwrite=overwrite,
            listener=listener,
            heading={"recipes": shown_url(recipes_url), "outputs": shown_url(outputs_url)},
        )
        claim = opened.enter_context(Claim.take(place, describe=run.progress, listener=listener))
        return run.run(claim)


@dataclass(kw_only=True)
class _Batch:
    """One run over the recipes; `urls` are those of recipe and output, with the credentials that they may hold."""

    rows: tuple[Row, ...]
    urls: Mapping[str, tuple[str, str]]
    place: Store
    resources: Resources
    overwrite: bool
    listener: Listener
    heading: dict[str, str]
    executor: Executor | None = None
    # By base and models as recipes have them, where the last merge of them lies.
    measured: dict[tuple[str | None, ...], str] = field(default_factory=dict)
    number: int = 0
    started: float = field(default_factory=time.perf_counter)
    began: str = field(default_factory=now)
    # What our caller is handling, if we run in its `except`: it is behind every error here and stops nothing.
    outer: BaseException | None = field(default_factory=lambda: sys.exc_info()[1])

    def progress(self) -> dict[str, Any]:
        """Return what the claim says of this batch; called from another thread."""
        return {"number": self.number, "recipes": len(self.rows), "recipe": self.rows[max(0, self.number - 1)].recipe}

    def run(self, claim: Claim) -> dict[str, Any]:
        """Merge them all; save and return the summary."""
        try:
            for number, row in enumerate(self.rows, start=1):
                claim.check()
                self.number = number
                self.listener(RecipeStarted(recipe=row.recipe, output=row.output, number=number, count=len(self.rows)))
                with self._timed(row):
                    self._one(row)
                self.listener(RecipeEnded(recipe=row.recipe, state=row.state, seconds=row.seconds, error=row.error))
                if number < len(self.rows):
                    self._save_so_far()
            return self._save("finished")
        except ClaimedError:
            # The summary is another batch's now.
            raise
        except BaseException as end:
            self._stopped(end)
            raise
        finally:
            self._close()

    def _stopped(self, end: BaseException) -> None:
        """Save how far it came; what stopped it must not be hidden by a summary that cannot be saved."""
        code = 130 if isinstance(end, KeyboardInterrupt) else 1
        if isinstance(end, SystemExit):
            code = signals.exit_code(end.code) or 143
        for row in self.rows:
            if row.state in ("stopped", "not started"):
                row.exit_code = end.exit_code if isinstance(end, PipelineError) else code
        try:
            self._save("stopped")
        except StorageError as error:
            _log.warning("the summary could not be saved: %s", error)

    def _one(self, row: Row) -> None:
        """Merge one recipe and note what became of it."""
        watch = Watch(self.listener)
        # What it stays when the process is told to stop.
        row.state, row.error = "stopped", "stopped; the same command resumes"
        try:
            report = self._merge(row, watch)
        except Exception as error:
            # The one place where errors that are not ours end as a text: whatever is wrong with one recipe, or with us
            # when we merge it, the others are merged.
            self._failed(row, watch, error)
            return
        row.state, row.error = ("committed" if watch.committed else "unchanged"), ""
        row.fingerprint = report["fingerprint"]
        if watch.committed:
            row.bytes_read, row.bytes_written = report["bytes_read"], report["bytes_written"]

    def _failed(self, row: Row, watch: Watch, error: Exception) -> None:
        """Note why a recipe is not merged; raise what stopped the process when that is behind the error."""
        stop = _stop_behind(error, self.outer)
        if stop is not None:
            raise stop
        ours = isinstance(error, PipelineError)
        row.state = "busy" if isinstance(error, ClaimedError) else "failed"
        row.error = as_text(error if ours else f"{type(error).__name__}: {redacted(str(error), ())}")
        row.exit_code = error.exit_code if isinstance(error, PipelineError) else 1
        row.bytes_read, row.bytes_written = watch.read_bytes, watch.written_bytes

    def _merge(self, row: Row, watch: Watch) -> dict[str, Any]:
        """Return the report of a merge; with `overwrite`, one that was made of something else is replaced."""
        if self.executor is None:
            self.executor = create_executor(
                self.resources.executor, address=self.resources.address, listener=self.listener
            )
        intact = False
        try:
            report = self._merged(row, watch, self.executor)
            intact = True
            return report
        except PipelineError as error:
            intact = not isinstance(error, WorkerError)
            raise
        finally:
            if not intact:
                # What is left of the workers must not spoil the next merge.
                self._close()

    def _merged(self, row: Row, watch: Watch, executor: Executor) -> dict[str, Any]:
        recipe_url, output_url = self.urls[row.recipe]
        recipe, _ = load_recipe(recipe_url)
        models = (recipe.base_model, *(entry.model for entry in recipe.models))
        # What another recipe of this batch has measured of the same models is not measured again.
        same = [self.measured[models]] if models in self.measured else []
        self._note_neighbours([model for model in models if model is not None])
        report = self._merged_or_replaced(row, watch, executor, same)
        self.measured[models] = output_url
        return report

    def _merged_or_replaced(
        self, row: Row, watch: Watch, executor: Executor, same_models: Sequence[str]
    ) -> dict[str, Any]:
        recipe_url, output_url = self.urls[row.recipe]
        run = partial(
            merge,
            recipe_url,
            output_url,
            resources=self.resources,
            listener=watch,
            executor=executor,
            same_models=same_models,
        )
        try:
            return run()
        except ClaimedError:
            raise
        except (OutputError, VerificationError) as error:
            # What is not ours stays, this very merge is resumed or left, and what cannot be replaced is refused again.
            if not self._is_ours(row):
                raise _left_alone(error) from error
            if not (self.overwrite and self._holds_another(row, executor)):
                raise
        self.listener(Note(text=f"{row.output} was merged from another recipe or other files, and is replaced"))
        return run(overwrite=True)

    def _is_ours(self, row: Row) -> bool:
        """Return whether a recipe's output holds the plan of a merge, or nothing at all."""
        recipe_url, output_url = self.urls[row.recipe]
        with closing(open_output(load_recipe(recipe_url)[0], output_url)) as output:
            paths = output.list()
            return not paths or PLAN in paths

    def _note_neighbours(self, models: Sequence[str]) -> None:
        """Tell of models among the outputs that no recipe here makes: their names may be recipes' one day."""
        outputs = place_of(self.heading["outputs"])
        ours = tuple(place_of(output_url) for _, output_url in self.urls.values())
        for model in models:
            place = place_of(model)
            if place.startswith(outputs) and not place.startswith(ours):
                self.listener(Note(text=f"model {shown_url(model)} lies in OUTPUTS, and no recipe here makes it"))

    def _holds_another(self, row: Row, executor: Executor) -> bool:
        """Return whether a recipe's output holds a merge of ours that is not this recipe's, or a damaged plan."""
        recipe_url, output_url = self.urls[row.recipe]
        recipe, _ = load_recipe(recipe_url)
        with closing(open_output(recipe, output_url)) as output:
            try:
                existing = read_json(output, PLAN)
            except VerificationError:
                return True
            if existing is None:
                return False
            planned = plan_merge(recipe, output, self.resources, probe=False, on_ray=executor.name == "ray")
            return existing.get("fingerprint") != planned.plan.fingerprint

    @contextmanager
    def _timed(self, row: Row) -> Iterator[None]:
        started = time.perf_counter()
        row.started = now()
        try:
            yield
        finally:
            row.seconds, row.ended = round(time.perf_counter() - started, 3), now()

    def _close(self) -> None:
        executor, self.executor = self.executor, None
        if executor is not None:
            executor.close()

    def _save_so_far(self) -> None:
        """Save what is known, for whoever looks and for a batch that is killed."""
        try:
            write_json(self.place, SUMMARY, self._summary("running"))
        except StorageError as error:
            # The next one may succeed, and the merges matter more.
            self.listener(Note(text=f"the summary could not be saved: {error}"))

    def _save(self, state: str) -> dict[str, Any]:
        """Save and return the last word."""
        return save(self.place, self._summary(state), self.rows)

    def _summary(self, state: str) -> dict[str, Any]:
        seconds = time.perf_counter() - self.started
        return summary(self.rows, self.heading, state=state, began=self.began, seconds=seconds)


def _left_alone(error: PipelineError) -> PipelineError:
    """Return an error of a folder that is not ours without the advice to overwrite it: a batch does not do that."""
    return type(error)(
        *(
            replace(problem, remedy="choose other outputs; a batch leaves alone what geomerge has not written")
            if "--overwrite" in problem.remedy
            else problem
            for problem in error.problems
        )
    )


def _stop_behind(error: BaseException, outer: BaseException | None) -> BaseException | None:
    """Return what told the process to stop, if an error came up while that unwound the merge."""
    before = error.__cause__ or error.__context__
    if before is None or before is outer:
        return None
    return before if isinstance(before, KeyboardInterrupt | SystemExit) else _stop_behind(before, outer)
