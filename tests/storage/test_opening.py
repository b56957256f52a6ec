from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, StorageError
from pipeline.storage import join_url, open_store, split_url


def test_forms_of_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x").write_bytes(b"1")
    here = str(tmp_path / "a b")
    for url in ("a b", "./a b/", "~/a b", here, here + "/", f"file://{tmp_path}/a%20b", f"file://localhost{here}"):
        store = open_store(url)
        assert store.url == here
        assert store.is_local
        assert store.list() == ("x",)


def test_a_relative_folder_is_fixed_when_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("models")
    os.chdir("/")
    store.write("a", b"1")
    assert (tmp_path / "models" / "a").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "the URL is empty"),
        ("  ", "the URL is empty"),
        ("file://server/share", "names the host 'server'"),
        ("nosuch://bucket/a", "nosuch://bucket/a: cannot open: .*check the URL's scheme"),
        ("memory://a/b?x=1", r"memory://a/b: a query has no meaning here"),
    ],
)
def test_urls_that_cannot_be_opened(url: str, words: str) -> None:
    with pytest.raises(PipelineError, match=words):
        open_store(url)


def test_wrong_options_are_an_error_without_their_values() -> None:
    with pytest.raises(StorageError, match=r"cannot read: .*check the URL's scheme, the storage options") as caught:
        open_store("s3://bucket/a", {"config_kwargs": {"nonsense": 1}, "secret": "hunter22"}).exists("a")
    assert "hunter22" not in str(caught.value)


def test_a_local_run_does_not_load_fsspec(tmp_path: Path) -> None:
    code = (
        "import sys; from pipeline.storage import open_store; open_store(sys.argv[1]).write('a', b'1');"
        "sys.exit('fsspec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("recipe.yaml", ".", "recipe.yaml"),
        ("/recipes/what?.yaml", "/recipes", "what?.yaml"),
        ("s3://bucket/recipes/a.yaml", "s3://bucket/recipes", "a.yaml"),
        ("https://host/m/a.yaml?X-Signature=a/b", "https://host/m?X-Signature=a/b", "a.yaml"),
    ],
)
def test_where_a_folder_ends(url: str, folder: str, name: str) -> None:
    assert split_url(url) == (folder, name)
    assert join_url(folder, name) == (url if folder != "." else f"./{name}")
