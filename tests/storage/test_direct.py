"""Ranges of S3 objects without s3fs in between: the bytes, and when s3fs is asked after all."""

from __future__ import annotations

import os
import random
import subprocess
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage import MissingObject, Store, counters, open_store
from pipeline.storage.backend import Backend
from pipeline.storage.direct import DirectReader
from pipeline.storage.remote import FsspecStore
from pipeline.storage.retrying import RetryPolicy
from pipeline.storage.s3 import S3Bucket
from tests.support.fault_proxy import STALL_S, Fault, FaultProxy, Rule, fault_proxy
from tests.support.s3 import prefix

DATA = random.Random(5).randbytes(3_000_000)
# Nobody listens there.
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def proxy(s3_url: str) -> Iterator[FaultProxy]:
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        yield running


@pytest.fixture(scope="module")
def url(s3_url: str) -> str:
    """A place with one object, whose name needs quoting."""
    place = prefix(s3_url)
    open_store(place).write("a b+ü", DATA)
    return place


@pytest.fixture
def by_s3fs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What s3fs was asked for."""
    asked: list[str] = []
    call = Backend.call

    def noted(self: Backend, verb: str, *positional: object, **words: object) -> object:
        asked.append(verb)
        return call(self, verb, *positional, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(Backend, "call", noted)
    return asked


def ranged(store: Store, start: int, *sizes: int) -> bytes:
    """Fill buffers of these sizes and return their bytes, one behind the other."""
    buffers = [bytearray(size) for size in sizes]
    store.read_into("a b+ü", start, *map(memoryview, buffers))
    return b"".join(buffers)


def impatient(url: str, options: Mapping[str, object]) -> FsspecStore:
    return FsspecStore(url, dict(options), retry=RetryPolicy(first_pause_s=0.001, longest_pause_s=0.002))


@pytest.mark.parametrize("sizes", [(1,), (2_500_000,), (5, 0, 1_000_000, 1, 77_777)])
def test_buffers_are_filled_by_one_request_without_s3fs(url: str, by_s3fs: list[str], sizes: tuple[int, ...]) -> None:
    store = open_store(url)
    before = counters()
    assert ranged(store, 123, *sizes) == DATA[123 : 123 + sum(sizes)]
    after = counters()
    assert by_s3fs == []
    assert (after.requests - before.requests, after.retries - before.retries) == (1, 0)
    assert after.read_bytes - before.read_bytes == sum(sizes)
    store.close()
    assert ranged(store, 0, 10) == DATA[:10]
    store.close()


def test_a_url_is_signed_once_and_by_the_fourth_version(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    signed: list[str] = []
    sign = S3Bucket.signed_url

    def noted(self: S3Bucket, full: str, seconds: float) -> str | None:
        found = sign(self, full, seconds)
        signed.append(str(found))
        return found

    monkeypatch.setattr(S3Bucket, "signed_url", noted)
    store = open_store(url)
    for start in range(5):
        assert ranged(store, start, 100) == DATA[start : start + 100]
    (one,) = signed
    assert urllib.parse.parse_qs(one.partition("?")[2])["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    store.close()


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.INTERNAL, Fault.RESET, Fault.SHORT, Fault.LOST_REPLY])
def test_what_passes_is_asked_again_by_s3fs(url: str, proxy: FaultProxy, by_s3fs: list[str], fault: Fault) -> None:
    store = open_store(url, {"endpoint_url": proxy.url})
    before = counters()
    rule = Rule(fault=fault)
    proxy.start(rule)
    assert ranged(store, 7, 1_000_000, 1_000_000) == DATA[7:2_000_007]
    assert rule.broken == 1
    assert by_s3fs == ["cat_file"]
    assert counters().retries - before.retries == 1
    assert ranged(store, 9, 100) == DATA[9:109]
    assert by_s3fs == ["cat_file"], "the next one goes the short way again"
    assert proxy.stop() == 3
    store.close()


def test_a_server_that_stalls_is_given_up(url: str, proxy: FaultProxy, by_s3fs: list[str]) -> None:
    store = open_store(url, {"endpoint_url": proxy.url, "config_kwargs": {"read_timeout": STALL_S / 5}})
    proxy.start(Rule(fault=Fault.STALL))
    assert ranged(store, 0, 2_000_000) == DATA[:2_000_000]
    proxy.stop()
    assert by_s3fs == ["cat_file"]
    store.close()


def test_replies_of_half_the_range(url: str, proxy: FaultProxy, by_s3fs: list[str]) -> None:
    """Whose length is true: a few are asked again, more are an error."""
    store = impatient(url, {"endpoint_url": proxy.url})
    proxy.start(Rule(fault=Fault.HALVED, times=3))
    assert ranged(store, 100, 800) == DATA[100:900]
    always = Rule(fault=Fault.HALVED, times=None)
    proxy.start(always)
    with pytest.raises(StorageError, match=r"wanted 800 bytes from offset 100, got 400 .the server sends less"):
        ranged(store, 100, 800)
    proxy.stop()
    assert always.broken == 4
    assert "cat_file" not in by_s3fs
    store.close()


def test_an_object_that_ends_and_one_that_is_not_there(url: str) -> None:
    store = open_store(url)
    with pytest.raises(StorageError, match=f"wanted 800 bytes from offset {len(DATA) - 5}, got 5 .the file is shorter"):
        ranged(store, len(DATA) - 5, 800)
    with pytest.raises(StorageError, match=f"wanted 800 bytes from offset {len(DATA) + 5}, got 0"):
        ranged(store, len(DATA) + 5, 800)
    before = counters()
    with pytest.raises(MissingObject, match="nothing: does not exist"):
        store.read_into("nothing", 0, memoryview(bytearray(5)))
    assert counters().requests == before.requests + 1
    store.close()


def test_a_server_that_takes_no_signed_urls_is_not_asked_for_ever(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def damaged(self: S3Bucket, full: str, seconds: float) -> str:
        asked.append(full)
        return str(self._fs.url(full)).replace("X-Amz-Signature=", "X-Amz-Signature=0")

    monkeypatch.setattr(S3Bucket, "signed_url", damaged)
    store = open_store(url)
    for start in range(6):
        assert ranged(store, start, 100) == DATA[start : start + 100]
    assert len(asked) == 3
    store.close()


@pytest.mark.parametrize(
    "options",
    [
        {"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256"}},
        {"requester_pays": True},
        {"config_kwargs": {"proxies": {"http": NOWHERE}}},
        {"client_kwargs": {"verify": False}},
    ],
)
def test_what_a_plain_request_cannot_do_is_left_to_s3fs(s3_url: str, options: dict[str, object]) -> None:
    store = FsspecStore(s3_url, options)
    assert store._backend.bucket is not None
    assert store._backend.bucket.signed_url("bucket/a", 10.0) is None


def test_a_proxy_of_the_environment_is_left_to_s3fs(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = FsspecStore(s3_url, {"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}})._backend.bucket
    assert bucket is not None
    assert bucket.signed_url("bucket/a", 10.0)
    monkeypatch.setenv("http_proxy", NOWHERE)
    assert bucket.signed_url("bucket/a", 10.0) is None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert bucket.signed_url("bucket/a", 10.0)


def test_certificates_are_checked_by_what_the_environment_or_an_option_names(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=of-the-test"]
    command += ["-keyout", str(tmp_path / "key.pem"), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    by_option = FsspecStore(s3_url, {"client_kwargs": {"verify": str(certificate)}})._backend.bucket
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    by_environment = FsspecStore(s3_url, {"default_fill_cache": False})._backend.bucket
    for bucket in (by_option, by_environment):
        assert bucket is not None
        assert bucket.signed_url("bucket/a", 10.0)
        (found,) = bucket.tls().get_ca_certs()
        assert found["subject"] == ((("commonName", "of-the-test"),),)


def test_other_backends_have_no_such_way() -> None:
    assert FsspecStore("memory://x", {})._backend.direct is None


@contextmanager
def counting_signer() -> Iterator[tuple[DirectReader, list[str]]]:
    """A reader whose signer raises what botocore raises without credentials."""
    asked: list[str] = []

    class Without:
        def signed_url(self, full: str, seconds: float) -> str:
            asked.append(full)
            raise OSError("Unable to locate credentials")

        def patience(self) -> object:
            raise AssertionError("nothing is asked")

        tls = patience

    reader = DirectReader(Without())  # type: ignore[arg-type]
    yield reader, asked
    reader.close()


def test_without_a_signature_nothing_is_asked() -> None:
    with counting_signer() as (reader, asked):
        assert reader.read_into("bucket/a", 0, [memoryview(bytearray(3))], 5.0) is None
        assert asked == ["bucket/a"]
