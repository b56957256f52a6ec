from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from pipeline.checkpoints.header import parse_header
from pipeline.checkpoints.writer import SafetensorsWriter, TensorSpec, WrittenFile, header_size
from pipeline.errors import CheckpointError, VerificationError
from pipeline.storage import open_store

TENSORS = {
    "z.weight": torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    "a.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    'ü\n"\\ name': torch.tensor([1.5], dtype=torch.float16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "mask": torch.tensor([True, False]),
    "f8": torch.ones(3).to(torch.float8_e4m3fn),
}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def rewritten(folder: Path, original: bytes, piece_bytes: int) -> tuple[bytes, WrittenFile]:
    """Write a file again from its own header, in pieces."""
    header = parse_header(original, len(original), "original")
    specs = [(entry.name, entry.dtype, entry.shape) for entry in header.tensors]
    writer = SafetensorsWriter(open_store(str(folder)).open_writer("model.safetensors"), specs, header.metadata)
    data = memoryview(original)[header.header_bytes :]
    for start in range(0, len(data), piece_bytes):
        writer.write(data[start : start + piece_bytes])
    written = writer.finish()
    return (folder / "model.safetensors").read_bytes(), written


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_the_bytes_are_those_of_the_official_writer(tmp_path: Path, piece_bytes: int, metadata: dict[str, str]) -> None:
    save_file(TENSORS, tmp_path / "official.safetensors", metadata=metadata or None)
    original = (tmp_path / "official.safetensors").read_bytes()
    copy, written = rewritten(tmp_path, original, piece_bytes)
    assert copy == original
    assert written == WrittenFile(size_bytes=len(original), sha256=hashlib.sha256(original).hexdigest())


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=50, deadline=None)
@given(shapes=st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), SHAPES, max_size=6))
def test_any_names_and_shapes_survive_the_official_reader(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, ...]]
) -> None:
    tensors = {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        for name, shape in shapes.items()
    }
    copy, _ = rewritten(tmp_path_factory.mktemp("model"), save(tensors), 16)
    found = load(copy)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_an_order_of_our_own_loads_with_safe_open(tmp_path: Path) -> None:
    order: list[TensorSpec] = [("mask", "BOOL", (2,)), ("z.weight", "F64", (5, 3)), ("a.weight", "BF16", (2, 3))]
    writer = SafetensorsWriter(open_store(str(tmp_path)).open_writer("m.safetensors"), order, {"made": "here"})
    for name, _, _ in order:
        writer.write(raw_bytes(TENSORS[name]))
    written = writer.finish()
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert file.metadata() == {"made": "here"}
        assert list(file.offset_keys()) == [name for name, _, _ in order]
        for name, _, _ in order:
            assert torch.equal(file.get_tensor(name), TENSORS[name])
    size = header_size(order, {"made": "here"})
    assert size % 8 == 0
    assert written.size_bytes == size + 2 + 15 * 8 + 6 * 2


def test_nothing_is_visible_before_finish_nor_after_abort(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    writer = SafetensorsWriter(store.open_writer("m"), [("a", "U8", (4,))], {})
    writer.write(b"12")
    assert store.list() == ()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "words"), [(b"123", "bytes in all were written"), (b"12345", "bytes or more were written")]
)
def test_the_wrong_number_of_bytes_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    def write() -> None:
        writer = SafetensorsWriter(open_store(str(tmp_path)).open_writer("m"), [("a", "U8", (4,))], {})
        writer.write(data)
        writer.finish()

    expected = header_size([("a", "U8", (4,))], {}) + 4
    with pytest.raises(VerificationError, match=rf"{expected - 4 + len(data)} {words}, the header says {expected}"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], "tensor 'a': the name occurs twice or is reserved"),
        ([("__metadata__", "U8", (1,))], "occurs twice or is reserved"),
        ([("a", "bfloat16", (1,))], r"tensor 'a': bfloat16 \[1\] cannot be stored"),
        ([("a", "F4", (3,))], r"F4 \[3\] cannot be stored in whole bytes"),
        ([("a", "U8", (-1, -1))], "cannot be stored"),
    ],
)
def test_impossible_files_are_refused_and_leave_nothing(tmp_path: Path, specs: list[TensorSpec], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        header_size(specs, {})
    with pytest.raises(CheckpointError, match=words):
        SafetensorsWriter(open_store(str(tmp_path)).open_writer("m"), specs, {})
    assert list(tmp_path.iterdir()) == []


def test_a_view_of_wider_elements_counts_bytes(tmp_path: Path) -> None:
    writer = SafetensorsWriter(open_store(str(tmp_path)).open_writer("m"), [("a", "F64", (2, 3))], {})
    writer.write(memoryview(TENSORS["z.weight"][:2].contiguous().numpy()))
    writer.finish()
    assert torch.equal(load((tmp_path / "m").read_bytes())["a"], TENSORS["z.weight"][:2])
