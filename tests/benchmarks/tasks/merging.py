"""Statistics and merges, by the command line as a user would run it, and what a merge is worth.

Owns recipes, commands and the choice of a setting on validation rows. Knows of models only how they are scored.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

_COMMAND = (sys.executable, "-m", "pipeline")
_REPORT = "geomerge_report.json"
# Of the mean validation accuracy: a later candidate must be better than rounding.
_BETTER = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One setting of a method: what is said of it, and its recipe without models."""

    setting: str
    words: Mapping[str, Any]
    statistics: str | None = None
    # None: the method needs no weights of its own.
    weights: tuple[float, ...] | None = None
    base_weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A candidate with its accuracies by task, in percent, and what its merge took."""

    candidate: Candidate
    validation: Mapping[str, float]
    test: Mapping[str, float]
    seconds: float
    report: Mapping[str, Any]

    @property
    def choice(self) -> float:
        """What a setting is chosen by."""
        return sum(self.validation.values()) / len(self.validation)


class Merger:
    """Runs merges of one family and remembers their scores.

    Attributes:
        folder: Of the family.
        experts: Trunks by task.
        score: From a trunk and the name of a part to accuracies by task.
    """

    def __init__(
        self, folder: Path, experts: Mapping[str, Path], score: Callable[[Path, str], dict[str, float]]
    ) -> None:
        self.folder, self.experts, self.score = folder, experts, score
        self._path = folder / "scores.json"
        self._scores: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def recipe(self, candidate: Candidate) -> dict[str, Any]:
        """Return the whole recipe of a candidate."""
        models: list[dict[str, Any]] = []
        if candidate.base_weight is not None:
            models.append({"model": str(self.folder / "base"), "parameters": {"weight": candidate.base_weight}})
        for number, (task, trunk) in enumerate(self.experts.items()):
            entry: dict[str, Any] = {"model": str(trunk)}
            if candidate.weights is not None:
                entry["parameters"] = {"weight": candidate.weights[number]}
            if candidate.statistics is not None:
                entry["pipeline"] = {"statistics": str(self.folder / "statistics" / f"{task}-{candidate.statistics}")}
            models.append(entry)
        return {**candidate.words, "base_model": str(self.folder / "base"), "models": models}

    def validated(self, candidate: Candidate) -> Scored:
        """Merge and score on validation rows, unless that was done before."""
        return self._scored(candidate, "validation")

    def best(self, candidates: list[Candidate]) -> Scored:
        """Return the candidate that is best on validation rows, scored on the test rows; of equals the first."""
        chosen = self.validated(candidates[0])
        for candidate in candidates[1:]:
            scored = self.validated(candidate)
            if scored.choice > chosen.choice + _BETTER:
                chosen = scored
        return self._scored(chosen.candidate, "test")

    def _scored(self, candidate: Candidate, part: str) -> Scored:
        recipe = self.recipe(candidate)
        key = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
        known = self._scores.setdefault(key, {"recipe": recipe})
        if part not in known:
            output = self.folder / "merged" / key
            known["seconds"] = self._merge(recipe, output)
            known["report"] = json.loads((output / _REPORT).read_text())
            known[part] = self.score(output, part)
            shutil.rmtree(output)
            self._path.write_text(json.dumps(self._scores, indent=1) + "\n")
        return Scored(
            candidate=candidate,
            validation=known.get("validation", {}),
            test=known.get("test", {}),
            seconds=known["seconds"],
            report=known["report"],
        )

    def _merge(self, recipe: Mapping[str, Any], output: Path) -> float:
        path = self.folder / "recipes" / f"{output.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
        started = time.perf_counter()
        run_command("merge", str(path), str(output), "--overwrite", "--json")
        return time.perf_counter() - started


def run_command(*arguments: str) -> None:
    """Run the command line.

    Raises:
        SystemExit: It failed; with what it said.
    """
    ran = subprocess.run([*_COMMAND, *arguments], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"geomerge {' '.join(arguments)} ended with {ran.returncode}:\n{ran.stderr or ran.stdout}")


def calibrate(model: Path, data: Path, output: Path, kind: str, options: Mapping[str, str]) -> float:
    """Collect one kind of statistics, unless that was done before; return the seconds it took."""
    note = output.with_suffix(".json")
    if note.is_file():
        return float(json.loads(note.read_text())["seconds"])
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    run_command("calibrate", str(model), str(data), str(output), "--statistics", kind, *words)
    seconds = time.perf_counter() - started
    # Written last: statistics without it are collected again.
    note.write_text(json.dumps({"seconds": seconds, "options": dict(options)}) + "\n")
    return seconds
