"""Unfinished uploads on a real S3 server: listed, removed, swept, and left by a process that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from enum import Enum

import pytest
import s3fs

from pipeline.errors import StorageError
from pipeline.storage import Leftover, Store, counters, open_store
from pipeline.storage import s3 as s3_module
from pipeline.storage import s3_writer as writer_module
from tests.cluster.gate import wait_until
from tests.support.fault_proxy import Fault, FaultProxy, Rule, fault_proxy
from tests.support.s3 import prefix

# What servers take for a part that is not the last.
PART_BYTES = 5 << 20
# Writes one part and a half, says so once the part is there, and waits for its end.
WRITER = """
import sys, time
from pipeline.storage import counters, open_store, s3_writer
s3_writer._PART_BYTES = {part_bytes}
writer = open_store(sys.argv[1]).open_writer("model.safetensors")
writer.write(bytes(3 * {part_bytes} // 2))
while counters().written_bytes < {part_bytes}:
    time.sleep(0.01)
print("written", flush=True)
time.sleep(600)
"""


@pytest.fixture
def url(s3_url: str) -> str:
    return prefix(s3_url)


def begin(url: str, path: str) -> str:
    """Begin an upload as another client would and return its id."""
    bucket, _, key = f"{url}/{path}".removeprefix("s3://").partition("/")
    return str(s3fs.S3FileSystem().call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"])


def handles(store: Store) -> list[str]:
    return sorted(found.handle for found in store.leftovers())


def test_uploads_below_the_prefix_are_listed_and_removed_one_by_one(url: str) -> None:
    store = open_store(url)
    store.write("kept", b"1")
    elsewhere = begin(f"{url}-other", "a")
    before_s = time.time()
    wanted = {begin(url, path): path for path in ("a", "sub/b", "sub/b", "ünïcode [1]*")}
    found = store.leftovers()
    assert {item.handle: item.path for item in found} == wanted
    assert [item.path for item in found] == sorted(wanted.values())
    for item in found:
        assert (item.kind, item.size_bytes) == ("upload", 0)
        assert item.started_s is not None
        assert abs(item.started_s - before_s) < 60
    store.remove_leftover(found[1])
    store.remove_leftover(found[1])
    assert handles(store) == sorted(item.handle for item in found if item != found[1])
    assert handles(open_store(f"{url}/sub")) == [found[2].handle]
    assert store.list() == ("kept",)
    assert handles(open_store(f"{url}-other")) == [elsewhere]


def test_more_uploads_than_one_page_holds(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_PAGE_UPLOADS", 2)
    wanted = sorted(begin(url, f"{number % 3}") for number in range(9))
    store = open_store(url)
    assert handles(store) == wanted
    assert store.sweep() == 9
    assert store.leftovers() == ()
    assert store.sweep() == 0


def test_an_upload_under_way_is_listed_with_its_parts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_PART_BYTES", PART_BYTES)
    store = open_store(url)
    with store.open_writer("a") as writer:
        writer.write(bytes(PART_BYTES - 1))
        assert store.leftovers() == (), "nothing was sent yet"
        before = counters().written_bytes
        writer.write(bytes(PART_BYTES + 2))
        wait_until(lambda: counters().written_bytes == before + 2 * PART_BYTES, "both parts to arrive")
        (found,) = store.leftovers()
        assert (found.path, found.size_bytes) == ("a", 2 * PART_BYTES)
        writer.commit()
    assert store.leftovers() == ()
    assert store.stat("a").size_bytes == 2 * PART_BYTES + 1


def test_a_swept_upload_cannot_be_published(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_PART_BYTES", PART_BYTES)
    store = open_store(url)
    writer = store.open_writer("a")
    writer.write(bytes(PART_BYTES))
    assert store.sweep() == 1
    with pytest.raises(StorageError, match=f"{url}/a: cannot write: .*something removed the unfinished upload"):
        writer.commit()
    assert store.list() == ()
    assert store.leftovers() == ()


@pytest.mark.parametrize("sweeping", [False, True])
def test_a_process_killed_during_an_upload(url: str, sweeping: bool) -> None:
    store = open_store(url)
    begin_s = time.time()
    code = WRITER.format(part_bytes=PART_BYTES)
    with subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
        finally:
            os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (found,) = store.leftovers()
    assert (found.kind, found.path, found.size_bytes) == ("upload", "model.safetensors", PART_BYTES)
    assert found.started_s is not None
    # The server counts whole seconds.
    assert begin_s - 1 <= found.started_s <= time.time()
    assert store.list() == ()
    assert not store.exists("model.safetensors")
    if sweeping:
        assert store.sweep() == 1
    else:
        store.remove_leftover(found)
    assert store.leftovers() == ()
    assert store.list() == ()


@pytest.fixture(scope="module")
def proxy(s3_url: str) -> Iterator[FaultProxy]:
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        yield running


def test_a_server_that_hides_its_uploads_does_not_end_a_merge(
    url: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(url, {"endpoint_url": proxy.url})
    begin(url, "a")
    proxy.start(Rule(fault=Fault.MISSING, part="?uploads", times=None))
    try:
        assert store.sweep() == 0
        with pytest.raises(StorageError):
            store.leftovers()
    finally:
        proxy.stop()
    assert "unfinished uploads stay" in caplog.text


class Answer(Enum):
    """More answers that are given in the server's place."""

    UNKNOWN = (501, "NotImplemented")
    GONE = (404, "NoSuchUpload")
    DENIED = (403, "AccessDenied")


def test_a_server_without_such_a_list_has_no_leftovers(url: str, proxy: FaultProxy) -> None:
    store = open_store(url, {"endpoint_url": proxy.url})
    begin(url, "a")
    proxy.start(Rule(fault=Answer.UNKNOWN, part="?uploads", times=None))  # type: ignore[arg-type]
    try:
        assert store.leftovers() == ()
        assert store.sweep() == 0
    finally:
        proxy.stop()


@pytest.mark.parametrize("answer", [Answer.GONE, Answer.DENIED])
def test_parts_that_cannot_be_asked_for(url: str, proxy: FaultProxy, answer: Answer) -> None:
    """The upload ended after it was listed; or parts need a permission that this user lacks."""
    store = open_store(url, {"endpoint_url": proxy.url})
    handle = begin(url, "a")
    proxy.start(Rule(fault=answer, part="uploadId", times=None))  # type: ignore[arg-type]
    try:
        found = [(item.handle, item.size_bytes) for item in store.leftovers()]
    finally:
        proxy.stop()
    assert found == ([] if answer is Answer.GONE else [(handle, None)])


def test_an_upload_means_nothing_to_a_store_without_them() -> None:
    store = open_store("memory://nowhere")
    store.remove_leftover(Leftover(kind="upload", path="a", handle="x"))
    assert store.leftovers() == ()


def test_sweep_takes_what_a_merge_writes_and_no_other_upload(url: str) -> None:
    """The output may be a whole bucket, with other outputs and other programs' objects in it."""
    mine = [begin(url, path) for path in ("model.safetensors", "_geomerge/measured/a")]
    theirs = [begin(url, path) for path in ("other/model.safetensors", "other/_geomerge/a", "a//b", "logs/x?y")]
    store = open_store(url)
    assert handles(store) == sorted(mine + theirs)
    assert store.sweep() == 2
    assert handles(store) == sorted(theirs)
