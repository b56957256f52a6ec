"""`python -m tests.benchmarks.simulate`: what the driver and the reduction of a 70B merge cost with up to 1024 workers.

The real driver, Ray executor, schedule, exact sums and solver run over workers that hold no parameters (see
tests/support/fake_ray.py); what Ray and gloo themselves cost is measured with a real Ray and with real ranks on this
machine, and modelled for more. Prints tables, writes JSON and, with --picture, an SVG.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.engine.driver import Driver
from pipeline.engine.executors.ray import RayExecutor
from pipeline.engine.worker import Job
from pipeline.events import Event, Listener, PassEnded, PassStarted, ignore
from pipeline.numerics.exact_sum import LIMBS
from pipeline.planning.assignment import assign
from pipeline.planning.memory import project_memory
from pipeline.planning.plan import Plan
from pipeline.planning.traffic import measured_bytes
from pipeline.storage import open_store
from tests.benchmarks.contest import take
from tests.benchmarks.rehearsal import machine
from tests.benchmarks.scaling_picture import picture
from tests.planning.plans import plan_of
from tests.support.fake_ray import FakeRay
from tests.support.llama import llama_family

# By name, the size of output files: 30, 322 and 642 of them (a tensor is never split).
_FILE_SIZES = {30: "5GB", 322: "500MB", 642: "1MB"}
# Combinations that the solver asks for at a time, at most.
_PROBES = 4
# What the wire is taken for: a message between two machines of one rack, and a network card of 25 Gbit/s.
_MESSAGE_S, _WIRE_BYTES_PER_S = 50e-6, 3.1e9


def main() -> None:
    """Parse the arguments, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.simulate", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few workers, few files, few ranks")
    parser.add_argument("--workers", default="1,4,16,64,256,1024")
    parser.add_argument("--files", default="30,322,642", help="of 30, 322, 642")
    parser.add_argument("--points", default="9,100", help="base and models; default 9,100")
    parser.add_argument("--worlds", default="2,4,8", help="local ranks of real reductions; default 2,4,8")
    parser.add_argument("--rate", type=float, default=0.8, help="GB of input a worker measures a second; default 0.8")
    parser.add_argument("--on-node", type=int, default=16, help="workers that share a network card; default 16")
    parser.add_argument("--out", type=Path, default=Path("build/simulate.json"))
    parser.add_argument("--picture", type=Path, help="where to put an SVG")
    options = parser.parse_args()
    if options.quick:
        options.workers, options.files, options.points, options.worlds = "1,64,1024", "322", "9", "2,4"
    workers, files, points, worlds = (
        [int(item) for item in text.split(",")]
        for text in (options.workers, options.files, options.points, options.worlds)
    )
    console = Console(width=230)
    result: dict[str, Any] = {"machine": machine(), "options": {k: str(v) for k, v in vars(options).items()}}
    console.print(json.dumps(result["machine"]))
    with tempfile.TemporaryDirectory(prefix="geomerge-simulate-") as folder:
        root = Path(folder)
        result["ray"] = _part(root, "ray_costs")
        console.print(f"Ray: {json.dumps(result['ray'])}")
        result["cases"] = []
        for number in files:
            plan = _plan(root, number)
            for size in points:
                wide = widened(plan, size)
                found = [_case(root, wide, count, options.rate * 1e9, result["ray"]) for count in workers]
                result["cases"] += found
                console.print(_driver_table(found))
        sizes = sorted({_limbs_bytes(size, groups) for size in points for groups in (1, 723) if size * groups < 10_000})
        result["collective"] = _part(root, "collective", ",".join(map(str, worlds)), ",".join(map(str, sizes)))
        console.print(_collective_table(result["collective"], sizes))
        step_s = step_seconds(result["collective"], sizes[0])
        result["step_s"] = step_s
        result["model"] = [_model(count, sizes, step_s, options.on_node) for count in workers]
        console.print(_model_table(result["model"], sizes, step_s, options.on_node))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.picture:
        options.picture.write_text(picture(result))
    console.print(f"load at the end {os.getloadavg()[0]:.1f}; figures in {options.out}")


def widened(plan: Plan, points: int) -> Plan:
    """Return the plan for more models of the same shapes; its inputs are never opened."""
    more = points - len(plan.inputs)
    if more <= 0:
        return plan
    return dataclasses.replace(
        plan,
        inputs=plan.inputs + plan.inputs[-1:] * more,
        models=tuple(range(1, points)),
        weights=(1.0,) * (points - 1),
        tensors=tuple(dataclasses.replace(t, sources=t.sources + t.sources[-1:] * more) for t in plan.tensors),
    )


def step_seconds(collective: Sequence[dict[str, Any]], size: int) -> float:
    """Return what one of the 2(W−1) steps of a small sum costs a rank in CPU seconds, by the largest world."""
    largest = max(collective, key=lambda entry: int(entry["world"]))
    cpu_s: float = largest["cpu_s"][str(size)]
    return cpu_s / (2 * (largest["world"] - 1))


@dataclasses.dataclass
class _Spent:
    """What a phase took of the driver: CPU seconds of our code, and Ray's counts."""

    own_s: float = 0.0
    calls: int = 0
    waits: int = 0
    waited: int = 0
    times: int = 0

    def figures(self, costs: dict[str, Any]) -> dict[str, float]:
        """Return seconds of our code, of Ray by its counts, and of both, each time that the phase came."""
        times = max(1, self.times)
        ray_us = self.calls * costs["call_us"] + self.waits * costs["wait_base_us"]
        own_s, ray_s = self.own_s / times, (ray_us + self.waited * costs["reference_us"]) * 1e-6 / times
        return {"own_s": own_s, "ray_s": ray_s, "both_s": own_s + ray_s, "times": self.times}


class _Clock:
    """Splits the driver's CPU seconds by phase: start, measure, solve, iteration, reduce, write, rest."""

    def __init__(self, ray: FakeRay) -> None:
        self._ray = ray
        ray.watch = self._watch
        self.phase = "rest"
        self.spent = {name: _Spent() for name in ("start", "measure", "solve", "iteration", "reduce", "write", "rest")}
        self._last = self._now()

    def __call__(self, event: Event) -> None:
        if isinstance(event, PassStarted):
            self.switch(event.name.partition(" ")[0], new=True)
        elif isinstance(event, PassEnded):
            self.switch("solve" if event.name != "write" else "rest", new=event.name == "measure")

    def switch(self, phase: str, *, new: bool = False) -> str:
        """Begin a phase, or go on with it; return the one before."""
        now, spent, before = self._now(), self.spent[self.phase], self.phase
        spent.own_s += now[0] - self._last[0]
        spent.calls += now[1] - self._last[1]
        spent.waits += now[2] - self._last[2]
        spent.waited += now[3] - self._last[3]
        self._last, self.phase = now, phase
        self.spent[phase].times += new
        return before

    def _watch(self, name: str) -> None:
        # The first question to the ranks: all files of the iteration are probed, and nothing else goes on.
        if self.phase == "iteration" and name in ("join", "reduce"):
            self.switch("reduce", new=True)

    def _now(self) -> tuple[float, int, int, int]:
        ray = self._ray
        return time.thread_time() - ray.workers_s, ray.calls.total(), ray.waits, ray.waited


class _TimedExecutor(RayExecutor):
    """The Ray executor, its start timed apart from the pass that it happens in."""

    clock: _Clock

    def start(self, job: Job, shards: Sequence[Sequence[int]]) -> None:
        before = self.clock.switch("start", new=True)
        super().start(job, shards)
        self.clock.switch(before)


def _case(root: Path, plan: Plan, workers: int, rate: float, costs: dict[str, Any]) -> dict[str, Any]:
    """Run both ways of solving with so many workers; return CPU seconds of the driver by phase, and bytes."""
    sizes = [sum(measured_bytes(plan, tensor) for tensor in file.tensors) for file in plan.files]
    loads = [sum(sizes[file] for file in shard) for shard in assign(plan, workers)]
    gram, ray = _run(root, plan, workers, "gram")
    stream, streamed = _run(root, plan, workers, "stream")
    passes = max(1, stream["iteration"].times)
    iteration_bytes = streamed.sent_bytes["probe"] + streamed.sent_bytes["reduce"] + streamed.got_bytes["reduce"]
    return {
        "workers": workers,
        "files": len(plan.files),
        "points": len(plan.points),
        # The largest share of a worker decides when a pass is over.
        "pass_s": max(loads) / rate,
        **{name: gram[name].figures(costs) for name in ("start", "measure", "solve", "write", "rest")},
        **{name: stream[name].figures(costs) for name in ("iteration", "reduce")},
        "stream_solve_s": stream["solve"].own_s / passes,
        "rank_s": streamed.ranks_s / passes / workers,
        "peak_bytes": _peak(root, plan, workers),
        "calls": dict(ray.calls),
        "stream_calls": dict(streamed.calls),
        "moved_bytes": {
            "job": ray.sent_bytes["put"],
            "measured": ray.got_bytes["run_verb"],
            "to write": ray.sent_bytes["run_verb"],
            "iteration": iteration_bytes / passes,
        },
    }


def _run(root: Path, plan: Plan, workers: int, distances: str) -> tuple[dict[str, _Spent], FakeRay]:
    """Run a whole merge over fake workers; return what the driver spent by phase."""
    plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, distances=distances))
    ray = FakeRay(seed=workers)
    ray.prepare(plan)
    clock = _Clock(ray)
    with ray.installed(), tempfile.TemporaryDirectory(dir=root) as output:
        executor = _TimedExecutor()
        executor.clock = clock
        _driver(plan, output, executor, workers, clock).run()
        clock.switch("rest")
        executor.close()
    return clock.spent, ray


def _driver(plan: Plan, output: str, executor: RayExecutor, workers: int, listener: Listener) -> Driver:
    memory = project_memory(plan, budget_bytes=64_000_000_000, threads=1)
    job = Job(plan=plan, output_url=output, memory=memory, device="cpu")
    return Driver(plan=plan, output=open_store(output), executor=executor, job=job, workers=workers, listener=listener)


def _peak(root: Path, plan: Plan, workers: int) -> int:
    """Return the most that a run allocates beside the plan and the vectors of fake workers."""
    ray = FakeRay(seed=workers)
    ray.prepare(plan)
    with ray.installed(), tempfile.TemporaryDirectory(dir=root) as output:
        tracemalloc.start()
        try:
            executor = RayExecutor()
            _driver(plan, output, executor, workers, ignore).run()
            executor.close()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


def _plan(root: Path, files: int) -> Plan:
    folder = root / f"family-{files}"
    folder.mkdir()
    plan = plan_of(llama_family(folder, "70B", 8, pipeline={"file_size": _FILE_SIZES[files]}))
    if len(plan.files) != files:
        raise RuntimeError(f"the plan has {len(plan.files)} files, not {files}")
    return plan


def _part(root: Path, name: str, *arguments: str) -> Any:
    path = root / f"{name}.json"
    take((sys.executable, "-m", f"tests.benchmarks.{name}", str(path), *arguments))
    return json.loads(path.read_text())


def _limbs_bytes(points: int, groups: int) -> int:
    """Return the bytes of one rank's sums in an iteration: what every rank adds to the ring."""
    models = points - 1
    return groups * (_PROBES * models + _PROBES * _PROBES) * LIMBS * 8


def _model(workers: int, sizes: Sequence[int], step_s: float, on_node: int) -> dict[str, Any]:
    """Return the seconds of one sum over a ring of so many ranks, by size.

    2(W − 1) steps, each a message and a rank's own work; 2(W − 1)/W of the bytes through a card that a node's workers
    share, since neighbours in the ring lie on different nodes.
    """
    steps = 2 * (workers - 1)
    wire = _WIRE_BYTES_PER_S / min(on_node, workers)
    seconds = {str(size): steps * (_MESSAGE_S + step_s) + steps / workers * size / wire for size in sizes}
    return {"workers": workers, "seconds": seconds}


def _driver_table(cases: Sequence[dict[str, Any]]) -> Table:
    first = cases[0]
    table = Table(title=f"driver, {first['files']} files, {first['points']} points: CPU seconds, own + Ray's")
    # A pass goes on while the driver takes its results; start and sum do not overlap with one.
    for heading in (
        "workers", "pass s", "start", "measure", "% of pass", "ms a file", "iteration", "% of pass", "its sum",
        "% of pass", "solve", "write", "peak MB", "MB measured", "MB an iteration",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for case in cases:
        cells = {name: f"{case[name]['own_s']:.2f} + {case[name]['ray_s']:.2f}" for name in _PHASES}
        shares = {name: f"{100 * case[name]['both_s'] / case['pass_s']:.2f}" for name in _PHASES}
        table.add_row(
            str(case["workers"]),
            f"{case['pass_s']:.0f}",
            cells["start"],
            cells["measure"],
            shares["measure"],
            f"{1000 * case['measure']['both_s'] / case['files']:.2f}",
            cells["iteration"],
            shares["iteration"],
            cells["reduce"],
            shares["reduce"],
            f"{case['solve']['own_s']:.3f}",
            cells["write"],
            f"{case['peak_bytes'] / 1e6:.1f}",
            f"{case['moved_bytes']['measured'] / 1e6:.2f}",
            f"{case['moved_bytes']['iteration'] / 1e6:.2f}",
        )
    return table


_PHASES = ("start", "measure", "iteration", "reduce", "write")


def _collective_table(entries: Sequence[dict[str, Any]], sizes: Sequence[int]) -> Table:
    table = Table(title="gloo, sums of int64 among local processes, measured")
    for heading in ("ranks", "join s", "store CPU ms", *(f"{size / 1e6:.2f} MB: ms (CPU ms a rank)" for size in sizes)):
        table.add_column(heading, justify="right")
    for entry in entries:
        cells = [f"{1e3 * entry['seconds'][str(s)]:.1f} ({1e3 * entry['cpu_s'][str(s)]:.1f})" for s in sizes]
        table.add_row(str(entry["world"]), f"{entry['join_s']:.2f}", f"{1e3 * entry['store_cpu_s']:.1f}", *cells)
    return table


def _model_table(entries: Sequence[dict[str, Any]], sizes: Sequence[int], step_s: float, on_node: int) -> Table:
    step = f"a step {1e6 * _MESSAGE_S:.0f} us on the wire and {1e6 * step_s:.0f} us of CPU (measured)"
    wire = f"{_WIRE_BYTES_PER_S / 1e9:.1f} GB/s a node of {on_node} workers"
    table = Table(title=f"one sum over a ring, modelled: {step}, {wire}")
    for heading in ("workers", *(f"{size / 1e6:.2f} MB: s" for size in sizes)):
        table.add_column(heading, justify="right")
    for entry in entries:
        table.add_row(str(entry["workers"]), *(f"{entry['seconds'][str(size)]:.4f}" for size in sizes))
    return table


if __name__ == "__main__":
    main()
