"""A file to try a disk with, and that nothing of it is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.storage import scratch
from pipeline.storage.scratch import ScratchFile, open_scratch

pytestmark = pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")


def test_what_is_written_has_no_name_and_the_folder_is_as_it_was(tmp_path: Path) -> None:
    before = tmp_path.stat().st_mtime_ns
    for folder in (tmp_path, tmp_path / "not" / "yet"):
        found = open_scratch(str(folder))
        assert found is not None
        with found:
            found.write(b"x" * 1000)
            found.write(memoryview(b"y" * 1000))
            found.write(b"")
            found.sync()
            assert list(tmp_path.iterdir()) == []
        assert not found.failed
    assert list(tmp_path.iterdir()) == []
    assert tmp_path.stat().st_mtime_ns == before


def test_it_begins_again_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(scratch, "_MOST_BYTES", 100)
    monkeypatch.setattr(scratch, "_WRITE_BACK_BYTES", 40)
    monkeypatch.setattr(scratch, "start_write_back", lambda _, start, stop: asked.append((start, stop)))
    path = tmp_path / "file"
    with ScratchFile(os.open(path, os.O_CREAT | os.O_WRONLY)) as found:
        for number in range(7):
            found.write(bytes([number]) * 30)
    assert path.read_bytes() == b"\4" * 30 + b"\5" * 30 + b"\6" * 30 + b"\3" * 30
    assert asked == [(0, 60), (60, 120), (0, 60)]


def test_a_disk_that_fails_is_said_and_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_scratch(str(tmp_path))
    assert found is not None

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with found:
        found.write(b"x")
        found.write(b"x")
    assert found.failed
    other = open_scratch(str(tmp_path))
    assert other is not None
    monkeypatch.setattr(os, "fsync", full)
    with other:
        other.sync()
    assert other.failed


def test_there_is_none_where_it_cannot_be_opened_or_the_disk_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> int:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        patch.setattr(os, "open", refuse)
        assert open_scratch(str(tmp_path)) is None
    monkeypatch.setattr(scratch, "_MOST_BYTES", 1 << 62)
    assert open_scratch(str(tmp_path)) is None
