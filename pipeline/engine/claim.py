"""The claim on an output folder: one run at a time writes there.

Owns taking, holding and leaving: a run takes over by creating the run file of the next number exclusively, so of many
that try at once one succeeds; while it lives a thread raises a counter in it. Must not know what a run does.

What a claim cannot do is stop a writer that the network has cut off. A late writer of the same plan does no harm: the
bytes of a file depend on the plan alone, so it replaces a file by the same bytes. Another plan gets in by --overwrite
only, which is refused while a claim lives; what a writer of the plan before leaves after that carries that plan's
fingerprint (markers, statistics, solutions), so it is never taken for this plan's. Just before the commit the claim is
renewed and read, and every marker compared with what was written. What is left is a weights file of the same size that
lands without its marker, or after that comparison: only `geomerge verify` sees it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from pipeline.engine.process_identity import host_name, machine_name, process_start
from pipeline.engine.run_folder import PLAN
from pipeline.engine.runs import (
    INTERVAL_S,
    MISSED_INTERVALS,
    OWN_TOKENS,
    RUNS,
    Run,
    moves,
    newest_run,
    read_run,
    read_runs,
    run_numbers,
    run_path,
    seen_to_live,
)
from pipeline.errors import ClaimedError, OutputError, PipelineError, Problem, StorageError, VerificationError
from pipeline.events import Listener, Note, ignore
from pipeline.storage import MissingObject, Store

__all__ = ["INTERVAL_S", "MISSED_INTERVALS", "RUNS", "Claim", "Run", "moves", "newest_run"]

_log = logging.getLogger(__name__)

# Times that a folder may change hands while we look.
_TRIES = 20

# What a run that began has left when it is over: a merge its plan, a batch its summary.
_LASTING = frozenset({PLAN, "summary.json"})

Describe = Callable[[], Mapping[str, Any]]


class Claim:
    """What this run holds on an output folder; a context manager that lets go of it.

    Made by `take`.

    Attributes:
        continues: Whether this run and the one before were told to make the folder anew, and that one had begun when it
            was killed or interrupted.
    """

    def __init__(
        self, output: Store, number: int, *, interval_s: float, describe: Describe, continues: bool = False
    ) -> None:
        self._output, self._number = output, number
        self.continues = self._overwrite = continues
        self._interval_s, self._describe = interval_s, describe
        self._token = secrets.token_hex(8)
        self._identity = {
            "token": self._token,
            "host": host_name(),
            "pid": os.getpid(),
            "machine": machine_name(),
            "process_start": process_start(os.getpid()),
            "started": _now(),
            "interval_s": interval_s,
        }
        self._counter = 0
        # Whoever took over, in words; empty when that run is over, or `_removed` when it was none.
        self._successor: str | None = None
        self._released = self._wordless = self._removed = False
        # Held from reading the own file to having written it: two threads give signs of life.
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="claim", daemon=True)

    @classmethod
    def take(
        cls,
        output: Store,
        *,
        interval_s: float | None = None,
        describe: Describe = dict,
        overwrite: bool = False,
        listener: Listener = ignore,
    ) -> Claim:
        """Become the run of an output folder.

        Args:
            output: The folder; nothing but the run file is written.
            interval_s: Seconds between signs of life; None for the usual.
            describe: Gives the progress as JSON-ready data; called by another thread.
            overwrite: Whether this run was told to make the folder anew.
            listener: Told of a dead run that is taken over.

        Raises:
            ClaimedError: Another run lives; names its host and process.
            OutputError: The folder changes hands all the time.
            StorageError: The folder cannot be written.
        """
        for _ in range(_TRIES):
            found = read_runs(output)
            latest = found[max(found)] if found else None
            if latest is not None and _lives(output, latest, listener):
                raise ClaimedError(_refusal(output, latest))
            number = latest.number + 1 if latest is not None else 1
            claim = cls(
                output,
                number,
                interval_s=interval_s or INTERVAL_S,
                describe=describe,
                continues=overwrite and latest is not None and latest.overwrites,
            )
            if claim._begin(found):
                if latest is not None and not latest.ended:
                    listener(Note(text=f"took over from a run that is gone: {latest.who}"))
                return claim
        raise OutputError(
            Problem(
                what="changes hands all the time",
                where=f"output {output.location()}",
                remedy="see what else writes there",
            )
        )

    def guard(self) -> None:
        """Raise when this run is known to be replaced, or gives no signs of life any more; costs nothing.

        Raises:
            ClaimedError: Another run took over.
            OutputError: The thread that gives signs of life has ended, so that another run may take over unseen.
        """
        if self._successor is not None:
            raise self._ousted(self._successor)
        if not (self._thread.is_alive() or self._stop.is_set()):
            raise OutputError(
                Problem(
                    what="gets no signs of life of this run any more: the thread that gives them has ended",
                    where=f"output {self._output.location()}",
                    remedy="nothing was committed here; run the merge again: it resumes",
                )
            )

    def _ousted(self, successor: str) -> OutputError:
        """Return why this run may not go on; `successor` is empty when nobody is known to have followed it."""
        where = f"output {self._output.location()}"
        if successor:
            return ClaimedError(
                Problem(
                    what=f"was taken over by another run, because this one gave no sign of life: {successor}",
                    where=where,
                    remedy="nothing was committed here; the other run goes on from what was done",
                )
            )
        if self._removed:
            return _removed(self._output)
        return ClaimedError(
            Problem(
                what="was taken over by another run, which is over already, because this one gave no sign of life",
                where=where,
                remedy="nothing was committed by this run; geomerge status tells what the other one has done",
            )
        )

    def check(self) -> None:
        """Give a sign of life now and make sure that no other run took over.

        Raises:
            OutputError: As of `guard`.
            StorageError: The folder cannot be read or written.
        """
        self._beat()
        self.guard()

    def begun_anew(self) -> None:
        """Say that the folder was cleared by --overwrite: from here on a run that is killed can be gone on with.

        Raises:
            OutputError: As of `guard`.
            StorageError: The folder cannot be read or written.
        """
        self._overwrite = True
        self.check()

    def release(self, error: BaseException | None = None) -> None:
        """End the run: its file goes, or after an error says what it was."""
        if self._token not in OWN_TOKENS:
            return
        self._stop.set()
        # A write that hangs is not waited for beyond what makes others call this run dead.
        self._thread.join(timeout=self._interval_s * MISSED_INTERVALS)
        self._released = True
        idle = self._writing.acquire(timeout=self._interval_s)
        try:
            if error is not None and not self._replaced():
                self._write(state=_ending(error), error=_text(error))
            else:
                self._output.delete(run_path(self._number))
        except StorageError as failure:
            _log.warning("the run file could not be released: %s", failure)
            self._delete_quietly()
        finally:
            OWN_TOKENS.discard(self._token)
            if idle:
                self._writing.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release(error)
        # What fails when the folder goes away under a run may name any file of it.
        if isinstance(error, StorageError | VerificationError) and self._removed:
            raise _removed(self._output) from error

    def _delete_quietly(self) -> None:
        """Remove the own file, as a full disk still allows."""
        try:
            self._output.delete(run_path(self._number))
        except StorageError as failure:
            _log.warning("the run file stays: %s", failure)

    def _document(self, state: str, error: str | None) -> bytes:
        facts = {"state": state, **self._identity, "time": _now(), "counter": self._counter}
        facts["overwrite"] = self._overwrite
        if error is not None:
            facts["error"] = error
        return (json.dumps({**facts, "progress": self._progress()}, indent=1) + "\n").encode()

    def _progress(self) -> dict[str, Any]:
        """Return the progress; nothing, said once, when it cannot be told: a sign of life matters more."""
        try:
            progress = dict(self._describe())
            json.dumps(progress)
        except Exception as error:  # whatever describes a run must not make it look dead
            if not self._wordless:
                _log.warning("signs of life go without the progress: %s: %s", type(error).__name__, error)
            self._wordless = True
            return {}
        return progress

    def _begin(self, found: Mapping[int, Run]) -> bool:
        """Create the own file, remove those of `found`, all of dead runs, and start; False when another run came first.

        Raises:
            StorageError: The folder cannot be written.
        """
        # Before the file is there: another thread of this process may find it at once.
        OWN_TOKENS.add(self._token)
        created = False
        try:
            created = self._create()
            if created:
                others = {number: run for number, run in read_runs(self._output).items() if number != self._number}
                # A run that began and ended meanwhile may have made room for one of a lower number: then neither stays.
                if all(number in found and found[number].data == run.data for number, run in others.items()):
                    for number in others:
                        self._output.delete(run_path(number))
                    self._thread.start()
                    return True
                self._output.delete(run_path(self._number))
        except StorageError:
            if created:
                self._delete_quietly()
            OWN_TOKENS.discard(self._token)
            raise
        OWN_TOKENS.discard(self._token)
        return False

    def _create(self) -> bool:
        data = self._document("running", None)
        try:
            if self._output.create(run_path(self._number), data):
                return True
            # A store may have done it and lost its answer on the way.
            return bool(self._output.read(run_path(self._number)) == data)
        except MissingObject:
            return False
        except StorageError as error:
            problem = Problem(
                what=f"cannot be written: {error}",
                where=self._output.location(),
                remedy="choose a folder that you may write, read and delete in",
            )
            raise StorageError(problem) from error

    def _write(self, *, state: str, error: str | None = None) -> None:
        """Write the own file; the lock is held."""
        self._counter += 1
        self._output.write(run_path(self._number), self._document(state, error))

    def _beat(self) -> None:
        """Give a sign of life, unless another run took over."""
        with self._writing:
            if self._released or self._replaced():
                return
            self._write(state="running")
            # This process may have been stopped between looking and writing: then the file was there no more.
            if self._overtaken() or self._released:
                self._delete_quietly()

    def _replaced(self) -> bool:
        """Look whether another run took over, and remember which."""
        if self._successor is None and not self._overtaken():
            own = read_run(self._output, self._number)
            # One that is damaged is still ours: nobody else writes under this number while it is there.
            if own is None or (own.facts and own.facts.get("token") != self._token):
                # Taken over by a run that is over already, whatever it left; or all was removed.
                self._removed = own is None and _LASTING.isdisjoint(self._output.list())
                self._successor = ""
        return self._successor is not None

    def _overtaken(self) -> bool:
        """Look for a run of a higher number, and remember it."""
        numbers = run_numbers(self._output.list(RUNS))
        if not numbers or numbers[-1] <= self._number:
            return False
        successor = read_run(self._output, numbers[-1])
        self._successor = successor.who if successor is not None else ""
        return True

    def _beat_on(self) -> None:
        while not self._stop.wait(self._interval_s) and self._successor is None:
            try:
                self._beat()
            except StorageError as error:
                # The next one may succeed; if none does, `check` says so before the commit.
                _log.warning("no sign of life could be given: %s", error)


def _lives(output: Store, run: Run, listener: Listener) -> bool:
    """Return whether a run lives; that of another machine is watched until it moves or is found dead."""
    seconds = MISSED_INTERVALS * run.interval_s
    if run.lives_here() is None:
        listener(Note(text=f"the output has a run: {run.who}; waiting up to {seconds:.0f} s for a sign of life"))
    return seen_to_live(output, run, seconds=seconds)


def _refusal(output: Store, run: Run) -> Problem:
    return Problem(
        what=f"is being written by another run: {run.who}",
        where=f"output {output.location()}",
        remedy="wait for it, or end it and run this again; geomerge status tells how far it is",
    )


def _removed(output: Store) -> OutputError:
    """Return the error of a run whose output folder went away under it."""
    return OutputError(
        Problem(
            what="was removed during the merge",
            where=f"output {output.location()}",
            remedy="nothing was committed; see what removed it, and run the merge again: it begins anew",
        )
    )


def _ending(error: BaseException) -> str:
    return "failed" if isinstance(error, Exception) else "interrupted"


def _text(error: BaseException) -> str:
    """Return an error in words; of one that is not ours the kind, too."""
    return str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}".rstrip(": ")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
