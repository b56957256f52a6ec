"""Files whose way to the disk begins while they grow."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage import local_writer, page_cache
from pipeline.storage.local import LocalStore


def test_write_back_begins_behind_the_writer_and_leaves_nothing_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(local_writer, "_WRITE_BACK_BYTES", 100)
    monkeypatch.setattr(local_writer, "start_write_back", lambda _, start, stop: asked.append((start, stop)))
    pieces = [bytes([number]) * size for number, size in enumerate((60, 60, 0, 99, 1, 250, 30))]
    with LocalStore(tmp_path).open_writer("a") as writer:
        for piece in pieces:
            writer.write(piece)
        writer.commit()
    assert (tmp_path / "a").read_bytes() == b"".join(pieces)
    assert asked == [(0, 120), (120, 220), (220, 470)]


def test_a_small_file_is_left_to_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(local_writer, "start_write_back", lambda *numbers: asked.append(numbers[1]))
    LocalStore(tmp_path).write("a", b"x" * 1000)
    assert asked == []


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_early_ends_the_write_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(local_writer, "_WRITE_BACK_BYTES", 1)
    monkeypatch.setattr(local_writer, "start_write_back", fail)
    with (
        pytest.raises(StorageError, match=f"cannot write: {os.strerror(code)}"),
        LocalStore(tmp_path).open_writer("a") as writer,
    ):
        writer.write(b"12")
    assert list(tmp_path.iterdir()) == []


def test_files_are_written_where_early_write_back_is_not_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        page_cache.ctypes.set_errno(errno.ENOSYS)
        return -1

    monkeypatch.setattr(local_writer, "_WRITE_BACK_BYTES", 1)
    for function in (refused, None):
        monkeypatch.setattr(page_cache, "system_function", lambda *_, found=function, **__: found)
        LocalStore(tmp_path).write("a", b"whole")
        assert (tmp_path / "a").read_bytes() == b"whole"
