"""Whole merges through other schemes than S3, and what is said where a scheme cannot be used."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.cli import main
from pipeline.engine.status import status
from pipeline.engine.verify import verify
from pipeline.errors import PipelineError, RecipeError, StorageError
from pipeline.merging import load_recipe, merge
from pipeline.storage import MissingObject, open_store
from pipeline.storage.remote import FsspecStore
from pipeline.storage.retrying import RetryPolicy
from tests.support.families import Family, make_family

# Several output files and two reads.
PIPELINE = {"file_size": "20KB"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), 3, shards=2)


@pytest.fixture(scope="module")
def local(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of a merge to a folder."""
    output = tmp_path_factory.mktemp("out")
    merge(str(family.recipe(pipeline=PIPELINE)), str(output))
    return model_files(str(output))


def model_files(url: str) -> dict[str, bytes]:
    """What a loader needs of an output."""
    store = open_store(url)
    wanted = (".safetensors", "index.json", "config.json", "tokenizer.json")
    return {path: store.read(path) for path in store.list() if path.endswith(wanted) and "/" not in path}


def recipe_at(family: Family, url: str) -> str:
    """A recipe whose models lie below a URL."""
    text = family.recipe(name=f"{uuid.uuid4().hex}.yaml", pipeline=PIPELINE).read_text()
    return text.replace(str(family.root), url)


def copy_to(family: Family, url: str) -> None:
    """Write the family below a URL."""
    for folder in (family.base, *family.models):
        store = open_store(f"{url}/{folder.name}")
        for file in folder.iterdir():
            store.write(file.name, file.read_bytes())


@contextmanager
def memory_place() -> Iterator[str]:
    """A prefix of this process's memory that is removed afterwards."""
    url = f"memory://{uuid.uuid4().hex}"
    try:
        yield url
    finally:
        fs = MemoryFileSystem()
        fs.rm(url, recursive=True)


def test_memory_from_recipe_to_output(family: Family, local: dict[str, bytes]) -> None:
    with memory_place() as url:
        copy_to(family, url)
        open_store(url).write("recipe.yaml", recipe_at(family, url).encode())
        report = merge(f"{url}/recipe.yaml", f"{url}/out")
        assert model_files(f"{url}/out") == local
        output = open_store(f"{url}/out")
        assert status(output)["state"] == "committed"
        assert verify(output)["files"] == len(report["files"])
        assert output.leftovers() == ()
        again = merge(f"{url}/recipe.yaml", f"{url}/out")
        assert again["fingerprint"] == report["fingerprint"]


def test_a_merge_in_memory_resumes(family: Family, local: dict[str, bytes]) -> None:
    class Cut(BaseException):
        pass

    def listener(event: object) -> None:
        if type(event).__name__ == "FileWritten":
            raise Cut

    with memory_place() as url:
        copy_to(family, url)
        open_store(url).write("recipe.yaml", recipe_at(family, url).encode())
        with pytest.raises(Cut):
            merge(f"{url}/recipe.yaml", f"{url}/out", listener=listener)
        assert "model.safetensors.index.json" not in open_store(f"{url}/out").list()
        assert merge(f"{url}/recipe.yaml", f"{url}/out")["resumed_files"] > 0
        assert model_files(f"{url}/out") == local


@pytest.mark.parametrize("form", ["file://{}", "file://localhost{}", "FILE://{}"])
def test_file_urls_are_folders(family: Family, local: dict[str, bytes], tmp_path: Path, form: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_at(family, form.format(family.root)))
    output = tmp_path / "the output"
    url = form.format(str(output).replace(" ", "%20"))
    merge(form.format(tmp_path / "recipe.yaml"), url)
    assert model_files(str(output)) == local
    assert open_store(url).is_local


class Ranged(http.server.SimpleHTTPRequestHandler):
    """A plain web server of a folder that knows ranges; `log` has the requests."""

    protocol_version = "HTTP/1.1"
    ranges = True
    log: list[tuple[str, str, str | None]]
    broken: dict[str, int]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        self.log.append(("GET", self.path, self.headers.get("Range")))
        if self.broken.get(self.path):
            self.broken[self.path] -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if not (self.ranges and span and path.is_file()):
            super().do_GET()
            return
        content = path.read_bytes()
        start, stop = int(span[1]), min(int(span[2] or len(content)) + 1, len(content))
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(content[start:stop])


class Rangeless(Ranged):
    """One that sends everything, whatever was asked for."""

    ranges = False


class Unlisted(Ranged):
    """One that shows no folders."""

    def list_directory(self, path: object) -> None:
        self.send_error(404)


@contextmanager
def web_server(folder: Path, kind: type[Ranged], broken: dict[str, int] | None = None) -> Iterator[tuple[str, Ranged]]:
    """Serve a folder on the loopback interface; yields the URL and the handler's class with its log."""
    handler = type("Handler", (kind,), {"log": [], "broken": broken or {}})
    bound = lambda *args: handler(*args, directory=str(folder))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), bound) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", handler  # type: ignore[misc]
        finally:
            server.shutdown()
            thread.join()


def test_models_are_read_from_a_web_server(family: Family, local: dict[str, bytes], tmp_path: Path) -> None:
    shard = "/expert1/model-00001-of-00002.safetensors"
    with web_server(family.root, Ranged, {shard: 2}) as (url, handler):
        (tmp_path / "recipe.yaml").write_text(recipe_at(family, url))
        merge(str(tmp_path / "recipe.yaml"), str(tmp_path / "out"))
    assert model_files(str(tmp_path / "out")) == local
    assert handler.broken == {shard: 0}
    gets = [span for verb, path, span in handler.log if "-of-" in path]
    assert gets
    assert None not in gets, "no weight file is fetched whole"


def test_the_recipe_too(family: Family, local: dict[str, bytes], tmp_path: Path) -> None:
    with web_server(family.root, Ranged) as (url, _):
        (family.root / "web.yaml").write_text(recipe_at(family, url))
        merge(f"{url}/web.yaml", str(tmp_path / "out"))
    assert model_files(str(tmp_path / "out")) == local


def test_credentials_in_urls_are_used_and_neither_shown_nor_saved(family: Family, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    for name, text in (("a", recipe_at(family, str(family.root))), ("broken", "merge_method: [")):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(text)
    secrets = ("hunter22", "s1gned")
    with web_server(tmp_path, Ranged) as (url, handler):
        place = f"{url.replace('//', '//me:hunter22@')}/recipes"
        arguments = ["batch", place, str(tmp_path / "out"), "--executor", "local", "--json"]
        result = CliRunner().invoke(main, [*arguments, "--progress", "json"])
        handler.log.clear()
        recipe, _ = load_recipe(f"{place}/a.yaml?X-Signature=s1gned/x")
        assert recipe.merge_method == "geometric_median"
        with pytest.raises(RecipeError, match=f"recipe {url}/recipes/no.yaml: does not exist") as caught:
            load_recipe(f"{place}/no.yaml?X-Signature=s1gned/x")
        assert handler.log
        assert all(path.endswith("?X-Signature=s1gned/x") for _, path, _ in handler.log)
    summary = json.loads(result.stdout)
    assert [row["state"] for row in summary["merges"]] == ["committed", "failed"], summary
    assert summary["merges"][0]["recipe_url"] == f"{url}/recipes/a.yaml"
    assert f"{url}/recipes/broken.yaml" in summary["merges"][1]["error"]
    kept = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for secret in secrets:
        assert secret not in f"{result.output} {caught.value}"
        assert secret.encode() not in kept


def test_a_web_server_without_ranges_is_refused(family: Family, tmp_path: Path) -> None:
    with web_server(family.root, Rangeless) as (url, handler):
        (tmp_path / "recipe.yaml").write_text(recipe_at(family, url))
        with pytest.raises(StorageError) as caught:
            merge(str(tmp_path / "recipe.yaml"), str(tmp_path / "out"))
        asked = len(handler.log)
    assert "the server ignores byte ranges" in str(caught.value)
    assert f"{url}/" in str(caught.value)
    assert "use a folder or an object store" in str(caught.value)
    # Nothing of it passes: no waiting, no second download.
    assert asked < 20
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_web_server_that_lists_nothing_is_refused(family: Family, tmp_path: Path) -> None:
    """Else the output would lack the tokenizer without a word."""
    with web_server(family.root, Unlisted) as (url, _):
        (tmp_path / "recipe.yaml").write_text(recipe_at(family, url))
        with pytest.raises(PipelineError, match="the server shows no such folder"):
            merge(str(tmp_path / "recipe.yaml"), str(tmp_path / "out"))


class TestWebStore:
    """What a store is over HTTP."""

    def test_reading(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "a").write_bytes(bytes(range(256)) * 40)
        (tmp_path / "sub" / "ünïcode b").write_bytes(b"12345")
        with web_server(tmp_path, Ranged) as (url, _):
            store = open_store(url)
            assert store.read("a") == bytes(range(256)) * 40
            assert store.read("a", 300, 310) == bytes(range(44, 54))
            assert store.list() == ("a", "sub/ünïcode b")
            assert store.read("sub/ünïcode b") == b"12345"
            assert store.stat("sub/ünïcode b").size_bytes == 5
            with pytest.raises(MissingObject, match="nothing: does not exist"):
                store.read("nothing", 0, 4)
            assert not store.exists("nothing")
            with pytest.raises(StorageError, match="wanted 10 bytes from offset 10236, got 4"):
                store.read("a", 10236, 10246)
            with pytest.raises(StorageError, match="from offset 20000, got 0"):
                store.read("a", 20000, 20001)
            for act in (store.write, store.create):
                with pytest.raises(StorageError, match=r"cannot write: .*use a folder or an object store"):
                    act("b", b"1")

    def test_nobody_listening_is_not_absence(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            quick = RetryPolicy(first_pause_s=0.001, longest_pause_s=0.002)
            store = FsspecStore(f"http://127.0.0.1:{free.getsockname()[1]}/models", {}, retry=quick)
            with pytest.raises(StorageError, match=r"cannot read: .*check the address, the network") as caught:
                store.exists("config.json")
            assert not isinstance(caught.value, MissingObject)
            with pytest.raises(StorageError, match=r"cannot list: .*check the address, the network"):
                store.list()


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("gs://bucket/model", "gcsfs"),
        ("gcs://bucket/model", "gcsfs"),
        ("az://container/model", "adlfs"),
        ("abfs://container/model", "adlfs"),
        ("abfss://container/model", "adlfs"),
        ("s3://bucket/model", "s3fs"),
        ("hf://someone/model", "huggingface_hub"),
    ],
)
def test_a_missing_package_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if it were not installed: a class that was found before is forgotten, and no import of it succeeds.
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    with pytest.raises(StorageError, match=rf"cannot open: .*\(install the package {package}\)$") as caught:
        open_store(url)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_scheme_that_nobody_knows() -> None:
    with pytest.raises(StorageError, match=r"Protocol not known: nosuch.*check the URL's scheme"):
        open_store("nosuch://bucket/model")


@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_out_of_reach(offline: bool, tmp_path: Path) -> None:
    """Once switched off by its own variable, once with nobody listening at its address."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{merge_method: linear, models: [{model: 'hf://someone/model'}]}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        environment = {**os.environ, "HF_HUB_OFFLINE": str(int(offline)), "HF_ENDPOINT": address}
        command = [sys.executable, "-m", "pipeline", "merge", str(recipe), str(tmp_path / "out"), "--json"]
        # What does not end by itself is a failure.
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert done.returncode == 5, done.stderr
    assert "hf://someone/model" in done.stderr
    assert ("unset HF_HUB_OFFLINE" if offline else "check the address, the network") in done.stderr
    assert "Traceback" not in done.stderr
