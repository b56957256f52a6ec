from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from pipeline.checkpoints.dtypes import DTYPES
from pipeline.checkpoints.header import Header, parse_header, read_header
from pipeline.errors import CheckpointError
from pipeline.storage import open_store

GOOD = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "I8", "shape": [], "data_offsets": [8, 9]},
}
BYTE = b'{"dtype":"U8","shape":[],"data_offsets":[0,1]}'


def file_of(header: Any, data_bytes: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def length_of(text_bytes: int) -> bytes:
    return struct.pack("<Q", text_bytes) + b"{}"


def parse(raw: bytes) -> Header:
    return parse_header(raw, len(raw), "model.safetensors")


def with_entry(**fields: Any) -> bytes:
    return file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}, 8)


def test_a_good_header() -> None:
    raw = file_of({"__metadata__": {"format": "pt"}, **GOOD}, 9)
    header = parse_header(raw, len(raw), "where", file="model.safetensors", version="v1")
    begin = len(raw) - 9
    assert (header.header_bytes, header.size_bytes, header.version) == (begin, len(raw), "v1")
    assert header.metadata == {"format": "pt"}
    assert [(e.name, e.dtype, e.shape, e.file, e.start, e.stop) for e in header.tensors] == [
        ("a", "F32", (2,), "model.safetensors", begin, begin + 8),
        ("b", "I8", (), "model.safetensors", begin + 8, begin + 9),
    ]
    assert [(entry.elements, entry.size_bytes) for entry in header.tensors] == [(2, 8), (1, 1)]


def test_tensors_come_by_offset_and_empty_ones_are_legal() -> None:
    header = parse(
        file_of(
            {
                "late": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
                "empty": {"dtype": "F32", "shape": [7, 0], "data_offsets": [3, 3]},
                "early": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            },
            5,
        )
    )
    assert [entry.name for entry in header.tensors] == ["early", "empty", "late"]


def test_no_tensors_at_all_is_legal_as_in_the_official_reader() -> None:
    raw = file_of(b"{}      ", 0)
    assert safetensors.deserialize(raw) == []
    assert parse(raw).tensors == ()


def test_packed_types_count_bits() -> None:
    assert parse(file_of({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, 2)).tensors[0].elements == 4


HOSTILE = {
    "empty file": (b"", "is no safetensors file: 0 bytes, 8 at least are needed"),
    "too short for a length": (b"1234567", "is no safetensors file: 7 bytes, 8 at least"),
    "length beyond the cap": (
        length_of(100_000_001),
        "claims a header of 100000001 bytes, 100000000 at most",
    ),
    "length of 2^64 - 1": (b"\xff" * 8 + b"{}", "claims a header of 18446744073709551615 bytes"),
    "length beyond the file": (
        length_of(50),
        "is truncated: the header ends at byte 58, the file has 10",
    ),
    "no header": (file_of(b"", 4), "does not begin with '{'"),
    "an array": (file_of(b"[1]", 0), "does not begin with '{'"),
    "white space first": (file_of(b" {}", 0), "does not begin with '{'"),
    "a pickle": (b"\x80\x02}q\x00(X" + bytes(100), "is truncated|claims a header"),
    "not UTF-8": (file_of(b'{"\xff":1}', 0), "header: is not UTF-8 text: byte 2"),
    "not JSON": (file_of(b"{a}", 0), "header: is not valid JSON"),
    "text after the object": (file_of(b"{}x", 0), "header: is not valid JSON"),
    "NaN": (file_of(b'{"a":NaN}', 0), "contains NaN, which is no JSON"),
    "Infinity": (file_of(b'{"a":-Infinity}', 0), "contains -Infinity, which is no JSON"),
    "nested too deeply": (file_of(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 0), "nested too deeply"),
    "the same tensor twice": (
        file_of(
            b'{"a":' + BYTE + b',"a":' + BYTE + b"}",
            1,
        ),
        "has the key 'a' twice",
    ),
    "the same field twice": (
        file_of(b'{"a":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', 1),
        "has the key 'dtype' twice",
    ),
    "metadata twice": (file_of(b'{"__metadata__":{"x":"1","x":"2"}}', 0), "has the key 'x' twice"),
    "metadata of numbers": (file_of({"__metadata__": {"x": 1}}, 0), "__metadata__ must map text to text"),
    "metadata null": (file_of({"__metadata__": None}, 0), "__metadata__ must map text to text"),
    "a lone surrogate": (file_of(b'{"__metadata__":{"x":"\\ud800"}}', 0), "__metadata__ must map text to text"),
    "a lone surrogate as name": (
        file_of(b'{"\\ud800":' + BYTE + b"}", 1),
        "is no valid text",
    ),
    "an entry that is no object": (file_of({"a": [1]}, 0), "tensor 'a': must be described by an object, not by list"),
    "a missing field": (
        file_of({"a": {"dtype": "U8", "shape": []}}, 0),
        r"tensor 'a': .*missing \['data_offsets'\], unknown \[\]",
    ),
    "a further field": (with_entry(extra=1), r"tensor 'a': .*missing \[\], unknown \['extra'\]"),
    "an unknown dtype": (with_entry(dtype="F31"), "tensor 'a': unknown dtype 'F31' .known are F64, F32"),
    "a dtype that is no text": (with_entry(dtype=["F32"]), "tensor 'a': unknown dtype"),
    "a negative dimension": (with_entry(shape=[-2]), "contains '-2', which is no size or offset"),
    "minus zero": (file_of(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', 0), "contains '-0'"),
    "a fraction as dimension": (with_entry(shape=[2.0]), r"shape \[2.0\] must be a list of non-negative integers"),
    "true as dimension": (with_entry(shape=[True, 2]), r"shape \[True, 2\] must be a list"),
    "a shape that is no list": (with_entry(shape=2), "shape 2 must be a list"),
    "a number of 5000 digits": (file_of(b'{"a":' + b"9" * 5000 + b"}", 0), "contains '9{21}', which is no size"),
    "a product beyond 63 bits": (with_entry(shape=[2**40, 2**40]), "more elements than 63 bits can count"),
    "the same with a zero": (with_entry(shape=[2**40, 2**40, 0]), "more elements than 63 bits can count"),
    "true as offset": (with_entry(data_offsets=[False, 8]), "must be two ascending non-negative integers"),
    "three offsets": (with_entry(data_offsets=[0, 4, 8]), "must be two ascending non-negative integers"),
    "descending offsets": (with_entry(data_offsets=[8, 0]), "must be two ascending non-negative integers"),
    "a size that is not the offsets'": (with_entry(shape=[3]), r"F32 \[3\] needs 12 bytes, data_offsets give 8"),
    "half a byte": (
        file_of({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1),
        r"F4 \[3\] needs 1\.5 bytes",
    ),
    "an overlap": (
        file_of({"a": GOOD["a"], "b": {"dtype": "U8", "shape": [2], "data_offsets": [7, 9]}}, 9),
        r"tensor 'b': an overlap: its data begins at byte \d+, the data before it ends at byte",
    ),
    "one inside another": (
        file_of({"a": GOOD["a"], "b": {"dtype": "U8", "shape": [0], "data_offsets": [5, 5]}}, 8),
        "tensor 'b': an overlap",
    ),
    "the same bytes twice": (file_of({"a": GOOD["a"], "b": GOOD["a"]}, 8), "tensor 'b': an overlap"),
    "a hole": (
        file_of({"a": GOOD["a"], "b": {"dtype": "U8", "shape": [1], "data_offsets": [9, 10]}}, 10),
        "tensor 'b': a hole",
    ),
    "a hole at the beginning": (file_of({"b": GOOD["b"]}, 9), "tensor 'b': a hole"),
    "truncated data": (file_of(GOOD, 5), r"is truncated: the header describes \d+ bytes, the file has \d+"),
    "trailing bytes": (file_of(GOOD, 10), r"has trailing bytes: the header describes \d+ bytes, the file has \d+"),
    "offsets far beyond the end": (
        file_of({"a": {"dtype": "U8", "shape": [2**60], "data_offsets": [0, 2**60]}}, 1),
        "is truncated: the header describes 11529",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_file_rule_and_remedy(case: str) -> None:
    raw, words = HOSTILE[case]
    with pytest.raises(CheckpointError, match=words) as caught:
        parse(raw)
    (problem,) = caught.value.problems
    assert problem.where.startswith("model.safetensors")
    assert problem.remedy


def test_long_names_do_not_flood_the_message() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(file_of({"n" * 100_000: 1}, 0))
    assert len(str(caught.value)) < 500


def test_a_header_cut_off_in_memory_is_refused() -> None:
    raw = file_of(GOOD, 9)
    with pytest.raises(CheckpointError, match="only 20 of them are there"):
        parse_header(raw[:20], len(raw), "x")


def official(raw: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {name: (e["dtype"], e["shape"], bytes(e["data"])) for name, e in safetensors.deserialize(raw)}


def ours(raw: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {e.name: (e.dtype, list(e.shape), raw[e.start : e.stop]) for e in parse(raw).tensors}


SAMPLES = [
    file_of(GOOD, 9),
    file_of({"__metadata__": {"format": "pt", "é": "ü"}, **GOOD}, 9),
    save({"w": torch.ones(2, 3, dtype=torch.bfloat16), "e": torch.zeros(0), "b": torch.tensor([True])}, {"k": "v"}),
    file_of({'é\n"': {"dtype": "F8_E4M3", "shape": [1, 1, 3], "data_offsets": [0, 3]}}, 3),
]
TOKENS = [
    b'"a"',
    b'"b"',
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b"0",
    b"-",
    b"8",
    b"1e1",
    b"true",
    b"null",
    b'"F32"',
    b"\\u0000",
    b" ",
]


def equal_or_refused(raw: bytes) -> None:
    try:
        found = ours(raw)
    except CheckpointError:
        return
    assert found == official(raw)


@pytest.mark.parametrize("raw", SAMPLES)
def test_the_official_reader_sees_the_same(raw: bytes) -> None:
    assert ours(raw) == official(raw)
    assert ours(raw)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_mutated_bytes_are_read_as_the_official_reader_does_or_refused(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    equal_or_refused(bytes(raw[: data.draw(st.integers(max(0, len(raw) - 2), len(raw)))]))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_spliced_headers_are_read_as_the_official_reader_does_or_refused(data: st.DataObject) -> None:
    raw = data.draw(st.sampled_from(SAMPLES))
    length = int.from_bytes(raw[:8], "little")
    text, rest = raw[8 : 8 + length], raw[8 + length :]
    place = data.draw(st.integers(0, len(text)))
    gone = data.draw(st.integers(0, 3))
    text = text[:place] + data.draw(st.sampled_from(TOKENS)) + text[place + gone :]
    equal_or_refused(struct.pack("<Q", len(text)) + text + rest)


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F31"]),
        "shape": st.lists(st.one_of(st.integers(0, 4), st.sampled_from([2**32, 2**63, -1])), max_size=3),
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)).map(list),
    }
)


@settings(max_examples=400, deadline=None)
@given(header=st.dictionaries(st.sampled_from(["a", "b", "c"]), ENTRIES, max_size=3), data_bytes=st.integers(0, 16))
def test_invented_layouts_are_read_as_the_official_reader_does_or_refused(header: Any, data_bytes: int) -> None:
    equal_or_refused(file_of(header, data_bytes))


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=64))
def test_noise_is_refused(raw: bytes) -> None:
    equal_or_refused(raw)


def test_every_dtype_of_the_table_has_the_official_width() -> None:
    for dtype in DTYPES.values():
        raw = file_of({"a": {"dtype": dtype.name, "shape": [8], "data_offsets": [0, dtype.bits]}}, dtype.bits)
        assert official(raw) == ours(raw)


def test_read_header_over_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"layer.{number}.weight": torch.zeros(2) for number in range(4000)}
    (tmp_path / "large.safetensors").write_bytes(save(many))
    (tmp_path / "small.safetensors").write_bytes(save({"a": torch.zeros(300_000)}))
    store = open_store(str(tmp_path))
    real, reads = store.read, []

    def read(path: str, start: int = 0, stop: int | None = None) -> bytes:
        reads.append((path, start, stop))
        return real(path, start, stop)

    monkeypatch.setattr(store, "read", read)
    large, small = read_header(store, "large.safetensors"), read_header(store, "small.safetensors")
    assert len(large.tensors) == 4000
    assert large.header_bytes > 256 << 10
    assert large.version == store.stat("large.safetensors").version
    assert small.tensors[0].file == "small.safetensors"
    assert reads == [
        ("large.safetensors", 0, 256 << 10),
        ("large.safetensors", 256 << 10, large.header_bytes),
        ("small.safetensors", 0, 256 << 10),
    ]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: does not exist"):
        read_header(open_store(str(tmp_path)), "gone.safetensors")
