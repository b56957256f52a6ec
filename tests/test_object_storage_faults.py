"""Merges from and to an S3 server that fails: what passes by leaves no trace, what stays ends them and is named."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import s3fs

from pipeline.engine.verify import verify
from pipeline.errors import PipelineError, StorageError
from pipeline.merging import Resources, merge
from pipeline.planning.memory import UPLOAD_BYTES
from pipeline.storage import Store, open_store
from pipeline.storage.remote import FsspecStore
from pipeline.storage.retrying import RetryPolicy
from tests.support.cases import HEAD, INDEX, MLP, before_writing, data_start, run_cli, tiny_family, without_retention
from tests.support.families import Family
from tests.support.fault_proxy import Fault, FaultProxy, Rule, fault_proxy
from tests.support.s3 import prefix, upload

# Three output files, so that groups span files and all is measured before anything is written.
FILE_SIZE = "200"
# Reading the header takes so small a file whole, once, before either read of its tensors.
HEADER = 1
FILES = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A family in the bucket, with a recipe on disk that names it there."""

    url: str
    recipe: Path
    family: Family
    resources: Resources


def place(family: Family, url: str, recipe: Path) -> Place:
    """Upload a family and write its recipe."""
    there = prefix(url)
    text = family.recipe(pipeline={"file_size": FILE_SIZE}).read_text()
    for folder in (family.base, *family.models):
        text = text.replace(str(folder), upload(folder, f"{there}/{folder.name}"))
    recipe.write_text(text)
    # The least for an output in the bucket: nothing of the first read is kept.
    least = without_retention(recipe, family.root / "nowhere").memory_bytes
    return Place(url=there, recipe=recipe, family=family, resources=Resources(memory_bytes=least + UPLOAD_BYTES))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return tiny_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def shared(family: Family, s3_url: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """For merges that leave their inputs as they are."""
    return place(family, s3_url, tmp_path_factory.mktemp("recipe") / "recipe.yaml")


@pytest.fixture
def own(family: Family, s3_url: str, tmp_path: Path) -> Place:
    """For a merge whose inputs are changed."""
    return place(family, s3_url, tmp_path / "recipe.yaml")


@pytest.fixture(scope="module")
def undisturbed(shared: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weight files of a merge to a folder."""
    output = tmp_path_factory.mktemp("out")
    merge(str(shared.family.recipe(pipeline={"file_size": FILE_SIZE})), str(output))
    return weights(str(output))


@pytest.fixture(scope="module")
def proxy(s3_url: str) -> Iterator[FaultProxy]:
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        yield running


@contextmanager
def through(proxy: FaultProxy, *rules: Rule) -> Iterator[None]:
    """Lead this process and its children to the proxy, with rules; nobody else's filesystem is touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        # Instances are shared by their arguments, of which the endpoint is none.
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.start(*rules)
        try:
            yield
        finally:
            requests = proxy.stop()
            s3fs.S3FileSystem.clear_instance_cache()
    assert requests > 0


def weights(url: str) -> dict[str, bytes]:
    """The weight files of an output."""
    store = open_store(url)
    return {path: store.read(path) for path in store.list() if path.endswith(".safetensors")}


def byte_of(file: Path, tensor: str) -> int:
    """The offset in a file of the lowest byte of a tensor's third element."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    return data_start(file) + int(header[tensor]["data_offsets"][0]) + 8


def failed(place: Place, output: str, listener: Callable[[object], None] | None = None) -> PipelineError:
    """Merge to an output in the bucket with the least memory and return the error it ends with."""
    extra = {} if listener is None else {"listener": listener}
    with pytest.raises(PipelineError) as caught:
        merge(str(place.recipe), output, resources=place.resources, **extra)  # type: ignore[arg-type]
    return caught.value


def run_merge(place: Place, output: str) -> subprocess.CompletedProcess[str]:
    """Merge by the command line with the least memory."""
    return run_cli("merge", place.recipe, output, "--memory", place.resources.memory_bytes, "--json")


def assert_no_model(output: str) -> None:
    """Check that no loader finds a model, and that no weight file is there that was not finished."""
    store = open_store(output)
    paths = store.list()
    assert INDEX not in paths
    assert "config.json" not in paths
    for path in paths:
        if path.endswith(".safetensors"):
            marker = json.loads(store.read(f"_geomerge/written/{path}.json"))
            assert store.stat(path).size_bytes == marker["size_bytes"]


PASSING = {
    "refused reads": (
        Rule(fault=Fault.INTERNAL, part="expert0/model.safetensors", after=HEADER, times=4),
        Rule(fault=Fault.SLOW_DOWN, part="expert1/model.safetensors", after=HEADER, times=5),
        Rule(fault=Fault.SLOW_DOWN, method="HEAD", part="expert2/model.safetensors", after=3, times=2),
    ),
    "broken reads": (
        Rule(fault=Fault.RESET, part="expert0/model.safetensors", after=HEADER, times=2),
        Rule(fault=Fault.SHORT, part="expert1/model.safetensors", after=HEADER, times=2),
        Rule(fault=Fault.STALL, part="expert2/model.safetensors", after=HEADER),
    ),
    "uploads": (
        Rule(fault=Fault.INTERNAL, method="POST", part=f"{FILES[0]}?uploads", times=2),
        Rule(fault=Fault.INTERNAL, method="PUT", part=f"{FILES[0]}?partNumber", times=2),
        Rule(fault=Fault.SLOW_DOWN, method="PUT", part=f"{FILES[1]}?partNumber", times=4),
        Rule(fault=Fault.LOST_REPLY, method="PUT", part=f"{FILES[2]}?partNumber"),
        Rule(fault=Fault.LOST_REPLY, method="POST", part=f"{FILES[2]}?uploadId"),
        Rule(fault=Fault.INTERNAL, method="PUT", part=f"written/{FILES[2]}", times=4),
        Rule(fault=Fault.LOST_REPLY, method="PUT", part=INDEX),
    ),
}


def assert_passed(rules: tuple[Rule, ...], output: str, undisturbed: dict[str, bytes]) -> None:
    """Check that all faults happened and that the output is whole."""
    assert [rule.broken for rule in rules] == [rule.times for rule in rules]
    assert weights(output) == undisturbed
    assert verify(open_store(output))["files"] == len(FILES)


@pytest.mark.parametrize("kind", ["refused reads", "uploads"])
def test_what_passes_leaves_no_trace(
    shared: Place, proxy: FaultProxy, undisturbed: dict[str, bytes], kind: str
) -> None:
    output = prefix(shared.url)
    with through(proxy, *PASSING[kind]):
        merge(str(shared.recipe), output, resources=shared.resources)
    assert_passed(PASSING[kind], output, undisturbed)


def test_what_passes_is_a_success_of_the_command(
    shared: Place, proxy: FaultProxy, undisturbed: dict[str, bytes]
) -> None:
    output = prefix(shared.url)
    with through(proxy, *PASSING["broken reads"]):
        done = run_merge(shared, output)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_written"] > 0
    assert_passed(PASSING["broken reads"], output, undisturbed)


def flip(place: Place, model: int, tensor: str, reading: int) -> Rule:
    """A rule that flips a bit of a tensor in its first read (0) or in its second (1)."""
    folder = place.family.models[model]
    byte = byte_of(folder / "model.safetensors", tensor)
    return Rule(fault=Fault.FLIP, part=f"{folder.name}/model.safetensors", byte=byte, after=HEADER + reading)


def test_a_bit_flipped_in_the_second_read(shared: Place, proxy: FaultProxy) -> None:
    rule = flip(shared, 1, MLP, 1)
    output = prefix(shared.url)
    with through(proxy, rule):
        done = run_merge(shared, output)
    assert done.returncode == 8, done.stderr
    assert (rule.seen, rule.broken) == (HEADER + 2, 1)
    assert f"model {shared.url}/expert1, tensor {MLP}" in done.stderr
    assert "not the bytes of the first read" in done.stderr
    assert_no_model(output)


def test_a_bit_flipped_in_the_first_read(shared: Place, proxy: FaultProxy) -> None:
    rule = flip(shared, 2, HEAD, 0)
    output = prefix(shared.url)
    with through(proxy, rule):
        error = failed(shared, output)
    assert error.exit_code == 8
    assert (rule.seen, rule.broken) == (HEADER + 2, 1)
    assert f"model {shared.url}/expert2, tensor {HEAD}" in str(error)
    assert "not the bytes of the first read" in str(error)
    assert_no_model(output)


def test_an_object_replaced_between_the_reads(own: Place, proxy: FaultProxy) -> None:
    """Of the same size, so that only its ETag tells."""
    other = (own.family.models[0] / "model.safetensors").read_bytes()
    store = open_store(f"{own.url}/expert1")
    before = store.stat("model.safetensors")
    output = f"{own.url}/out"
    with through(proxy):
        write = lambda: open_store(f"{own.url}/expert1").write("model.safetensors", other)  # noqa: E731
        error = failed(own, output, before_writing(write))
    after = open_store(f"{own.url}/expert1").stat("model.safetensors")
    assert before.size_bytes == after.size_bytes
    assert before.version != after.version
    assert error.exit_code == 3
    assert f"model {own.url}/expert1, file model.safetensors: changed since" in str(error)
    assert_no_model(output)


def test_an_object_removed_between_the_reads(own: Place, proxy: FaultProxy) -> None:
    output = f"{own.url}/out"
    with through(proxy):
        remove = lambda: open_store(f"{own.url}/expert2").delete("model.safetensors")  # noqa: E731
        error = failed(own, output, before_writing(remove))
    assert error.exit_code == 3
    assert f"model {own.url}/expert2, file model.safetensors: changed since" in str(error)
    assert "absent now" in str(error)
    assert_no_model(output)


def test_a_key_that_is_gone_during_a_read(shared: Place, proxy: FaultProxy) -> None:
    byte = byte_of(shared.family.models[2] / "model.safetensors", MLP)
    rule = Rule(fault=Fault.MISSING, part="expert2/model.safetensors", byte=byte, after=HEADER + 1, times=None)
    output = prefix(shared.url)
    with through(proxy, rule):
        error = failed(shared, output)
    assert error.exit_code == 5
    assert f"{shared.url}/expert2/model.safetensors: does not exist" in str(error)
    # By a signed URL, and where the reply to that was too slow once more by s3fs.
    assert rule.broken in (1, 2), "waiting brings no object back"
    assert_no_model(output)


def test_a_reply_of_half_the_range_is_not_merged(shared: Place, proxy: FaultProxy) -> None:
    """Whose length is true: only the length that was asked for tells."""
    byte = byte_of(shared.family.models[0] / "model.safetensors", MLP)
    rule = Rule(fault=Fault.HALVED, part="expert0/model.safetensors", byte=byte, after=HEADER + 1, times=None)
    output = prefix(shared.url)
    with through(proxy, rule):
        error = failed(shared, output)
    assert error.exit_code == 5
    assert f"{shared.url}/expert0/model.safetensors: wanted 64 bytes from offset {byte - 8}, got 32" in str(error)
    assert "the server sends less than it says it has" in str(error)
    assert rule.broken == 4, "a few more tries, then no more"
    assert_no_model(output)


def test_reads_that_are_throttled_for_good(shared: Place, proxy: FaultProxy) -> None:
    rule = Rule(fault=Fault.SLOW_DOWN, part="expert1/model.safetensors", after=HEADER, times=None)
    output = prefix(shared.url)
    with through(proxy, rule):
        error = failed(shared, output)
    assert error.exit_code == 5
    assert f"{shared.url}/expert1/model.safetensors: cannot read: SlowDown" in str(error)
    assert "the store is overloaded or limits the rate: run again later, or with fewer workers" in str(error)
    # Seven tries of ours, each three of botocore's, for each of the reads in flight.
    assert rule.broken >= 21
    assert_no_model(output)


def test_a_bit_flipped_in_an_upload_is_sent_again(
    shared: Place, proxy: FaultProxy, undisturbed: dict[str, bytes]
) -> None:
    rules = (
        Rule(fault=Fault.FLIP_UPLOAD, method="PUT", part=f"{FILES[0]}?partNumber", times=2),
        Rule(fault=Fault.FLIP_UPLOAD, method="PUT", part=f"written/{FILES[1]}"),
    )
    output = prefix(shared.url)
    with through(proxy, *rules):
        merge(str(shared.recipe), output, resources=shared.resources)
    assert_passed(rules, output, undisturbed)


@pytest.mark.parametrize(
    ("input_url", "output_url", "words"),
    [
        ("s3://no-such-bucket-anywhere/model", "{}", "there is no such bucket (create it, or correct the URL"),
        ("s3://Bad_Bucket!/model", "{}", "'Bad_Bucket!' is no bucket's name (correct the bucket's name"),
        (None, "s3://Bad_Bucket!/out", "'Bad_Bucket!' is no bucket's name (correct the bucket's name"),
    ],
)
def test_a_bucket_that_cannot_be(
    shared: Place, tmp_path: Path, input_url: str | None, output_url: str, words: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    model = input_url or f"{shared.url}/expert0"
    recipe.write_text(json.dumps({"merge_method": "linear", "models": [{"model": model}]}))
    with pytest.raises(StorageError) as caught:
        merge(str(recipe), output_url.format(prefix(shared.url)))
    assert caught.value.exit_code == (5 if "create it" in words else 2)
    assert words in str(caught.value)
    assert (input_url or output_url) in str(caught.value)


def test_an_upload_refused_for_good(shared: Place, proxy: FaultProxy, undisturbed: dict[str, bytes]) -> None:
    rule = Rule(fault=Fault.INTERNAL, method="PUT", part=f"{FILES[1]}?partNumber", times=None)
    output = prefix(shared.url)
    with through(proxy, rule):
        done = run_merge(shared, output)
    assert done.returncode == 5, done.stderr
    assert f"{output}/{FILES[1]}: cannot write: InternalError" in done.stderr
    assert "run again" in done.stderr
    assert rule.broken > 1
    assert_no_model(output)
    assert weights(output) == {FILES[0]: undisturbed[FILES[0]]}
    key = output.removeprefix("s3://").partition("/")[2]
    pending = s3fs.S3FileSystem().list_multipart_uploads("bucket")
    assert not [entry for entry in pending if entry["Key"].startswith(key)]
    report = merge(str(shared.recipe), output, resources=shared.resources)
    assert report["resumed_files"] == 1
    assert weights(output) == undisturbed


def stream(store: Store, path: str, data: bytes) -> None:
    """Write an object as weight files are written."""
    with store.open_writer(path) as writer:
        writer.write(data)
        writer.commit()


# Without the pauses of the real one, and without botocore's tries.
QUICK = RetryPolicy(attempts=3, first_pause_s=0.001, longest_pause_s=0.002)
ONCE: dict[str, object] = {"config_kwargs": {"retries": {"max_attempts": 0}}}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_bit_flipped_on_the_way_up_never_becomes_an_object(s3_url: str, proxy: FaultProxy, streamed: bool) -> None:
    url = prefix(s3_url)
    rule = Rule(fault=Fault.FLIP_UPLOAD, method="PUT", part="object", times=None)
    with through(proxy, rule):
        store = FsspecStore(url, ONCE, retry=QUICK)
        send = partial(stream, store) if streamed else store.write
        with pytest.raises(StorageError, match=r"object: cannot write: .*bytes are damaged on their way") as caught:
            send("object", bytes(1000))
    assert caught.value.exit_code == 5
    assert rule.broken == QUICK.attempts
    assert open_store(url).list() == ()
    assert open_store(url).leftovers() == ()


def test_a_stall_beyond_the_time_limit_is_tried_again(s3_url: str, proxy: FaultProxy) -> None:
    url = prefix(s3_url)
    open_store(url).write("object", bytes(range(256)) * 40)
    rule = Rule(fault=Fault.STALL, part="object")
    with through(proxy, rule):
        store = FsspecStore(url, {"config_kwargs": {"read_timeout": 1, "connect_timeout": 5}})
        assert store.read("object", 256, 5120) == bytes(range(256)) * 19
    assert (rule.seen, rule.broken) == (2, 1)


def test_stalls_without_end_are_an_error(s3_url: str, proxy: FaultProxy) -> None:
    url = prefix(s3_url)
    open_store(url).write("object", bytes(range(256)) * 40)
    rule = Rule(fault=Fault.STALL, part="object", times=None)
    with through(proxy, rule):
        store = FsspecStore(url, {"config_kwargs": {"read_timeout": 0.2, "retries": {"max_attempts": 0}}}, retry=QUICK)
        with pytest.raises(StorageError, match=r"object: cannot read: .*[Tt]ime.*then run again"):
            store.read("object", 256, 5120)
    assert rule.broken == QUICK.attempts
