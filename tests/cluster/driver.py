"""A driver of merges in a process of its own, which a test leads from event to event, and may kill.

Run as a program it takes one order a line from stdin and tells everything as lines of JSON on stdout. All its merges
run on the same workers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tests.support.processes import ROOT, kill_family, start

# A merge of a small family takes seconds; a cluster that has to find out about a dead node, and a busy machine, more.
_PATIENCE_S = 240.0


class MergeError(Exception):
    """The merge ended with an error, whose text this has."""


class DriverDiedError(Exception):
    """The driver's process ended by itself."""


class DriverProcess:
    """The test's end of a driver; a new one is started by the first merge after a kill.

    Args:
        environment: Of the cluster's users.

    Attributes:
        notes: What the running merge has said so far.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.notes: list[str] = []
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def start(self) -> None:
        """Start one, if there is none; it takes seconds to be ready."""
        if self._process is not None:
            return
        command = [sys.executable, "-m", "tests.cluster.driver"]
        self._process = start(command, cwd=ROOT, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()

    def processes(self) -> list[int]:
        """Return the driver's process, if there is one."""
        return [] if self._process is None else [self._process.pid]

    def merge(
        self, recipe: str, output: str, *, halts: Sequence[Mapping[str, object]] = (), **resources: object
    ) -> None:
        """Begin a merge.

        Args:
            recipe: Its URL.
            output: Its URL.
            halts: Events at which the driver waits to be told to go on, each once: "event" and any of its fields.
            resources: Fields of `Resources`.
        """
        self.start()
        self.notes.clear()
        self._order({"recipe": recipe, "output": output, "halts": list(halts), "resources": resources})

    def until_halted(self) -> None:
        """Return when the driver waits.

        Raises:
            MergeError: It ended instead.
        """
        for told in self._told():
            if "halted" in told:
                return
            if "report" in told:
                raise MergeError("it ended before it was to be halted")

    def go(self) -> None:
        """Let a halted driver go on."""
        self._order({})

    def finish(self) -> dict[str, Any]:
        """Return the report of the merge when it has ended.

        Raises:
            MergeError: By an error.
        """
        return next(dict(told["report"]) for told in self._told() if "report" in told)

    def kill(self) -> None:
        """Kill it, as a lost machine would."""
        if self._process is None:
            return
        kill_family(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process = None

    def _told(self) -> Iterator[dict[str, Any]]:
        while True:
            try:
                line = self._lines.get(timeout=_PATIENCE_S)
            except queue.Empty:
                raise TimeoutError(f"the driver has said nothing for {_PATIENCE_S} s; before: {self.notes}") from None
            if not line:
                raise DriverDiedError(f"the driver died; before: {self.notes}")
            told = json.loads(line)
            if "error" in told:
                raise MergeError(f"{told['error']}; before: {self.notes}")
            if "note" in told:
                self.notes.append(told["note"])
            yield told

    def _order(self, order: Mapping[str, object]) -> None:
        if self._process is None or self._process.stdin is None:
            raise RuntimeError("there is no driver")
        # One that was killed meanwhile is noticed where its words are missing.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()


def _read(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    if process.stdout is not None:
        # Closed by `kill`.
        with suppress(ValueError):
            for line in process.stdout:
                lines.put(line)
    lines.put(b"")


def main() -> None:
    """Run merges as stdin says."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    # Whatever else is printed goes to stderr.
    os.dup2(2, 1)

    import ray

    from pipeline.engine.executors import create_executor
    from pipeline.errors import PipelineError
    from pipeline.events import Event, Note, PassProgress
    from pipeline.merging import Resources, merge

    def tell(**told: object) -> None:
        out.write(json.dumps(told) + "\n")

    halts: list[dict[str, object]] = []

    def listener(event: Event) -> None:
        if isinstance(event, Note):
            tell(note=event.text)
        if isinstance(event, PassProgress):
            return
        fields = {"event": type(event).__name__, **dataclasses.asdict(event)}
        for halt in halts:
            if halt.items() <= fields.items():
                halts.remove(halt)
                tell(halted=fields)
                sys.stdin.readline()
                return

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="error")
    executor = create_executor("ray", address=None, listener=listener)
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        halts[:] = order["halts"]
        resources = Resources(executor="ray", **order["resources"])
        try:
            report = merge(order["recipe"], order["output"], resources=resources, listener=listener, executor=executor)
        except PipelineError as error:
            executor.close()
            tell(error=f"{type(error).__name__}: {error}")
        else:
            tell(report=report)
    executor.close()


if __name__ == "__main__":
    main()
