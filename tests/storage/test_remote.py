from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import fsspec.asyn
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from pipeline.errors import SettingsError, StorageError
from pipeline.storage import MissingObject, Store, counters, open_store
from pipeline.storage import remote as remote_module
from pipeline.storage import remote_writer as writer_module
from pipeline.storage import waiting as waiting_module
from pipeline.storage.remote import FsspecStore
from pipeline.storage.retrying import RetryPolicy

from .contract import MEGABYTE, StoreContract

QUICK = RetryPolicy(first_pause_s=0.001, longest_pause_s=0.002)


@pytest.fixture
def memory_url() -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}/prefix"
    yield url
    fs = MemoryFileSystem()
    for path in fs.find(url):
        fs.rm_file(path)


class TestFsspecStore(StoreContract):
    @pytest.fixture
    def make_store(self, memory_url: str) -> Callable[[], Store]:
        return lambda: open_store(memory_url)


class DeferredFile(AbstractBufferedFile):  # type: ignore[misc]
    """A multipart upload: parts are kept aside until commit, as the files of s3fs and gcsfs do it."""

    def _initiate_upload(self) -> None:
        self.parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self.parts.append(self.buffer.getvalue())
        if final and self.autocommit:
            self.commit()
        return True

    def commit(self) -> None:
        self.fs.pipe_file(self.path, b"".join(self.parts))

    def discard(self) -> None:
        self.buffer = None


class Deferring(MemoryFileSystem):  # type: ignore[misc]
    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb" and not options.get("autocommit", True):
            return DeferredFile(self, path, mode, **options)
        return super()._open(path, mode, **options)


class TestDeferredCommit(StoreContract):
    """The path of S3 and GCS."""

    @pytest.fixture
    def make_store(self, memory_url: str) -> Callable[[], Store]:
        def make() -> Store:
            store = FsspecStore(memory_url, {})
            store._backend.fs, store._deferred = Deferring(skip_instance_cache=True), True
            return store

        return make


class Faulty(MemoryFileSystem):  # type: ignore[misc]
    """Raises the next of `faults` before it does what it is asked for."""

    faults: list[BaseException]
    calls: int

    def _fail(self) -> None:
        self.calls += 1
        if self.faults:
            raise self.faults.pop(0)

    def cat_file(self, path: str, **options: Any) -> bytes:
        self._fail()
        return super().cat_file(path, **options)  # type: ignore[no-any-return]

    def info(self, path: str, **options: Any) -> Any:
        self._fail()
        return super().info(path, **options)

    def cp_file(self, one: str, two: str, **options: Any) -> None:
        self._fail()
        super().cp_file(one, two, **options)


def faulty_store(url: str, *faults: BaseException, options: dict[str, object] | None = None) -> tuple[Store, Faulty]:
    store = FsspecStore(url, options or {}, retry=QUICK)
    fs = Faulty(skip_instance_cache=True)
    fs.faults, fs.calls = list(faults), 0
    store._backend.fs = fs
    return store, fs


def test_reads_survive_passing_faults(memory_url: str) -> None:
    open_store(memory_url).write("a", b"12345")
    store, fs = faulty_store(memory_url, OSError(16, "busy"), aiohttp.ClientPayloadError("cut"))
    assert store.read("a", 1, 3) == b"23"
    assert fs.calls == 3


def test_a_store_that_is_waited_for_is_named_without_credentials(
    memory_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting_module, "_LONG_S", 0.0)
    open_store(memory_url).write("a", b"12345")
    faults = [OSError(16, f"busy with hunter22hunter22 ({number})") for number in (1, 2)]
    store, _ = faulty_store(memory_url, *faults, options={"secret": "hunter22hunter22"})
    assert store.read("a", 1, 3) == b"23"
    server = memory_url.removesuffix("/prefix")
    first, last = (record.getMessage() for record in caplog.records)
    assert first == f"waiting for {server} since 0 s: busy with *** (1) (OSError)"
    assert last == f"{server} answers again after 0 s"


@pytest.mark.parametrize("error", [TypeError("nonsense"), ValueError("nonsense"), AttributeError("nonsense")])
def test_wrong_options_show_before_the_first_answer(memory_url: str, error: Exception) -> None:
    open_store(memory_url).write("a", b"12345")
    store, fs = faulty_store(memory_url, error)
    with pytest.raises(SettingsError, match=r"prefix/a: cannot read: nonsense .*the storage options"):
        store.read("a", 0, 1)
    assert store.read("a", 0, 1) == b"1"
    fs.faults = [error]
    with pytest.raises(StorageError, match="prefix/a: cannot read: nonsense") as caught:
        store.read("a", 0, 1)
    assert caught.value.exit_code == 5, "it has been opened as it should be"


def test_whole_writes_are_repeated(memory_url: str) -> None:
    store, fs = faulty_store(memory_url, OSError(16, "busy"), OSError(16, "busy"))
    store.write("a", b"12345")
    assert fs.calls == 3
    assert open_store(memory_url).read("a") == b"12345"
    assert open_store(memory_url).list() == ("a",)


def test_a_failed_commit_is_an_error_and_leaves_nothing(memory_url: str) -> None:
    store, _ = faulty_store(memory_url, OSError(5, "i/o"))
    writer = store.open_writer("a")
    writer.write(b"1")
    with pytest.raises(StorageError, match=r"prefix/a: cannot write: i/o \(OSError\)"):
        writer.commit()
    assert MemoryFileSystem().find(memory_url) == []


def test_lasting_faults_name_url_cause_and_remedy(memory_url: str) -> None:
    store, fs = faulty_store(memory_url, PermissionError("Access Denied"))
    with pytest.raises(StorageError) as caught:
        store.read("a", 0, 1)
    words = "cannot read: Access Denied (PermissionError) (check the credentials and what they allow)"
    assert str(caught.value) == f"{memory_url}/a: {words}"
    assert fs.calls == 1


def test_exhausted_retries_name_the_last_cause(memory_url: str) -> None:
    store, fs = faulty_store(memory_url, *[TimeoutError() for _ in range(50)])
    with pytest.raises(StorageError, match=r"cannot read: no answer in time \(TimeoutError\) \(check the address"):
        store.stat("a")
    assert fs.calls == QUICK.attempts


def test_secrets_appear_neither_in_the_text_nor_in_the_chain(memory_url: str) -> None:
    options: dict[str, object] = {"secret": "hunter22hunter22"}
    leak = PermissionError("signature of hunter22hunter22 at https://u:pw@host/x?sig=abc refused")
    store, _ = faulty_store(memory_url, leak, options=options)
    with pytest.raises(StorageError) as caught:
        store.read("a", 0, 1)
    assert "signature of *** at https://host/x refused" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_ranges_beyond_the_end_as_s3_answers_them(memory_url: str) -> None:
    open_store(memory_url).write("a", b"12345")
    store, fs = faulty_store(memory_url, OSError(22, "The requested range is not satisfiable"))
    with pytest.raises(StorageError, match="wanted 4 bytes from offset 9, got 0"):
        store.read("a", 9, 13)
    assert fs.calls == 1


def test_a_server_that_ignores_ranges_is_refused(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, fs = faulty_store(memory_url)
    store.write("a", b"12345")
    monkeypatch.setattr(fs, "cat_file", lambda path, **_: b"12345")
    with pytest.raises(StorageError, match="the server ignores byte ranges"):
        store.read("a", 1, 3)


def test_a_size_that_nobody_knows_is_an_error(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, fs = faulty_store(memory_url)
    monkeypatch.setattr(fs, "info", lambda path, **_: {"type": "file", "size": None})
    with pytest.raises(StorageError, match="the server does not tell the size"):
        store.stat("a")


@pytest.mark.parametrize(
    ("info", "version"),
    [
        ({"ETag": '"abc"', "LastModified": "today", "size": 3}, '"abc"-3'),
        ({"generation": "7", "size": 3}, "7-3"),
        ({"LastModified": "today", "size": 3}, "today-3"),
    ],
)
def test_the_version_is_what_the_backend_offers(
    memory_url: str, monkeypatch: pytest.MonkeyPatch, info: dict[str, object], version: str
) -> None:
    store, fs = faulty_store(memory_url)
    monkeypatch.setattr(fs, "info", lambda path, **_: {"type": "file", **info})
    assert store.stat("a").version == version


def test_large_requests_are_split(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_REQUEST_BYTES", 1000)
    monkeypatch.setattr(writer_module, "_PART_BYTES", 700)
    store, fs = faulty_store(memory_url)
    store.write("a", MEGABYTE[:4096])
    fs.calls = 0
    assert store.read("a", 96, 4096) == MEGABYTE[96:4096]
    assert fs.calls == 4


def test_backends_without_an_operation_are_named(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, fs = faulty_store(memory_url)

    def lacking(*_: object, **__: object) -> None:
        raise RuntimeError("read-only")

    monkeypatch.setattr(fs, "open", lacking)
    with pytest.raises(StorageError, match=r"cannot write: read-only .*use a folder or an object store"):
        store.open_writer("a")


def test_a_hanging_request_is_given_up() -> None:
    class Hanging(fsspec.asyn.AsyncFileSystem):  # type: ignore[misc]
        async def _info(self, path: str, **_: object) -> object:
            import asyncio

            await asyncio.sleep(30)
            return None

    store = FsspecStore("memory://x", {}, retry=RetryPolicy(deadline_s=0.5, attempt_s=0.2, first_pause_s=0.01))
    store._backend.fs = Hanging(skip_instance_cache=True)
    begin = time.monotonic()
    with pytest.raises(StorageError, match="no answer in time"):
        store.stat("a")
    # The alternative is the thirty seconds of one attempt.
    assert time.monotonic() - begin < 15


def test_signed_http_urls_keep_their_signature_out_of_sight() -> None:
    store = FsspecStore("https://user:pa55word@host/models?sig=s1gnature", {})
    assert store.url == "https://host/models"
    assert store.location("a") == "https://host/models/a"
    assert store._backend.full("a") == "https://user:pa55word@host/models/a?sig=s1gnature"


def test_the_root_of_a_filesystem_is_a_store(memory_url: str) -> None:
    name = memory_url.removeprefix("memory://")
    open_store(memory_url).write("a", b"1")
    root = open_store("memory://")
    assert root.url == "memory://"
    assert f"{name}/a" in root.list()
    assert root.read(f"{name}/a") == b"1"
    assert root.location("x/y") == "memory://x/y"


def test_free_space_is_unknown_and_absence_is_an_answer(memory_url: str) -> None:
    store = open_store(memory_url)
    assert store.free_bytes() is None
    with pytest.raises(MissingObject, match="does not exist"):
        store.stat("a")


def test_s3_is_opened_with_bounded_timeouts() -> None:
    store = FsspecStore("s3://bucket/prefix", {"anon": True})
    assert store._backend.fs.config_kwargs["read_timeout"] == 30
    assert store._backend.fs.retries == 1
    assert store.location("a") == "s3://bucket/prefix/a"


def test_a_whole_object_is_one_request(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was longer when somebody looked at it, or shorter: the bytes are those of one version."""
    store, fs = faulty_store(memory_url)
    store.write("a", b"12345")
    for size_bytes in (3, 9):
        monkeypatch.setattr(fs, "info", lambda path, size=size_bytes, **_: {"type": "file", "size": size})
        before = counters().requests
        assert store.read("a") == b"12345"
        assert counters().requests == before + 1
