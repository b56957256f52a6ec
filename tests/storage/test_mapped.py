"""Maps of local files: the bytes, what is not looked at, and what happens to a file that is cut short meanwhile."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.storage.bus_errors import bus_errors
from pipeline.storage.mapped import Look, MappedFile, faults
from pipeline.storage.page_cache import cached_share

pytestmark = pytest.mark.skipif(bus_errors() is None, reason="files are only mapped on 64-bit Linux")

SIZE = 5 * mmap.PAGESIZE + 24


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


def look(file: MappedFile, start: int, stop: int) -> Look:
    found = file.look(start, stop)
    assert found is not None
    return found


def test_shows_what_the_file_holds(path: Path) -> None:
    file, data = MappedFile(str(path), step_bytes=mmap.PAGESIZE), path.read_bytes()
    for start, stop in ((0, SIZE), (8, 17), (mmap.PAGESIZE - 8, 3 * mmap.PAGESIZE + 1), (SIZE - 24, SIZE)):
        seen = look(file, start, stop)
        assert seen.bytes.tobytes() == data[start:stop]
        assert not seen.bytes.flags.writeable
        seen.let_go()
    file.close()
    assert file.look(0, 8) is None


def test_what_others_let_go_can_still_be_seen(path: Path) -> None:
    file, data = MappedFile(str(path), step_bytes=1), path.read_bytes()
    first, second = look(file, 0, SIZE), look(file, 0, SIZE)
    second.let_go()
    assert first.bytes.tobytes() == data
    # It is closed when the last look has ended.
    file.close()
    assert file.look(0, 8) is None
    before = faults()
    os.truncate(path, 0)
    assert not first.bytes.any()
    assert faults() > before
    first.let_go()


def test_does_not_show_what_a_loop_could_not_read_in_place(path: Path) -> None:
    file = MappedFile(str(path), step_bytes=mmap.PAGESIZE)
    assert file.look(4, 12) is None
    assert file.look(0, SIZE + 1) is None
    assert file.look(8, 8) is None


def test_an_empty_file_cannot_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(OSError, match="empty"):
        MappedFile(str(path), step_bytes=mmap.PAGESIZE)


def test_what_lies_on_the_disk_alone_is_left_to_reads(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(str(path), [(0, SIZE)]):
        pytest.skip("this filesystem keeps its files in memory")
    mapped = MappedFile(str(path), step_bytes=mmap.PAGESIZE)
    assert mapped.look(0, SIZE) is None
    path.read_bytes()
    # What was asked holds for the rest of a part; a new pass asks again.
    assert mapped.look(8, SIZE) is None
    assert MappedFile(str(path), step_bytes=mmap.PAGESIZE).look(0, SIZE) is not None


def test_files_in_memory_are_shown(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("there is no /dev/shm to write to")
    with tempfile.NamedTemporaryFile(dir=shared) as file:
        file.write(b"x" * SIZE)
        file.flush()
        assert look(MappedFile(file.name, step_bytes=1), 0, SIZE).bytes.tobytes() == b"x" * SIZE


@pytest.mark.parametrize("order", ["forward", "shuffled"])
def test_pages_leave_the_process_in_steps(tmp_path: Path, order: str) -> None:
    size, step, length, around = 64 << 20, 4 << 20, 1 << 20, 2 << 20
    path = tmp_path / "large"
    path.write_bytes(bytes(size))
    file, held = MappedFile(str(path), step_bytes=step), []
    starts = np.arange(0, size, length)
    if order == "shuffled":
        np.random.default_rng(0).shuffle(starts)
    for start in starts.tolist():
        seen = look(file, start, start + length)
        assert not seen.bytes.any()
        held.append(_resident_bytes(path))
        seen.let_go()
    assert length <= max(held)
    # Of a page around each part that is looked at all may be mapped.
    assert max(held) <= (step + length + around if order == "forward" else (step // length + 1) * around + around)
    file.close()
    del file, seen
    assert not _resident_bytes(path)


def _resident_bytes(path: Path) -> int:
    """Return how much of a file is mapped and in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(text.split()[1]) for text in lines if text.startswith("Rss:")) * 1024
    return 0


def test_zeros_stand_for_what_was_cut_off_and_are_told(path: Path) -> None:
    file, before, data = MappedFile(str(path), step_bytes=mmap.PAGESIZE), faults(), path.read_bytes()
    seen = look(file, 0, SIZE).bytes
    os.truncate(path, 2 * mmap.PAGESIZE)
    assert seen[: 2 * mmap.PAGESIZE].tobytes() == data[: 2 * mmap.PAGESIZE]
    assert faults() == before
    assert not seen[2 * mmap.PAGESIZE :].any()
    assert faults() == before + 4


_FOREIGN = """
import faulthandler, mmap, os, sys
if sys.argv[2] == "told":
    faulthandler.enable()
from pipeline.storage.mapped import MappedFile
MappedFile(sys.argv[1] + ".ours", step_bytes=4096)
with open(sys.argv[1], "r+b") as file:
    view = mmap.mmap(file.fileno(), 0)
    os.truncate(sys.argv[1], 0)
    print("cut", flush=True)
    view[0]
"""


@pytest.mark.parametrize("who", ["nobody", "told"])
def test_the_faults_of_others_go_where_they_went(path: Path, who: str) -> None:
    Path(f"{path}.ours").write_bytes(b"ours")
    command = [sys.executable, "-c", _FOREIGN, str(path), who]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout == "cut\n"
    assert ran.returncode == -signal.SIGBUS
    assert ("Bus error" in ran.stderr) == (who == "told")


_REPLACED = """
import faulthandler, os, sys
from pipeline.storage.mapped import MappedFile, faults
first = MappedFile(sys.argv[1], step_bytes=4096)
faulthandler.enable()
second = MappedFile(sys.argv[1], step_bytes=4096)
seen = [file.look(0, 4096).bytes for file in (first, second)]
os.truncate(sys.argv[1], 0)
assert not any(view.any() for view in seen)
print(faults())
"""


def test_comes_back_where_another_handler_took_its_place(path: Path) -> None:
    command = [sys.executable, "-c", _REPLACED, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("2\n", "")


def test_registers_again_where_others_left() -> None:
    errors = bus_errors()
    assert errors is not None
    ends = [errors.register(1 << 40, 4096) for _ in range(100)]
    for end in ends:
        end()
    # Far more than there is room for at a time.
    for _ in range(10_000):
        errors.register(1 << 40, 4096)()
