from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage import MissingObject, Store, open_store
from pipeline.storage import descriptors as descriptors_module
from pipeline.storage.local import LocalStore

from .contract import ExclusiveContract, StoreContract


class TestLocalStore(StoreContract, ExclusiveContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: open_store(str(tmp_path / "not" / "there yet"))


def everything_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.rglob("*") if entry.is_file())


def open_descriptors(folder: Path) -> int:
    """How many files of a folder this process holds open; what other tests left for the collector does not count."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own is gone by now
            targets.append(str(link.readlink()))
    return sum(target.startswith(str(folder)) for target in targets)


def test_temporary_names_are_hidden_beside_the_target_and_unlisted(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first, second = store.open_writer("sub/m"), store.open_writer("sub/m")
    names = everything_in(tmp_path / "sub")
    assert len(names) == 2
    assert all(name.startswith(f".m.{os.getpid()}-") and name.endswith(".part") for name in names)
    assert store.list() == ()
    first.abort()
    second.commit()
    assert everything_in(tmp_path) == ["m"]


def test_files_of_others_that_look_similar_are_listed(tmp_path: Path) -> None:
    for name in ("download.part", ".cache.part", ".x.12-34.part"):
        (tmp_path / name).write_bytes(b"")
    assert LocalStore(tmp_path).list() == (".cache.part", ".x.12-34.part", "download.part")


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_new_files_have_the_mode_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        LocalStore(tmp_path).write("a", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_commit_makes_file_then_name_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, steps = LocalStore(tmp_path), []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        steps.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        real_sync(descriptor)

    def replace(old: str, new: str) -> None:
        steps.append("rename")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    store.write("a", b"1")
    assert steps == ["file", "rename", "folder"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, r"cannot write: No space left on device \(the disk is full: free space"),
        (errno.EDQUOT, r"the disk quota is used up"),
        (errno.EIO, r"the disk or network mount failed"),
    ],
)
@pytest.mark.parametrize("step", ["write", "fsync"])
def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str, step: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    before = open_descriptors(tmp_path)
    with pytest.raises(StorageError, match=words) as caught:
        LocalStore(tmp_path).write("folder/a", b"1")
    assert str(tmp_path / "folder" / "a") in str(caught.value)
    assert everything_in(tmp_path) == []
    assert open_descriptors(tmp_path) == before


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    LocalStore(tmp_path).write("a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    real_pread, real_preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda descriptor, count, offset: real_pread(descriptor, min(count, 3), offset))
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: real_preadv(descriptor, [views[0][:3]], offset))
    assert LocalStore(tmp_path).read("a", 1, 9) == b"12345678"


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("a", b"old")
    assert store.read("a") == b"old"
    (tmp_path / "b").write_bytes(b"new!")
    (tmp_path / "b").replace(tmp_path / "a")
    assert store.read("a") == b"new!"
    (tmp_path / "a").unlink()
    with pytest.raises(MissingObject):
        store.read("a")


def test_few_descriptors_stay_open_and_close_releases_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors_module, "_MOST_OPEN", 4)
    store = LocalStore(tmp_path)
    for number in range(12):
        store.write(f"{number}", b"x")
    before = open_descriptors(tmp_path)
    for _ in range(2):
        assert [store.read(f"{number}") for number in range(12)] == [b"x"] * 12
        assert open_descriptors(tmp_path) == before + 4
    store.close()
    assert open_descriptors(tmp_path) == before


def test_closing_during_a_read_lets_it_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    store, started, go_on, results = LocalStore(tmp_path), threading.Event(), threading.Event(), []
    real = os.pread

    def slow(descriptor: int, count: int, offset: int) -> bytes:
        started.set()
        assert go_on.wait(10)
        return real(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", slow)
    before = open_descriptors(tmp_path)
    reader = threading.Thread(target=lambda: results.append(store.read("a")))
    reader.start()
    assert started.wait(10)
    store.close()
    go_on.set()
    reader.join(10)
    assert results == [b"12345"]
    assert open_descriptors(tmp_path) == before


def test_links_to_files_count_and_dangling_ones_do_not(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model").symlink_to("../blobs/1")
    (tmp_path / "snapshot" / "gone").symlink_to("../blobs/2")
    store = LocalStore(tmp_path / "snapshot")
    assert store.list() == ("model",)
    assert store.read("model") == b"weights"
    assert not store.exists("gone")


def test_a_pipe_is_no_object_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    store = LocalStore(tmp_path)
    assert store.list() == ()
    with pytest.raises(MissingObject):
        store.read("pipe")


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    store = LocalStore(tmp_path)
    assert store.list("a") == ()
    assert not store.exists("a/b")
    store.delete("a/b")
    with pytest.raises(StorageError, match="a/b: cannot write: Not a directory"):
        store.write("a/b", b"")


def test_free_bytes_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    free = LocalStore(tmp_path / "not" / "yet").free_bytes()
    assert free is not None
    assert 0 < free <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    assert not (tmp_path / "not").exists()


def test_probe_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"file/sub: cannot be written: .*choose a folder that you may write"):
        LocalStore(tmp_path / "file" / "sub").probe_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_permissions_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "a").chmod(0)
    with pytest.raises(StorageError, match=r"cannot read: Permission denied \(check the permissions\)"):
        LocalStore(tmp_path).read("a")


def test_permission_errors_are_not_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    store = LocalStore(tmp_path)
    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(Path, "stat", refuse)
    for act in (store.list, lambda: store.exists("a")):
        with pytest.raises(StorageError, match=r"cannot read: Permission denied \(check the permissions\)") as caught:
            act()
        assert not isinstance(caught.value, MissingObject)


def test_a_killed_writer_leaves_nothing_visible(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from pipeline.storage.local import LocalStore\n"
        "writer = LocalStore(Path(sys.argv[1])).open_writer('a'); writer.write(b'x' * 100); os.kill(os.getpid(), 9)"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert finished.returncode == -9
    assert len(everything_in(tmp_path)) == 1
    assert LocalStore(tmp_path).list() == ()


def test_sweep_removes_what_dead_writers_left_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    name = f".model.safetensors.{dead.pid}-0123456789abcdef.part"
    mine = [tmp_path / name, tmp_path / "_geomerge" / "measured" / name]
    # Of another merge, whose output lies in this one's, and of others.
    theirs = [tmp_path / "sub" / name, tmp_path / "sub" / "_geomerge" / name, tmp_path / "_geomerge_batch" / name]
    alive = tmp_path / f".model.safetensors.{os.getppid()}-0123456789abcdef.part"
    other = tmp_path / ".hidden.part"
    kept = [*theirs, alive, other, tmp_path / "kept"]
    for path in (*mine, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bytes")
    assert open_store(str(tmp_path)).sweep() == 2
    assert not any(path.exists() for path in mine)
    assert all(path.exists() for path in kept)


def test_leftovers_are_the_temporary_files_of_all_writers(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write("kept", b"1")
    with store.open_writer("sub/model") as writer:
        before_s = time.time()
        writer.write(b"x" * 100)
        (found,) = store.leftovers()
        assert (found.kind, found.size_bytes, found.handle) == ("temporary", 100, "")
        assert found.path.startswith("sub/.model.")
        assert found.started_s is not None
        # Clocks of filesystems are coarser than the system's.
        assert before_s - 1 <= found.started_s <= time.time() + 1
        assert store.sweep() == 0, "it is being written"
        assert store.leftovers() == (found,)
        store.remove_leftover(found)
        assert store.leftovers() == ()
        store.remove_leftover(found)
        with pytest.raises(StorageError, match="cannot write"):
            writer.commit()
    assert store.list() == ("kept",)


@pytest.mark.parametrize("exists", [False, True])
def test_create_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    store = LocalStore(tmp_path)
    if exists:
        store.write("a", b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert store.create("a", b"new") is not exists
    assert store.read("a") == (b"old" if exists else b"new")
    assert everything_in(tmp_path) == ["a"]


def test_create_knows_its_own_link_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network filesystem does it, loses the reply, asks again and hears that the name is taken."""
    real = os.link

    def lost(source: str, target: str) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", lost)
    assert LocalStore(tmp_path).create("a", b"new") is True
    assert LocalStore(tmp_path).read("a") == b"new"


def test_create_fails_for_a_folder_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match="a: cannot write: Is a directory"):
        LocalStore(tmp_path).create("a", b"new")
    assert everything_in(tmp_path) == []
