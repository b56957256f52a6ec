from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.errors import CheckpointError
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore

from .models import TENSORS, by_shards, write_model, write_sharded

INDEX = "model.safetensors.index.json"


def agrees(checkpoint: Checkpoint, folder: Path) -> None:
    """The bytes at every entry are those that the official reader gives."""
    for entry in checkpoint.tensors.values():
        with safe_open(folder / entry.file, framework="pt") as file:
            tensor = file.get_tensor(entry.name)
        assert tuple(tensor.shape) == entry.shape
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert (folder / entry.file).read_bytes()[entry.start : entry.stop] == raw


def test_a_single_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", config={"hidden_size": 4})
    checkpoint = open_checkpoint(str(folder))
    assert set(checkpoint.tensors) == set(TENSORS)
    agrees(checkpoint, folder)
    assert checkpoint.url == str(folder)
    assert checkpoint.config == {"hidden_size": 4}
    assert checkpoint.parameters == 24 + 12 + 4
    assert checkpoint.data_bytes == 24 * 2 + 12 * 4 + 4 * 2
    (file,) = checkpoint.files
    assert file.path == "model.safetensors"
    assert file.size_bytes == (folder / file.path).stat().st_size == file.header_bytes + checkpoint.data_bytes
    assert file.version == checkpoint.store.stat(file.path).version


def test_shards_come_in_the_order_of_file_then_offset(tmp_path: Path) -> None:
    many = {f"t{number}": torch.full((number + 1,), float(number)) for number in range(20)}
    folder = write_sharded(tmp_path / "m", by_shards(many, 3))
    checkpoint = open_checkpoint(str(folder))
    assert set(checkpoint.tensors) == set(many)
    agrees(checkpoint, folder)
    assert [file.path for file in checkpoint.files] == sorted(by_shards(many, 3))
    places = [(entry.file, entry.start) for entry in checkpoint.tensors.values()]
    assert places == sorted(places)
    assert checkpoint.config == {}


def test_only_headers_index_and_config_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_sharded(tmp_path / "m", by_shards({f"t{number}": torch.zeros(200_000) for number in range(4)}))
    real, total = LocalStore.read, []

    def read(store: LocalStore, path: str, start: int = 0, stop: int | None = None) -> bytes:
        data = real(store, path, start, stop)
        total.append(len(data))
        return data

    monkeypatch.setattr(LocalStore, "read", read)
    assert open_checkpoint(str(folder)).data_bytes == 3_200_000
    assert sum(total) <= 2 * (256 << 10) + (folder / INDEX).stat().st_size


def test_one_other_file_and_a_file_named_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "m", name="weights.safetensors", config={"a": 1})
    for url in (folder, folder / "weights.safetensors", folder.as_uri() + "/weights.safetensors"):
        checkpoint = open_checkpoint(str(url))
        assert [file.path for file in checkpoint.files] == ["weights.safetensors"]
        assert checkpoint.config == {"a": 1}
        assert open_checkpoint(checkpoint.url).tensors == checkpoint.tensors
    monkeypatch.chdir(folder)
    assert open_checkpoint("weights.safetensors").url == str(folder / "weights.safetensors")


def test_remote_folders_are_the_same(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "m", by_shards())
    store = open_store("memory://checkpoint-test/m")
    for name in os.listdir(folder):  # noqa: PTH208
        store.write(name, (folder / name).read_bytes())
    checkpoint = open_checkpoint(store.url)
    assert checkpoint.tensors == open_checkpoint(str(folder)).tensors
    shard = checkpoint.files[0].path
    assert open_checkpoint(f"{store.url}/{shard}").files == checkpoint.files[:1]


def test_the_single_file_goes_before_an_index_of_itself(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "m", {"model.safetensors": TENSORS})
    assert set(open_checkpoint(str(folder)).tensors) == set(TENSORS)


def refused(url: Path, *words: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(url))
    for word in words:
        assert word in str(caught.value)
    return caught.value


def test_two_models_in_one_folder(tmp_path: Path) -> None:
    write_sharded(tmp_path, by_shards())
    write_model(tmp_path)
    refused(tmp_path, INDEX, "two models in one folder", "model-00001-of-00002.safetensors", "remove model.safetensors")


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, by_shards(count=3))
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    error = refused(tmp_path, "2 problems", "model-00001-of-00003.safetensors: does not exist", "model-00003-of")
    assert len(error.problems) == 2


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, by_shards())
    shard = tmp_path / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 3)
    refused(tmp_path, f"{shard.name}: is truncated: the header describes {size} bytes, the file has {size - 3}")


def test_index_and_shards_must_tell_the_same(tmp_path: Path) -> None:
    shards = by_shards()
    write_sharded(tmp_path, shards)
    names = list(TENSORS)
    first, second = shards
    index = {names[0]: first, "ghost": first, names[1]: second}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    error = refused(
        tmp_path,
        f"{first}: the index lists tensor 'ghost', which the file does not have",
        f"has tensor {names[2]!r}, which the index does not list",
        "of one revision",
    )
    assert len(error.problems) == 2


def test_a_tensor_in_the_wrong_shard_and_one_in_two(tmp_path: Path) -> None:
    shards = by_shards()
    first, second = shards
    write_sharded(tmp_path / "two", {first: TENSORS, second: shards[second]})
    refused(tmp_path / "two", f"{second}: tensor 'model.layers.0.mlp.weight' is also in", first)
    write_sharded(tmp_path / "wrong", shards)
    swapped = {name: second if name in shards[first] else first for name in TENSORS}
    (tmp_path / "wrong" / INDEX).write_text(json.dumps({"weight_map": swapped}))
    assert len(refused(tmp_path / "wrong", "the index lists tensor").problems) == 3


def test_very_many_problems_are_counted(tmp_path: Path) -> None:
    shards = by_shards()
    write_sharded(tmp_path, shards)
    index = {f"ghost{number}": next(iter(shards)) for number in range(100)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    assert len(refused(tmp_path, "and 94 more of this kind").problems) == 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must be a JSON object, is list"),
        ("{}", "must have a weight_map"),
        ('{"weight_map": {}}', "must have a weight_map"),
        ('{"weight_map": []}', "must have a weight_map"),
        ('{"weight_map": {"a": 1}}', "tensor 'a' is said to be in 1"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "tensor 'a' is said to be in '../x.safetensors'"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "tensor 'a' is said to be in '/etc/x.safetensors'"),
        ('{"weight_map": {"a": "x.bin"}}', "tensor 'a' is said to be in 'x.bin'"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "has the key 'a' twice"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, INDEX, words)


def test_shards_in_a_sub_folder_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write_sharded(tmp_path, {"parts/1.safetensors": TENSORS})
    assert set(open_checkpoint(str(tmp_path)).tensors) == set(TENSORS)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, name, "a pickle can run any code and is never loaded", "save_pretrained")


def test_folders_without_a_model(tmp_path: Path) -> None:
    refused(tmp_path, "is empty or does not exist", "check the path")
    refused(tmp_path / "nowhere", "nowhere: is empty or does not exist")
    refused(tmp_path / "x.safetensors", "x.safetensors: does not exist")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "has no model.safetensors and no model.safetensors.index.json")
    for name in ("a.safetensors", "b.safetensors"):
        write_model(tmp_path, name=name)
    refused(tmp_path, "has 2 safetensors files (a.safetensors, b.safetensors", "name one file")


def test_a_broken_config_is_refused_and_a_lenient_one_is_not(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text("{,}")
    refused(tmp_path, "config.json: is not valid JSON")
    (tmp_path / "config.json").write_text("[1]")
    refused(tmp_path, "config.json: must be a JSON object, is list")
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "pad_token_id": -1}')
    assert open_checkpoint(str(tmp_path)).config == {"time_step_limit": [0.0, float("inf")], "pad_token_id": -1}


def test_the_checkpoint_cannot_be_changed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_model(tmp_path, config={"a": 1})))
    with pytest.raises(TypeError):
        checkpoint.tensors["x"] = next(iter(checkpoint.tensors.values()))  # type: ignore[index]
    with pytest.raises(TypeError):
        checkpoint.config["a"] = 2  # type: ignore[index]
