"""The sizing table of clusters/README.md, computed by planning families that take no disk.

`python -m tests.clusters.sizing` prints it. Owns which families and which clusters it tells of.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.merging import Resources, load_recipe, plan_merge
from pipeline.planning.cost import project_cost
from pipeline.planning.memory import Memory, project_memory
from pipeline.planning.plan import Plan
from pipeline.storage import open_store
from pipeline.units import format_bytes
from tests.support.adapters import ADAPTER_CONFIG, ADAPTER_FILE, Layout
from tests.support.llama import LLAMAS, Size, llama_family
from tests.support.sparse import save_sparse

# A budget that any merge fits into, to ask what one needs at least.
_PLENTY_BYTES = 10**15
# What a node keeps for Ray and the system.
_NODE_BYTES = 8_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A kind of EC2 instance. The names are only an example of the size."""

    name: str
    cores: int
    memory_bytes: int

    def holds(self, memory_bytes: int) -> int:
        """How many workers of this memory it takes: one a core at most."""
        return min(self.cores, (self.memory_bytes - _NODE_BYTES) // memory_bytes)


# Of a family with much network for its cores: merging moves bytes.
SMALL = Node(name="m6in.2xlarge", cores=8, memory_bytes=32 << 30)
LARGE = Node(name="m6in.8xlarge", cores=32, memory_bytes=128 << 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A cluster for a family.

    Attributes:
        family: Words for people.
        size: Of the base.
        adapters: How many adapters of rank 16 on all linear layers; 0 is eight full models.
        file_size: The recipe's.
        memory_bytes: `--memory`.
    """

    family: str
    size: Size
    adapters: int = 0
    file_size: str = "5GB"
    workers: int
    memory_bytes: int
    node: Node


ROWS = (
    Row(family="8 × 8B", size="8B", workers=1, memory_bytes=4_000_000_000, node=SMALL),
    Row(family="8 × 8B", size="8B", workers=4, memory_bytes=4_000_000_000, node=SMALL),
    Row(family="8 × 8B", size="8B", file_size="1GB", workers=16, memory_bytes=10_000_000_000, node=LARGE),
    Row(family="8 × 70B", size="70B", workers=8, memory_bytes=4_000_000_000, node=LARGE),
    Row(family="8 × 70B", size="70B", workers=30, memory_bytes=8_000_000_000, node=LARGE),
    Row(family="8 × 70B", size="70B", file_size="2GB", workers=64, memory_bytes=8_000_000_000, node=LARGE),
    Row(family="100 adapters on 8B", size="8B", adapters=100, workers=4, memory_bytes=4_000_000_000, node=SMALL),
)
_HEAD = (
    "family (bfloat16)",
    "`file_size`",
    "files",
    "memory in use",
    "`--workers` × `--memory`",
    "held by a worker",
    "read",
    "passes",
    "written",
    "nodes",
)


def table(rows: Sequence[Row] = ROWS) -> str:
    """Return the table as Markdown."""
    families: dict[tuple[Size, int], Path] = {}
    lines = [_line(_HEAD), _line(["---", "---", *["---:"] * (len(_HEAD) - 3), "---"])]
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            key = (row.size, row.adapters)
            if key not in families:
                families[key] = _family(Path(folder) / f"family{len(families)}", row)
            lines.append(_line(_cells(row, families[key])))
    return "\n".join(lines) + "\n"


def _cells(row: Row, recipe: Path) -> list[str]:
    document = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**document, "pipeline": {"file_size": row.file_size}}))
    resources = Resources(executor="ray", workers=row.workers, memory_bytes=row.memory_bytes)
    planned = plan_merge(load_recipe(str(recipe))[0], open_store(str(recipe.parent / "out")), resources, probe=False)
    plan = _in_a_bucket(planned.plan)
    files = len(plan.files)
    if row.workers > files:
        raise ValueError(f"{row.workers} workers for {files} files: the rest would idle")
    memory = _remote_memory(plan, row.memory_bytes)
    cost = project_cost(plan, memory, workers=row.workers, rates=None)
    # Without what is only kept from the first read because there is room for it.
    most = _remote_memory(plan, _PLENTY_BYTES)
    used_bytes = most.total_bytes - most.terms["retained"]
    return [
        row.family,
        row.file_size,
        str(files),
        format_bytes(used_bytes),
        f"{row.workers} × {row.memory_bytes // 10**9}GB",
        format_bytes(memory.total_bytes),
        format_bytes(cost.read_bytes),
        f"{cost.passes:g}",
        format_bytes(cost.written_bytes),
        f"{-(-row.workers // row.node.holds(row.memory_bytes))} × {row.node.name}",
    ]


def _in_a_bucket(plan: Plan) -> Plan:
    """Return a plan of local files as if they were on object storage: other buffers, the same bytes."""
    inputs = [dataclasses.replace(item, url=f"s3://models/{number}") for number, item in enumerate(plan.inputs)]
    return dataclasses.replace(plan, inputs=tuple(inputs))


def _remote_memory(plan: Plan, budget_bytes: int) -> Memory:
    """Return what a worker on Ray holds that writes to a bucket."""
    return project_memory(plan, budget_bytes=budget_bytes, threads=1, remote_output=True)


def _family(folder: Path, row: Row) -> Path:
    """Save a family of sparse files and return its recipe."""
    folder.mkdir()
    recipe = llama_family(folder, row.size, 0 if row.adapters else 8)
    document = json.loads(recipe.read_text())
    # The models are bfloat16 already: nothing is cast.
    del document["dtype"]
    if row.adapters:
        adapters = [_adapter(folder / f"adapter{number}", row.size) for number in range(row.adapters)]
        document["models"] = [{"model": str(adapter)} for adapter in adapters]
    recipe.write_text(json.dumps(document))
    return recipe


def _adapter(folder: Path, size: Size) -> Path:
    """Save an adapter of rank 16 on all linear layers, its data a hole."""
    linears = {name: shape for name, shape in LLAMAS[size].shapes().items() if "_proj." in name}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in linears.items():
        module = "base_model.model." + name.removesuffix(".weight")
        shapes |= {f"{module}.lora_A.weight": (16, columns), f"{module}.lora_B.weight": (rows, 16)}
    save_sparse(folder, shapes)
    weights = next(folder.glob("*.safetensors"))
    weights.rename(folder / ADAPTER_FILE)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    (folder / "config.json").unlink()
    layout = Layout(modules=tuple(sorted({name.split(".")[-2] for name in linears})), rank=16, alpha=32.0)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(layout.config(folder.parent / "base")))
    return folder


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(table())
