"""A small family of models in a bucket, recipes for it, and the bits that every merge of it must end in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.engine.run_folder import MEASURED, PLAN, REDUCTIONS, SOLUTIONS, WRITTEN, finished
from pipeline.errors import BudgetError
from pipeline.merging import Resources, load_recipe, merge, plan_merge
from pipeline.planning.memory import project_memory
from pipeline.storage import open_store
from tests.support.families import Family, make_family
from tests.support.s3 import prefix, upload

# Several output files for each of three workers.
FILE_SIZE = "10KB"
# What says how a merge ran, and not what came out of it.
_NOT_BITS = ("README.md", "geomerge_report.json")


@dataclass(slots=True, kw_only=True)
class Bucket:
    """Where a family lies.

    Attributes:
        family: The local one, which the remote one is a copy of.
        url: Of the bucket.
        places: The remote folders by the local ones.
    """

    family: Family
    url: str
    places: Mapping[str, str]
    _undisturbed: dict[str, tuple[dict[str, bytes], int]] = field(default_factory=dict)

    def order(self, *, distances: str = "gram", endpoint: str | None = None) -> tuple[str, str]:
        """Put a recipe into the bucket; return its URL and that of a folder for its output.

        Args:
            distances: Of the recipe.
            endpoint: Where models and output are found, if not where the environment says.
        """
        storage = {} if endpoint is None else {"storage": {"s3": {"endpoint_url": endpoint}}}
        recipe = self.family.recipe(pipeline={"file_size": FILE_SIZE, "distances": distances, **storage})
        text = recipe.read_text()
        for local, there in sorted(self.places.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(local, there)
        place = prefix(self.url)
        open_store(place).write("recipe.yaml", text.encode())
        return f"{place}/recipe.yaml", f"{place}/out"

    def least_memory(self, recipe: str, output: str) -> int:
        """Return the bytes with which a worker keeps nothing of what it has read: every pass reads it all again."""
        plan = plan_merge(load_recipe(recipe)[0], open_store(output), Resources(), probe=False, on_ray=True).plan
        low, high = 0, Resources().memory_bytes
        while high - low > 1:
            middle = (low + high) // 2
            try:
                project_memory(plan, budget_bytes=middle, threads=1, remote_output=True)
                high = middle
            except BudgetError:
                low = middle
        return high

    def undisturbed(self, distances: str) -> dict[str, bytes]:
        """Return what the local executor makes of the local files: everything that loaders read."""
        return self._local(distances)[0]

    def iterations(self, distances: str) -> int:
        """Return how many iterations over the parameters that takes."""
        return self._local(distances)[1]

    def _local(self, distances: str) -> tuple[dict[str, bytes], int]:
        if distances not in self._undisturbed:
            recipe = self.family.recipe(pipeline={"file_size": FILE_SIZE, "distances": distances})
            out = str(self.family.root / f"undisturbed-{distances}")
            report = merge(str(recipe), out)
            self._undisturbed[distances] = (bits(out), report["iterations_over_parameters"])
        return self._undisturbed[distances]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What a killed merge left in its folder, and what is to do.

    Attributes:
        resumed: Files that the next run finds measured or written.
        left_bytes: Input bytes that measuring and writing have yet to take in.
        reductions: Iterations over the parameters whose sums are kept.
        solved: Whether the solutions are there.
        stamps: Of the output files that are there, what changes when one is written again.
    """

    resumed: int
    left_bytes: int
    reductions: int
    solved: bool
    stamps: Mapping[str, object]


def remains(output: str) -> Remains:
    """Return what a killed merge left."""
    store = open_store(output)
    plan = json.loads(store.read(PLAN))
    measured, written = finished(store, MEASURED, ".parquet"), finished(store, WRITTEN, ".json")
    solved = store.exists(SOLUTIONS)
    models = len(plan["inputs"])
    left = 0
    for file in plan["files"]:
        size = sum(2 * plan["tensors"][tensor]["elements"] for tensor in file["tensors"])
        if not solved and file["name"] not in measured:
            left += models * size
        if file["name"] not in written:
            # Of the base nothing is needed any more.
            left += (models - 1) * size
    return Remains(
        resumed=(0 if solved else len(measured)) + len(written),
        left_bytes=left,
        reductions=len([path for path in store.list(REDUCTIONS) if not path.endswith("/")]),
        solved=solved,
        stamps=stamps(output),
    )


def make_bucket(root: Path, url: str) -> Bucket:
    """Make a family and upload it.

    Args:
        root: An empty folder for the local copy.
        url: Of a bucket.
    """
    family = make_family(root, 4, dtype=torch.bfloat16, loud=1)
    place = prefix(url)
    folders = (family.base, *family.models)
    return Bucket(
        family=family,
        url=url,
        places={str(folder): upload(folder, f"{place}/{folder.name}") for folder in folders},
    )


def place_of(url: str) -> str:
    """Return how a request's first line names what lies at a URL."""
    return "/" + url.removeprefix("s3://")


def bits(url: str) -> dict[str, bytes]:
    """Return the files of an output that loaders read."""
    store = open_store(url)
    return {path: store.read(path) for path in store.list() if "/" not in path and path not in _NOT_BITS}


def stamps(url: str) -> dict[str, object]:
    """Return what changes when a file of an output is written again, by file."""
    import s3fs

    found = s3fs.S3FileSystem(skip_instance_cache=True).find(url, detail=True)
    return {
        path.rpartition("/")[2]: (entry["ETag"], entry["LastModified"])
        for path, entry in found.items()
        if path.endswith(".safetensors")
    }
