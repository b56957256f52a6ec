"""PEFT adapters on disk, written without peft, and the dense tensors they mean in float64: base + s·B·A."""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests.support.families import Family, load_folder

Tensors = dict[str, torch.Tensor]

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_WORDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What an adapter looks like. Modules are paths in the base, without ".weight".

    Attributes:
        rank_pattern: Rank by the end of a module's path, which may be the whole path; so `alpha_pattern`.
        saved: Modules of which it stores a whole weight (modules_to_save).
        order: Of the tensors in the file: "stored" (A, B, module by module), "sorted", "reversed", "shuffled".
        size: Spread of the elements of an update.
    """

    modules: tuple[str, ...]
    rank: int = 4
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    fan_in_fan_out: bool = False
    saved: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    order: str = "stored"
    size: float = 0.005

    def rank_of(self, module: str) -> int:
        """The rank of one module."""
        return int(_by_end(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What multiplies B·A."""
        rank = self.rank_of(module)
        return _by_end(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def config(self, base: Path | None) -> dict[str, object]:
        """The adapter_config.json that peft would write, defaults left out."""
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": str(base) if base else None,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "use_rslora": self.rslora,
            "use_dora": False,
            "fan_in_fan_out": self.fan_in_fan_out,
            "modules_to_save": list(self.saved) or None,
            "target_modules": list(self.modules),
            "lora_dropout": 0.0,
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": True,
            "task_type": None,
        }


def linears(names: Mapping[str, object] | Sequence[str], *ends: str) -> tuple[str, ...]:
    """The modules whose path ends so, in the order of the names."""
    modules = [name.removesuffix(".weight") for name in names]
    return tuple(module for module in modules if module.endswith(ends))


def random_factors(base: Mapping[str, torch.Tensor], layout: Layout, seed: int) -> dict[str, Tensors]:
    """Random factors {"A", "B"} by module, in the adapter's dtype; the same whatever the order in the file."""
    generator = torch.Generator().manual_seed(5000 + seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    factors = {}
    for module in layout.modules:
        outputs, inputs = _sides(base[f"{module}.weight"].shape, layout)
        rank = layout.rank_of(module)
        spread = layout.size / (layout.scale_of(module) * math.sqrt(rank))
        factors[module] = {
            "A": draw(rank, inputs).to(layout.dtype),
            "B": (draw(outputs, rank) * spread).to(layout.dtype),
        }
    return factors


def save_adapter(
    folder: Path,
    base: Mapping[str, torch.Tensor],
    layout: Layout,
    factors: Mapping[str, Tensors],
    *,
    base_path: Path | None = None,
    seed: int = 0,
) -> Tensors:
    """Write an adapter and return, in float64, all tensors of the base with the adapter merged in.

    Args:
        folder: Where to.
        base: The base's tensors.
        layout: What the adapter looks like.
        factors: {"A": (r, inputs), "B": (outputs, r)} by module.
        base_path: What the config names as the base.
        seed: Of the saved modules' weights and of a shuffled order.
    """
    dense = {name: value.to(torch.float64) for name, value in base.items()}
    stored: Tensors = {}
    for module, pair in factors.items():
        update = layout.scale_of(module) * (pair["B"].to(torch.float64) @ pair["A"].to(torch.float64))
        name = f"{module}.weight"
        dense[name] = dense[name] + (update.T if layout.fan_in_fan_out else update)
        stored |= {f"{_PREFIX}{module}.lora_{side}.weight": pair[side] for side in ("A", "B")}
    generator = torch.Generator().manual_seed(9000 + seed)
    for module in layout.saved:
        name = f"{module}.weight"
        noise = torch.randn(base[name].shape, generator=generator, dtype=torch.float64) * layout.size
        stored[_PREFIX + name] = (base[name].to(torch.float64) + noise).to(layout.dtype)
        dense[name] = stored[_PREFIX + name].to(torch.float64)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / ADAPTER_FILE, {name: stored[name] for name in _ordered(list(stored), layout.order, seed)})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(layout.config(base_path)))
    return dense


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file in the order given: the library itself always sorts."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, parts = 0, []
    for name, value in tensors.items():
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _WORDS[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [position, position + len(data)],
        }
        position += len(data)
        parts.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def make_adapters(root: Path, base: Path, layouts: Sequence[Layout], *, first_seed: int = 0) -> Family:
    """Write one random adapter per layout for a base on disk; the family's values are dense and in float64."""
    base_values = load_folder(base)
    family = Family(root=root, base=base, base_values=base_values)
    for number, layout in enumerate(layouts):
        folder, seed = root / f"adapter{number}", first_seed + number
        factors = random_factors(base_values, layout, seed)
        family.values.append(save_adapter(folder, base_values, layout, factors, base_path=base, seed=seed))
        family.models.append(folder)
    return family


def materialised(family: Family, root: Path) -> Family:
    """Write base and merged models of a family as full float64 checkpoints."""

    def save(folder: Path, values: Mapping[str, torch.Tensor]) -> Path:
        folder.mkdir(parents=True)
        tensors = {name: value.to(torch.float64).contiguous() for name, value in values.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(family.base / "config.json", folder)
        return folder

    dense = Family(root=root, base=save(root / "base", family.base_values), base_values=family.base_values)
    dense.models = [save(root / f"full{number}", values) for number, values in enumerate(family.values)]
    dense.values = family.values
    return dense


def updates_of(folder: Path) -> dict[str, np.ndarray]:
    """B·A by module, float64 (outputs, inputs), of a written adapter whose every scale must be 1 by its config."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["alpha_pattern"] == config["rank_pattern"]
    stored = load_folder(folder)
    found = {}
    for name, right in stored.items():
        if name.endswith(".lora_A.weight"):
            left = stored[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            found[module] = (left.to(torch.float64) @ right.to(torch.float64)).numpy()
    return found


def _by_end(pattern: Mapping[str, int] | Mapping[str, float], module: str, otherwise: float) -> float:
    for end, value in pattern.items():
        if module == end or module.endswith(f".{end}"):
            return value
    return otherwise


def _sides(shape: Sequence[int], layout: Layout) -> tuple[int, int]:
    """Outputs and inputs of a weight, which a Conv1D stores the other way round."""
    return (shape[1], shape[0]) if layout.fan_in_fan_out else (shape[0], shape[1])


def _ordered(names: list[str], order: str, seed: int) -> list[str]:
    match order:
        case "stored":
            return names
        case "sorted":
            return sorted(names)
        case "reversed":
            return sorted(names, reverse=True)
        case "shuffled":
            return random.Random(seed).sample(names, len(names))
    raise ValueError(order)
