"""The merges that are timed: their recipes, their command lines, and what of each no program can do without.

Owns recipes and arguments. Runs nothing but a plan, which tells how much memory a worker needs to keep nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.contest import Contestant, take
from tests.benchmarks.tuning import Amounts

# The largest family that mergekit's karcher is run on: it takes minutes above that.
_KARCHER_BYTES = 250_000_000
# What kept chunks take beyond their bytes.
_KEPT_OVERHEAD = 1.05
# Seconds without a write before a disk is tried.
_REST_S = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family in a folder: model0 is the base.

    Attributes:
        size: A name of `tests.benchmarks.family.SHAPES`.
        models: How many beside the base.
    """

    size: str
    models: int
    root: Path

    @property
    def name(self) -> str:
        """For tables and keys."""
        return f"{self.size} x {self.models}"

    @property
    def inputs(self) -> list[Path]:
        """The files, the base's last: methods may read it less often."""
        return [self.root / f"model{number}/model.safetensors" for number in (*range(1, self.models + 1), 0)]

    @property
    def bytes(self) -> int:
        """Of one model."""
        return self.inputs[0].stat().st_size

    def of(self, models: int) -> Family:
        """Return the family of the first so many models."""
        return replace(self, models=models)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One merge as it is timed.

    Attributes:
        floor: What it must move; None where nothing is compared with it.
        plan: The command that projects it, without the output folder.
        every: It runs in every so many rounds.
        fixed: The name of the program that does the same to next to nothing.
    """

    program: Contestant
    floor: Amounts | None = None
    plan: tuple[str, ...] | None = None
    every: int = 1
    fixed: str | None = None


def make(size: str, models: int, root: Path) -> Family:
    """Write a family in a process of its own, which takes more memory than this one may have had."""
    take((sys.executable, "-m", "tests.benchmarks.family", str(root), size, str(models)))
    return Family(size=size, models=models, root=root)


def linear(family: Family) -> Case:
    """Return the plain average, which needs no base."""
    recipe = _linear(family)
    amounts = Amounts(first=0, last=family.models * family.bytes, writes=family.bytes)
    return _ours("linear", amounts, ("--executor", "local"), recipe, fixed="linear, tiny")


def two_reads(family: Family, **keys: Any) -> Case:
    """Return the geometric median with just enough memory to keep nothing; `keys` go below `pipeline:`."""
    recipe = _median(family, keys)
    options = ("--executor", "local", "--memory", str(frugal_bytes(recipe)))
    # The coefficients of the models and the base sum to one, so the second read needs no base.
    amounts = replace(_one_read(family), last=family.models * family.bytes)
    return _ours("median, two reads", amounts, options, recipe, fixed="median, tiny")


def kept(family: Family) -> Case:
    """Return the geometric median with memory for all that it reads."""
    recipe = _median(family, {})
    options = ("--executor", "local", "--memory", str(kept_bytes(family, recipe)))
    return _ours("median, kept", _one_read(family), options, recipe, fixed="median, tiny")


def on_ray(family: Family, workers: int, **keys: Any) -> Case:
    """Return the same on a Ray that it starts."""
    recipe = _median(family, keys)
    options = ("--executor", "ray", "--workers", str(workers), "--memory", str(frugal_bytes(recipe)))
    return _ours(f"Ray, {workers} workers", None, options, recipe)


def peer_linear(family: Family, mergekit: str) -> Case:
    """Return mergekit's plain average of the same files."""
    amounts = Amounts(first=0, last=family.models * family.bytes, writes=family.bytes)
    program = Contestant(name="mergekit linear", command=(*_peer(mergekit), _linear(family)))
    return Case(program=program, floor=amounts, fixed="mergekit linear, tiny")


def peer_karcher(family: Family, mergekit: str) -> Case | None:
    """Return mergekit's Karcher mean, or None for a family that it takes minutes for."""
    if family.bytes > _KARCHER_BYTES:
        return None
    keys = {"merge_method": "karcher", "dtype": "float32", "out_dtype": "bfloat16"}
    models = [{"model": str(path.parent)} for path in family.inputs[:-1]]
    recipe = _recipe(family.root / f"karcher{family.models}.yaml", {**keys, "models": models})
    program = Contestant(name="mergekit karcher", command=(*_peer(mergekit), recipe))
    return Case(program=program, fixed="mergekit linear, tiny")


def renamed(case: Case, name: str) -> Case:
    """Return a case whose program is called otherwise."""
    return replace(case, program=replace(case.program, name=name))


def frugal_bytes(recipe: str) -> int:
    """Return enough memory to run at full width, with nothing left to keep chunks of the first read in."""
    terms: dict[str, int] = planned(("plan", recipe))["memory_per_worker"]["terms"]
    return sum(terms.values()) - terms.get("retained", 0)


def kept_bytes(family: Family, recipe: str | None = None) -> int:
    """Return enough memory to keep all that a median reads."""
    return frugal_bytes(recipe or _median(family, {})) + round((family.models + 1) * family.bytes * _KEPT_OVERHEAD)


def planned(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Return what `geomerge plan` says; its output folder is never made."""
    command = (sys.executable, "-m", "pipeline", *arguments, arguments[-1] + ".planned", "--json")
    # The disk is tried as most merges meet it: rested. Virtual disks take a gigabyte or two at several times the rate
    # that they keep up, and have just been given several outputs.
    os.sync()
    time.sleep(_REST_S)
    plan: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return plan


def _ours(name: str, floor: Amounts | None, options: tuple[str, ...], recipe: str, fixed: str | None = None) -> Case:
    program = Contestant(name=name, command=(sys.executable, "-m", "pipeline", "merge", *options, recipe))
    return Case(program=program, floor=floor, plan=("plan", *options, recipe), fixed=fixed)


def _one_read(family: Family) -> Amounts:
    return Amounts(first=(family.models + 1) * family.bytes, last=0, writes=family.bytes)


def _peer(mergekit: str) -> tuple[str, ...]:
    # One thread: two of them take more processor time and, on a shared machine, more wall time as well.
    options = ("--no-copy-tokenizer", "--lazy-unpickle", "--low-cpu-memory", "--quiet", "-j", "1")
    return (mergekit, "-m", "mergekit.scripts.run_yaml", *options)


def _linear(family: Family) -> str:
    entries = [{"model": str(path.parent), "parameters": {"weight": 1.0}} for path in family.inputs[:-1]]
    document = {"merge_method": "linear", "dtype": "bfloat16", "models": entries}
    return _recipe(family.root / f"linear{family.models}.yaml", document)


def _median(family: Family, keys: dict[str, Any]) -> str:
    *models, base = [str(path.parent) for path in family.inputs]
    entries = [{"model": model} for model in models]
    document = {"merge_method": "geometric_median", "base_model": base, "models": entries}
    name = "-".join(("median", str(family.models), *map(str, keys.values())))
    return _recipe(family.root / f"{name}.yaml", {**document, **({"pipeline": keys} if keys else {})})


def _recipe(path: Path, document: dict[str, Any]) -> str:
    path.write_text(json.dumps(document))  # JSON is YAML
    return str(path)
