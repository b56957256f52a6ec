"""Streamed objects through servers and networks that fail: every byte once, or an error and nothing."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import pytest

from pipeline.errors import StorageError
from pipeline.storage import Store, counters, open_store
from pipeline.storage import s3_writer as writer_module
from pipeline.storage.remote import FsspecStore
from pipeline.storage.retrying import RetryPolicy
from pipeline.storage.s3 import S3Bucket
from tests.cluster.gate import wait_until
from tests.support.fault_proxy import Fault, FaultProxy, Rule, fault_proxy
from tests.support.s3 import prefix

from .cutting_proxy import cutting_proxy

# What servers take for a part that is not the last.
PART_BYTES = 5 << 20
# Three parts, the last one short; no two pieces alike, so that a part sent twice or lost shows.
DATA = random.Random(7).randbytes(2 * PART_BYTES + 12_345)
# In pieces that end nowhere near a part's end.
PIECE_BYTES = 1_234_567


class Answer(Enum):
    """More answers that are given in the server's place."""

    NO_SUCH_UPLOAD = (404, "NoSuchUpload")
    NO_SUCH_BUCKET = (404, "NoSuchBucket")
    BAD_DIGEST = (400, "BadDigest")
    DENIED = (403, "AccessDenied")
    EXPIRED = (400, "ExpiredToken")
    NOT_IMPLEMENTED = (501, "NotImplemented")
    INVALID = (400, "InvalidArgument")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_PART_BYTES", PART_BYTES)


@pytest.fixture(scope="module")
def proxy(s3_url: str) -> Iterator[FaultProxy]:
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        yield running


@pytest.fixture
def url(s3_url: str) -> str:
    return prefix(s3_url)


def rule(fault: Fault | Answer, method: str, part: str, times: int | None = 1, after: int = 0) -> Rule:
    return Rule(fault=fault, method=method, part=part, times=times, after=after)  # type: ignore[arg-type]


@contextmanager
def broken(proxy: FaultProxy, *rules: Rule) -> Iterator[None]:
    """Break requests by rules, each of which has to come true as often as it says."""
    proxy.start(*rules)
    try:
        yield
    finally:
        proxy.stop()
    for each in rules:
        assert each.broken == each.times or (each.times is None and each.broken)


def stream(store: Store, path: str = "a") -> None:
    with store.open_writer(path) as writer:
        for start in range(0, len(DATA), PIECE_BYTES):
            writer.write(memoryview(DATA)[start : start + PIECE_BYTES])
        writer.commit()


def impatient(url: str, endpoint: str, attempts: int = 3) -> FsspecStore:
    """A store that gives up soon."""
    policy = RetryPolicy(attempts=attempts, first_pause_s=0.001, longest_pause_s=0.002)
    options = {"endpoint_url": endpoint, "config_kwargs": {"retries": {"max_attempts": 0}}}
    return FsspecStore(url, options, retry=policy)


PASSING = {
    "busy at one part": [rule(Fault.SLOW_DOWN, "PUT", "partNumber=2", times=8)],
    "failing at one part": [rule(Fault.INTERNAL, "PUT", "partNumber=2", times=8)],
    "busy at the last part": [rule(Fault.SLOW_DOWN, "PUT", "partNumber=3", times=8)],
    "damaged on the way up": [rule(Fault.FLIP_UPLOAD, "PUT", "partNumber=1", times=2)],
    "refused as damaged": [rule(Answer.BAD_DIGEST, "PUT", "partNumber=2", times=2)],
    "replies to parts lost": [rule(Fault.LOST_REPLY, "PUT", f"partNumber={number}") for number in (1, 2, 3)],
    "busy at the ends": [
        rule(Fault.SLOW_DOWN, "POST", "?uploads", times=4),
        rule(Fault.INTERNAL, "POST", "?uploadId", times=8),
    ],
    "reply to the completion lost": [rule(Fault.LOST_REPLY, "POST", "?uploadId", times=4)],
    "completed and forgotten": [
        rule(Fault.LOST_REPLY, "POST", "?uploadId"),
        rule(Answer.NO_SUCH_UPLOAD, "POST", "?uploadId"),
    ],
}


@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_costs_no_byte(url: str, proxy: FaultProxy, kind: str) -> None:
    # One kind as users have it; the others without its pauses.
    patient = open_store(url, {"endpoint_url": proxy.url})
    before = counters()
    with broken(proxy, *PASSING[kind]):
        stream(patient if kind == "busy at one part" else impatient(url, proxy.url, attempts=9))
    after = counters()
    store = open_store(url)
    assert store.read("a") == DATA
    assert store.list() == ("a",)
    assert store.leftovers() == ()
    assert after.written_bytes - before.written_bytes == len(DATA)
    # A lost or refused completion is found out by a question, which is no repetition.
    refused = sum(each.broken for each in PASSING[kind]) - (kind == "completed and forgotten")
    # The HTTP client repeats an idempotent request by itself, once, when a connection that it had kept turns out dead.
    unseen = 3 if kind == "replies to parts lost" else 0
    assert refused - unseen <= after.retries - before.retries <= refused
    # Three parts, the beginning and the end are what it takes without faults.
    assert after.requests - before.requests >= 5 + refused - unseen


def test_connections_reset_in_the_middle_of_a_part(url: str) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    with cutting_proxy(endpoint, b"partNumber=2", PART_BYTES // 2, times=8) as cutting:
        stream(impatient(url, cutting.url, attempts=9))
        assert cutting.cuts == 8
    store = open_store(url)
    assert store.read("a") == DATA
    assert store.leftovers() == ()


def test_a_beginning_whose_reply_is_lost_leaves_an_upload_that_sweep_finds(url: str, proxy: FaultProxy) -> None:
    with broken(proxy, rule(Fault.LOST_REPLY, "POST", "?uploads")):
        stream(open_store(url, {"endpoint_url": proxy.url}))
    store = open_store(url)
    assert store.read("a") == DATA
    (found,) = store.leftovers()
    assert (found.path, found.size_bytes) == ("a", 0)
    assert store.sweep() == 1
    assert store.leftovers() == ()


LASTING = {
    "busy at a part": (rule(Fault.SLOW_DOWN, "PUT", "partNumber=2", times=None), "overloaded or limits the rate"),
    "busy at the last part": (rule(Fault.SLOW_DOWN, "PUT", "partNumber=3", times=None), "overloaded or limits"),
    "busy at the beginning": (rule(Fault.INTERNAL, "POST", "?uploads", times=None), "run again"),
    "busy at the completion": (rule(Fault.INTERNAL, "POST", "?uploadId", times=None), "run again"),
    "always damaged": (rule(Fault.FLIP_UPLOAD, "PUT", "partNumber=2", times=None), "bytes are damaged on their way"),
    "denied": (rule(Answer.DENIED, "PUT", "partNumber=2"), "check the credentials and what they allow"),
    "expired": (rule(Answer.EXPIRED, "PUT", "partNumber=2"), "the credentials have expired: renew them"),
    "no bucket": (rule(Answer.NO_SUCH_BUCKET, "POST", "?uploads"), "there is no such bucket"),
    "removed by others": (rule(Answer.NO_SUCH_UPLOAD, "PUT", "partNumber=2"), "something removed the unfinished"),
    "never completed": (rule(Answer.NO_SUCH_UPLOAD, "POST", "?uploadId"), "something removed the unfinished upload"),
}


@pytest.mark.parametrize("kind", LASTING)
def test_what_stays_is_an_error_and_leaves_nothing(url: str, proxy: FaultProxy, kind: str) -> None:
    fault, words = LASTING[kind]
    open_store(url).write("a", b"the old one")
    with broken(proxy, fault), pytest.raises(StorageError, match=words) as caught:
        stream(impatient(url, proxy.url))
    assert str(caught.value).startswith(f"{url}/a: cannot write: ")
    # What nothing can mend is asked for once.
    assert fault.broken == (3 if fault.times is None else 1)
    store = open_store(url)
    assert store.read("a") == b"the old one"
    assert store.leftovers() == ()


def test_a_writer_that_failed_takes_nothing_more(url: str, proxy: FaultProxy) -> None:
    """The error of a part that is sent meanwhile is raised by a later call."""
    writer = impatient(url, proxy.url).open_writer("a")

    def write_on() -> None:
        for _ in range(200):
            writer.write(DATA[:PART_BYTES])

    with broken(proxy, rule(Fault.SLOW_DOWN, "PUT", "partNumber=1&", times=3)):
        with pytest.raises(StorageError, match="SlowDown"):
            write_on()
        with pytest.raises(StorageError, match="the writer is aborted"):
            writer.write(b"more")
        with pytest.raises(StorageError, match="the writer is aborted"):
            writer.commit()
    assert open_store(url).list() == ()


def test_parts_are_sent_while_the_next_one_grows_and_no_more_of_them_than_there_is_room_for(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, lock, under_way, most = threading.Event(), threading.Lock(), 0, 0
    sent = S3Bucket.call

    def held(self: S3Bucket, verb: str, seconds: float, **arguments: object) -> object:
        nonlocal under_way, most
        if verb != "upload_part":
            return sent(self, verb, seconds, **arguments)
        with lock:
            under_way += 1
            most = max(most, under_way)
        assert gate.wait(30)
        try:
            return sent(self, verb, seconds, **arguments)
        finally:
            with lock:
                under_way -= 1

    monkeypatch.setattr(S3Bucket, "call", held)
    monkeypatch.setattr(writer_module, "_SHORT_PARTS", 4)
    content = random.Random(8).randbytes(8 * PART_BYTES + 1)
    with open_store(url).open_writer("a") as writer:
        writer.write(content[: 3 * PART_BYTES + 7])
        wait_until(lambda: under_way >= 3, "three parts to be sent")
        gate.set()
        writer.write(content[3 * PART_BYTES + 7 :])
        writer.commit()
    assert most == 3
    assert open_store(url).read("a") == content
    # Four short parts, then two long ones and the rest, which the server shows in the ETag.
    assert open_store(url).stat("a").version.partition("-")[2].startswith("7")


def test_an_abort_lets_no_part_arrive_later(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()
    sent = S3Bucket.call

    def slow(self: S3Bucket, verb: str, seconds: float, **arguments: object) -> object:
        if verb == "upload_part":
            started.set()
            time.sleep(0.3)
        return sent(self, verb, seconds, **arguments)

    monkeypatch.setattr(S3Bucket, "call", slow)
    writer = open_store(url).open_writer("a")
    writer.write(DATA)
    assert started.wait(30)
    writer.abort()
    store = open_store(url)
    assert store.leftovers() == ()
    assert store.list() == ()


def test_an_object_of_others_is_not_taken_for_ones_own(url: str, proxy: FaultProxy) -> None:
    """The upload is gone, and another writer's object of this name and length is there."""
    open_store(url).write("a", DATA)
    with (
        broken(proxy, rule(Answer.NO_SUCH_UPLOAD, "POST", "?uploadId")),
        pytest.raises(StorageError, match="something removed"),
    ):
        stream(impatient(url, proxy.url))


@pytest.mark.parametrize("fault", [Fault.FLIP_UPLOAD, Answer.BAD_DIGEST, Fault.LOST_REPLY, Fault.SLOW_DOWN])
def test_whole_writes_are_repeated_too(url: str, proxy: FaultProxy, fault: Fault | Answer) -> None:
    with broken(proxy, rule(fault, "PUT", "/a", times=2)):
        impatient(url, proxy.url).write("a", DATA[:1000])
    assert open_store(url).read("a") == DATA[:1000]


class TestCreate:
    """Exclusive puts whose replies get lost."""

    @pytest.mark.parametrize("attempts", [0, 2])
    def test_its_own_object_is_known_again(self, url: str, proxy: FaultProxy, attempts: int) -> None:
        # Once with repetitions of ours, once with botocore's alone, of which nobody hears.
        store = impatient(url, proxy.url)
        if attempts:
            options = {"endpoint_url": proxy.url, "config_kwargs": {"retries": {"max_attempts": attempts}}}
            store = FsspecStore(url, options, retry=RetryPolicy(attempts=1))
        with broken(proxy, rule(Fault.LOST_REPLY, "PUT", "/a", times=2)):
            assert store.create("a", b"mine") is True
        assert open_store(url).read("a") == b"mine"

    def test_anothers_is_not(self, url: str, proxy: FaultProxy) -> None:
        """It comes between the look and the put, with the same bytes."""
        look = rule(Fault.MISSING, "HEAD", "/a")
        open_store(url).write("a", b"same")
        with broken(proxy, look, rule(Fault.SLOW_DOWN, "PUT", "/a")):
            assert impatient(url, proxy.url).create("a", b"same") is False

    def test_faults_that_stay_are_errors(self, url: str, proxy: FaultProxy) -> None:
        with (
            broken(proxy, rule(Fault.SLOW_DOWN, "PUT", "/a", times=None)),
            pytest.raises(StorageError, match="overloaded"),
        ):
            impatient(url, proxy.url).create("a", b"mine")
        assert open_store(url).list() == ()


class TestShortReplies:
    """A reply of half a range, whose length is true: only the length that was asked for tells."""

    def test_a_few_are_asked_again(self, url: str, proxy: FaultProxy) -> None:
        open_store(url).write("a", DATA[:1000])
        with broken(proxy, rule(Fault.HALVED, "GET", "/a", times=3)):
            assert open_store(url, {"endpoint_url": proxy.url}).read("a", 100, 900) == DATA[100:900]

    def test_more_are_an_error(self, url: str, proxy: FaultProxy) -> None:
        open_store(url).write("a", DATA[:1000])
        always = rule(Fault.HALVED, "GET", "/a", times=None)
        with (
            broken(proxy, always),
            pytest.raises(StorageError, match=r"wanted 800 bytes from offset 100, got 400 .the server sends less"),
        ):
            impatient(url, proxy.url, attempts=9).read("a", 100, 900)
        assert always.broken == 4

    def test_an_object_that_ends_is_not_asked_again(self, url: str, proxy: FaultProxy) -> None:
        open_store(url).write("a", DATA[:1000])
        store = open_store(url, {"endpoint_url": proxy.url})
        proxy.start()
        with pytest.raises(StorageError, match=r"wanted 800 bytes from offset 900, got 100 .the file is shorter"):
            store.read("a", 900, 1700)
        assert proxy.stop() == 2, "the range, and the question for the size"


@pytest.mark.parametrize("answer", [Answer.NOT_IMPLEMENTED, Answer.INVALID])
def test_a_server_that_refuses_the_condition_is_asked_without_it(url: str, proxy: FaultProxy, answer: Answer) -> None:
    store = open_store(url, {"endpoint_url": proxy.url})
    before = counters()
    with broken(proxy, rule(answer, "PUT", "claim")):
        assert store.create("claim", b"first") is True
    assert store.create("claim", b"second") is False
    assert store.read("claim") == b"first"
    after = counters()
    assert after.retries == before.retries
    # Two to find nothing, one that is refused, one without the condition, one to find it, one to read it.
    assert after.requests - before.requests == 6


def test_a_whole_object_is_one_request_however_large(url: str) -> None:
    """s3fs would look at the size first and read large ones in ranges, some of them perhaps of another version."""
    open_store(url).write("a", DATA)
    store = open_store(url, {"default_block_size": 1 << 20})
    before = counters().requests
    assert store.read("a") == DATA
    assert counters().requests == before + 1
