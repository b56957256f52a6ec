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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.engine.claim import Claim
from pipeline.engine.executors import create_executor
from pipeline.engine.executors.base import Executor
from pipeline.engine.run_folder import PLAN, read_json, write_json
from pipeline.errors import (
    ClaimedError,
    OutputError,
    PipelineError,
    Problem,
    RecipeError,
    StorageError,
    VerificationError,
    WorkerError,
)
from pipeline.events import Listener, Note, ignore
from pipeline.merging import Resources, load_recipe, merge, open_output, plan_merge
from pipeline.reporting.batch_summary import SUMMARY, TABLE, Row, Watch, as_text, exit_code, now, save, summary
from pipeline.reporting.batch_view import RecipeEnded, RecipeStarted
from pipeline.storage import Store, join_url, open_store, redacted, shown_url

__all__ = ["FOLDER", "SUMMARY", "TABLE", "Row", "batch", "exit_code", "find_recipes"]

_log = logging.getLogger(__name__)

# Beside the outputs; holds the summary, and the claim of the batch that is at it.
FOLDER = "_geomerge_batch"
# How no recipe may be called: the outputs' folder has names of ours that begin so.
_OURS = "_geomerge"
# What a recipe is called; anything else in the folder is left alone.
_SUFFIXES = (".yaml", ".yml")


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
    names = _find(recipes_url)
    with closing(open_store(join_url(outputs_url, FOLDER))) as place, ExitStack() as opened:
        run = _Batch(
            rows=_rows(names, recipes_url, outputs_url),
            urls={stem: (join_url(recipes_url, name), join_url(outputs_url, stem)) for stem, name in names.items()},
            place=place,
            resources=resources or Resources(),
            overwrite=overwrite,
            listener=listener,
            heading={"recipes": shown_url(recipes_url), "outputs": shown_url(outputs_url)},
        )
        claim = opened.enter_context(Claim.take(place, describe=run.progress, listener=listener))
        return run.run(claim)


def find_recipes(recipes_url: str, outputs_url: str) -> tuple[Row, ...]:
    """Return the recipes of a folder with their outputs, sorted by name.

    Raises:
        RecipeError: There are none, two would have one output, or a name cannot be used.
        StorageError: The folder cannot be listed.
    """
    return _rows(_find(recipes_url), recipes_url, outputs_url)


def _rows(names: Mapping[str, str], recipes_url: str, outputs_url: str) -> tuple[Row, ...]:
    recipes, outputs = shown_url(recipes_url), shown_url(outputs_url)
    return tuple(
        Row(recipe=stem, recipe_url=join_url(recipes, name), output=join_url(outputs, stem))
        for stem, name in names.items()
    )


def _find(recipes_url: str) -> dict[str, str]:
    """Return the names of a folder's recipes by what they are called, sorted."""
    with closing(open_store(recipes_url)) as store:
        names = [path for path in store.list() if _is_recipe(path)]
        where = f"recipes {store.location()}"
    if not names:
        remedy = "name the folder or prefix in which they lie"
        raise RecipeError(Problem(what="holds no recipes, *.yaml or *.yml", where=where, remedy=remedy))
    # The summary is text, for every program to read.
    problems = [
        Problem(what=f"{name!a} is no UTF-8 text", where=where, remedy="rename it")
        for name in names
        if not _is_text(name)
    ]
    stems: dict[str, list[str]] = {}
    for name in filter(_is_text, names):
        stems.setdefault(name.rpartition(".")[0], []).append(name)
    problems += [
        Problem(what=f"{' and '.join(same)} would have one output", where=where, remedy="rename one")
        for same in stems.values()
        if len(same) > 1
    ]
    problems += [
        Problem(what=f"a recipe may not be called {stem}: such names are ours", where=where, remedy="rename it")
        for stem in stems
        if stem.startswith(_OURS)
    ]
    if problems:
        raise RecipeError(*problems)
    return {stem: same[0] for stem, same in sorted(stems.items())}


def _is_text(name: str) -> bool:
    """Return whether a file's name is text: others come with half characters in place of their bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_recipe(path: str) -> bool:
    """Return whether a path is a recipe of the folder itself, and no hidden file of an editor."""
    return "/" not in path and not path.startswith(".") and path.endswith(_SUFFIXES)


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
        code = 143 if isinstance(end, SystemExit) else 130 if isinstance(end, KeyboardInterrupt) else 1
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
        except (OutputError, VerificationError):
            # What is not ours stays, this very merge is resumed or left, and what cannot be replaced is refused again.
            if not (self.overwrite and self._holds_another(row, executor)):
                raise
        self.listener(Note(text=f"{row.output} was merged from another recipe or other files, and is replaced"))
        return run(overwrite=True)

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


def _stop_behind(error: BaseException, outer: BaseException | None) -> BaseException | None:
    """Return what told the process to stop, if an error came up while that unwound the merge."""
    before = error.__cause__ or error.__context__
    if before is None or before is outer:
        return None
    return before if isinstance(before, KeyboardInterrupt | SystemExit) else _stop_behind(before, outer)
