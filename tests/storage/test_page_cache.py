"""What Linux says about pages of files, against files of this test's own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.storage import page_cache
from pipeline.storage.page_cache import cached_share, page_cache_bytes, start_write_back

PAGE = os.sysconf("SC_PAGE_SIZE")

pytestmark = pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="asks Linux")


def written(path: Path, pages: int) -> Path:
    """A file whose pages are on the disk and in memory."""
    with path.open("wb") as file:
        file.write(b"x" * (pages * PAGE))
        file.flush()
        os.fsync(file.fileno())
    return path


def test_what_was_written_is_in_memory_until_it_is_let_go_of(tmp_path: Path) -> None:
    path = written(tmp_path / "file", 64)
    assert cached_share(str(path), [(0, 64 * PAGE)]) == 1.0
    assert cached_share(str(path), [(5, 6), (63 * PAGE, 64 * PAGE)]) == 1.0
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_share(str(path), [(0, 64 * PAGE)]) > 0.0:
            pytest.skip("this filesystem keeps its pages")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 1, 10 * PAGE)
    # The page that was read, at least, and a share of all the ranges together.
    assert cached_share(str(path), [(10 * PAGE, 11 * PAGE)]) == 1.0
    assert 0.0 < cached_share(str(path), [(10 * PAGE, 11 * PAGE), (40 * PAGE, 64 * PAGE)]) < 1.0


def test_what_is_not_known_counts_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "file", 1)
    assert cached_share(str(tmp_path / "none"), [(0, 1)]) == 1.0
    assert cached_share(str(path), []) == 1.0
    assert cached_share(str(path), [(5 * PAGE, 6 * PAGE)]) == 1.0
    monkeypatch.setattr(page_cache, "system_function", lambda *_, **__: None)
    assert cached_share(str(path), [(0, 1)]) == 1.0


def test_the_memory_for_pages_is_no_more_than_the_machine_has() -> None:
    assert 0 < page_cache_bytes() <= os.sysconf("SC_PHYS_PAGES") * PAGE


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "4096\n", "memory.max": "99999\n"}),
        ("9:cpu:/x\n4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "4096\n"}),
        # In a container the path may be that of outside.
        ("4:memory:/docker/0a1b\n", {"memory/memory.limit_in_bytes": "4096\n"}),
    ],
)
def test_a_control_group_limits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str]
) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    limits = {"": (str(tmp_path), "memory.max"), "memory": (str(tmp_path / "memory"), "memory.limit_in_bytes")}
    monkeypatch.setattr(page_cache, "_LIMITS", limits)
    real = Path.read_text

    def read_text(path: Path, *positional: object) -> str:
        return groups if str(path) == "/proc/self/cgroup" else real(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert page_cache_bytes() == 4096


def test_nothing_is_known_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", gone)
    assert page_cache_bytes() == 0


def test_write_back_leaves_the_bytes_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"y" * (8 * PAGE))
        file.flush()
        start_write_back(file.fileno(), 0, 4 * PAGE)
        start_write_back(file.fileno(), 4 * PAGE, 8 * PAGE)
    assert path.read_bytes() == b"y" * (8 * PAGE)


def test_a_pipe_has_no_write_back_and_a_closed_file_is_an_error() -> None:
    reading, writing = os.pipe()
    start_write_back(writing, 0, 1)
    os.close(reading)
    os.close(writing)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        start_write_back(writing, 0, 1)
    assert caught.value.errno == errno.EBADF


def test_write_back_is_left_out_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "system_function", lambda *_, **__: None)
    start_write_back(-1, 0, 1)
