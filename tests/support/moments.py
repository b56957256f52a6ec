"""Statistics of small families with known values, and the dense answers that merges with them must give."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.checkpoints.statistics_facts import Kind, StatisticsFacts
from pipeline.checkpoints.statistics_writer import StatisticsWriter
from pipeline.storage import open_store
from tests.support.families import Family, load_folder

# An embedding, two layers of matrices that are not square, vectors: every treatment, at few bytes.
SHAPES = {
    "model.embed_tokens.weight": (10, 6),
    "model.layers.0.mlp.up_proj.weight": (9, 6),
    "model.layers.0.mlp.down_proj.weight": (6, 9),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.layers.1.mlp.up_proj.weight": (9, 6),
    "model.layers.1.mlp.down_proj.weight": (6, 9),
    "model.norm.weight": (6,),
    "lm_head.weight": (10, 6),
}
EMBEDDING = "model.embed_tokens.weight"
MATRICES = tuple(name for name, shape in SHAPES.items() if len(shape) == 2 and name != EMBEDDING)

Arrays = dict[tuple[Kind, str], np.ndarray]


def facts(**words: object) -> StatisticsFacts:
    """Facts of statistics that nobody will look at closely."""
    return StatisticsFacts(
        **{  # type: ignore[arg-type]
            "model": "m",
            "data": "d",
            "examples": 10,
            "tokens": 100,
            "reduction": "mean",
            "labels": "empirical",
            "normalisation": "examples",
            **words,
        }
    )


def save_statistics(folder: Path, arrays: Arrays, *, outside: Mapping[str, str] | None = None, **words: object) -> Path:
    """Write statistics with the product's own writer."""
    writer = StatisticsWriter(open_store(str(folder)), facts(**words))
    for (kind, name), array in arrays.items():
        writer.add(kind, name, np.ascontiguousarray(array))
    for name, reason in (outside or {}).items():
        writer.outside(name, reason)
    writer.finish()
    return folder


def gram(rng: np.random.Generator, size: int, *, samples: int | None = None) -> np.ndarray:
    """A float32 second moment of random inputs, of full rank unless there are fewer samples than inputs."""
    points = rng.normal(size=(samples or 4 * size, size)) * rng.uniform(0.5, 2.0, size=size)
    result: np.ndarray = (points.T @ points / len(points)).astype(np.float32)
    return result


def random_statistics(kinds: Sequence[Kind], seed: int, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Statistics of some kinds for these parameters."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for name, shape in shapes.items():
        sizes = {"input_gram": shape[-1], "output_gram": shape[0], "block": int(np.prod(shape))}
        for kind in kinds:
            if kind == "diagonal":
                arrays[kind, name] = rng.exponential(size=shape).astype(np.float32)
            else:
                arrays[kind, name] = gram(rng, sizes[kind])
    return arrays


@dataclass
class Moments:
    """A family with statistics for each of its models."""

    family: Family
    folders: list[Path] = field(default_factory=list)
    arrays: list[Arrays] = field(default_factory=list)

    def recipe(
        self, method: str, *, name: str = "moments.yaml", models: Sequence[Mapping[str, object]] = (), **keys: object
    ) -> Path:
        """Write a recipe of all models with their statistics; `models` adds to their parameters."""
        entries: list[dict[str, object]] = []
        for row, path in enumerate(self.family.models):
            entry: dict[str, object] = {"model": str(path)}
            if self.folders:
                entry["pipeline"] = {"statistics": str(self.folders[row])}
            if models:
                entry["parameters"] = dict(models[row])
            entries.append(entry)
        document = {"merge_method": method, "base_model": str(self.family.base), "models": entries, **keys}
        path = self.family.root / name
        path.write_text(json.dumps(document, indent=1))
        return path

    def values(self, name: str) -> list[np.ndarray]:
        """The models' values of a tensor, in float64, from their files."""
        return [load_folder(folder)[name].double().numpy() for folder in self.family.models]

    def base(self, name: str) -> np.ndarray:
        """The base's values of a tensor, in float64."""
        result: np.ndarray = load_folder(self.family.base)[name].double().numpy()
        return result


def with_statistics(
    family: Family,
    kinds: Sequence[Kind],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    outside: Mapping[str, str] | None = None,
) -> Moments:
    """Give each model of a family random statistics."""
    moments = Moments(family)
    for row, path in enumerate(family.models):
        arrays = random_statistics(kinds, 50 + row, shapes)
        folder = save_statistics(
            family.root / f"statistics{row}-{'-'.join(kinds)}",
            arrays,
            outside=outside,
            examples=10 * (row + 1),
            model=str(path),
        )
        moments.folders.append(folder)
        moments.arrays.append(arrays)
    return moments
