"""A family of nine 70B models, planned from sparse files: little memory, and no byte of data is read."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.merging import Planned, Resources, load_recipe, plan_merge
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from tests.support.families import CONFIG

# Llama 3 70B.
LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY, KV = 80, 8192, 28672, 128256, 1024
PARAMETERS = 70_553_706_496
EXPERTS = 8
SHARDS = 30
# What a reader of headers asks for at once, so that almost every header takes one request.
_GUESS_BYTES = 1 << 18


def _shapes() -> dict[str, list[int]]:
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN]}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": [HIDDEN],
            prefix + "mlp.down_proj.weight": [HIDDEN, INTERMEDIATE],
            prefix + "mlp.gate_proj.weight": [INTERMEDIATE, HIDDEN],
            prefix + "mlp.up_proj.weight": [INTERMEDIATE, HIDDEN],
            prefix + "post_attention_layernorm.weight": [HIDDEN],
            prefix + "self_attn.k_proj.weight": [KV, HIDDEN],
            prefix + "self_attn.o_proj.weight": [HIDDEN, HIDDEN],
            prefix + "self_attn.q_proj.weight": [HIDDEN, HIDDEN],
            prefix + "self_attn.v_proj.weight": [KV, HIDDEN],
        }
    return shapes | {"model.norm.weight": [HIDDEN], "lm_head.weight": [VOCABULARY, HIDDEN]}


def _sparse_model(folder: Path) -> None:
    """Headers, index and config as published; the data is a hole."""
    folder.mkdir()
    names = list(_shapes().items())
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in part:
            size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
    index = {"metadata": {"total_size": 2 * PARAMETERS}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {**CONFIG, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    folders = [root / "base", *(root / f"expert{number}" for number in range(EXPERTS))]
    for folder in folders:
        _sparse_model(folder)
    path = root / "recipe.yaml"
    document = {
        "merge_method": "geometric_median",
        "base_model": str(folders[0]),
        "models": [{"model": str(folder)} for folder in folders[1:]],
        "dtype": "bfloat16",
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """Every range that local stores are asked for, as (path, start, stop)."""
    found: list[tuple[str, int, int]] = []
    read, read_into = LocalStore.read, LocalStore.read_into

    def seen_read(self: LocalStore, path: str, start: int = 0, stop: int | None = None) -> bytes:
        data = read(self, path, start, stop)
        found.append((self.location(path), start, start + len(data)))
        return data

    def seen_read_into(self: LocalStore, path: str, start: int, buffer: memoryview) -> None:
        found.append((self.location(path), start, start + buffer.nbytes))
        read_into(self, path, start, buffer)

    monkeypatch.setattr(LocalStore, "read", seen_read)
    monkeypatch.setattr(LocalStore, "read_into", seen_read_into)
    return found


def _planned(recipe: Path) -> Planned:
    resources = Resources(workers=4, memory_bytes=8_000_000_000)
    return plan_merge(load_recipe(str(recipe))[0], open_store(str(recipe.parent / "out")), resources, probe=False)


def test_planning_reads_headers_only_and_stays_small(recipe: Path, reads: list[tuple[str, int, int]]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned = _planned(recipe)
    growth_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth_bytes < 1_000_000_000
    headers = {}
    for file in sorted(recipe.parent.glob("*/*.safetensors")):
        with file.open("rb") as stream:
            headers[str(file)] = 8 + int.from_bytes(stream.read(8), "little")
    weights = [(path, start, stop) for path, start, stop in reads if path in headers]
    assert {path for path, _, _ in weights} == set(headers)
    # One request a file, from its first byte: the header and no more than was guessed of its length.
    assert len(weights) == len(headers) == (EXPERTS + 1) * SHARDS
    assert [place for place in weights if place[1] != 0 or place[2] > max(headers[place[0]], _GUESS_BYTES)] == []
    assert sum(stop for _, _, stop in weights) < 1e-4 * 2 * PARAMETERS * (EXPERTS + 1)
    assert not (recipe.parent / "out").exists()
    assert planned.plan.fingerprint == _planned(recipe).plan.fingerprint


def test_the_numbers_of_the_plan(recipe: Path) -> None:
    planned = _planned(recipe)
    plan = planned.plan
    assert len(plan.tensors) == 80 * 9 + 3
    assert sum(item.elements for item in plan.tensors) == PARAMETERS
    assert sum(file.size_bytes for file in plan.files) == 2 * PARAMETERS
    assert max(file.size_bytes for file in plan.files) <= 5_000_000_000
    assert len(plan.files) >= 2 * PARAMETERS // 5_000_000_000
    assert not any(file.fused for file in plan.files)
    assert planned.memory.total_bytes <= 8_000_000_000
    assert planned.cost.measure_bytes == 9 * 2 * PARAMETERS
    assert planned.cost.written_bytes == 2 * PARAMETERS
    kept = 4 * planned.memory.retained_bytes
    assert planned.cost.reread_bytes == 8 * 2 * PARAMETERS - kept
    chunks = sum(-(-item.elements // plan.chunk_elements) for item in plan.tensors)
    assert sum(len(plan.chunks(index)) for index in range(len(plan.files))) == chunks
