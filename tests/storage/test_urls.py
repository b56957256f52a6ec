from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RecipeError
from pipeline.storage import UrlError, checked_url, is_writable, open_store, place_of, split_url

BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "the URL is empty"),
        ("s3://", "names no bucket"),
        ("s3:///bkt/prefix", "names no bucket"),
        ("gs:///bkt", "names no bucket"),
        ("s3://bkt//a//b", "an empty, '.' or '..' part"),
        ("s3://bkt//", "an empty"),
        ("s3://bkt/a//", "an empty"),
        ("s3://bkt/m/a/../b", "an empty"),
        ("s3://bkt/./a", "an empty"),
        ("s3://../a", "an empty"),
        ("memory://a//b", "an empty"),
        ("s3:/bkt/x", "has not two slashes"),
        ("S3:/bkt/x", "has not two slashes"),
        ("s3:", "has not two slashes"),
        ("file:/x", "has not two slashes"),
        (" s3://bkt/x", "begins with a blank"),
        ("s3://bkt/a?versionId=1", "a query has no meaning here"),
        ("simplecache::s3://bkt/x", "joins filesystems"),
        ("s3://bkt/a::s3://bkt/b", "joins filesystems"),
        ("http:///x", "names no host"),
        ("https://?x", "names no host"),
        ("s3://bkt:9000/x", "a colon in the bucket's name"),
        ("file://", "names no folder"),
        ("local://localhost", "names no folder"),
        ("local://server/x", "names the host 'server'"),
        ("~nobody-of-this-name/x", "has no home folder"),
    ],
)
def test_urls_that_mean_no_place(url: str, words: str) -> None:
    with pytest.raises(UrlError, match=words) as caught:
        open_store(url)
    assert isinstance(caught.value, RecipeError)
    assert caught.value.problems[0].remedy
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems
    with pytest.raises(UrlError, match=words):
        place_of(url)


@pytest.mark.parametrize("url", ["s3:///bkt/r.yaml", "s3://bkt/a//r.yaml", "s3://bkt//r.yaml", "s3://me:hunter22@b/r"])
def test_no_mistake_is_cut_off_with_the_name(url: str) -> None:
    with pytest.raises(UrlError):
        split_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:hunter22@bkt/x",
        "S3A://user:hunter22@bkt/x",
        "s3://user:hunter22@x@bkt/x",
        "s3://us er:'hunter22@bkt/x",
        "s3://user:a/hunter22@bkt/x",
        "s3://user:a?hunter22@bkt/x",
        "s3:///user:hunter22@bkt/x",
        "s3:/user:hunter22@bkt/x",
        " s3://user:hunter22@bkt/x",
        "s3://user:hunter22@bkt//x",
        "s3://user:a//hunter22@bkt/x",
        "s3://hunter22@bkt/x",
        "s3://bkt/x?token=hunter22",
        "simplecache::s3://user:hunter22@bkt/x",
        "sftp://user:hunter22@host/x",
        "memory://user:hunter22@x",
        "abfss://user:hunter22@account.example/x",
        "file://user:hunter22@host/x",
        "local://user:hunter22@host/x",
    ],
)
def test_credentials_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UrlError) as caught:
        open_store(url)
    assert "hunter22" not in str(caught.value)


def test_the_remedy_of_a_user_names_the_environment() -> None:
    with pytest.raises(UrlError, match=r"^s3://bkt/x: a user has no meaning here .*belong in the environment"):
        checked_url("s3://user:hunter22@bkt/x")
    with pytest.raises(UrlError, match="write az://container/path"):
        checked_url("abfss://container@account.example/x")


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("S3://Bkt/Up", "s3://Bkt/Up"),
        ("s3://bkt", "s3://bkt"),
        ("s3://bkt/a/", "s3://bkt/a/"),
        ("s3://bkt/user@home/a..b/.c", "s3://bkt/user@home/a..b/.c"),
        ("s3://arn:aws:s3:eu-west-1:1:accesspoint/name/x", "s3://arn:aws:s3:eu-west-1:1:accesspoint/name/x"),
        ("HTTPS://host:8080/a//b?sig=a/../b", "https://host:8080/a//b?sig=a/../b"),
        ("memory://", "memory://"),
        ("hdfs:///x", "hdfs:///x"),
        ("a//b/../c", "a//b/../c"),
        ("./s3:/x", "./s3:/x"),
        ("s3", "s3"),
        ("/a/s3://b", "/a/s3://b"),
        ("C:/x", "C:/x"),
    ],
)
def test_what_is_taken_as_it_is(url: str, kept: str) -> None:
    assert checked_url(url) == kept
    assert checked_url(kept) == kept


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("s3://b/m", "s3a://b/m/"),
        ("s3://b", "S3A://b/"),
        ("gs://b/m", "gcs://b/m"),
        ("az://b/m", "abfs://b/m"),
        ("az://b/m", "ABFSS://b/m"),
        ("memory://a/b", "memory:///a/b"),
        ("http://Host/a", "http://me:secret@host/a?sig=1"),
        ("/tmp/x", "local:///tmp/x"),
        ("/tmp/x", "file:///tmp/x/"),
        ("/tmp/x y", "FILE://localhost/tmp/x%20y"),
        ("/tmp/x%20y", "local:///tmp/x%20y"),
        ("/tmp/x", "//tmp/./y/../x"),
        ("/", "file:///"),
    ],
)
def test_spellings_of_one_place(one: str, other: str) -> None:
    assert place_of(one) == place_of(other)
    assert place_of(one).endswith("/")


def test_links_and_relative_paths_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    wanted = f"{os.path.realpath(tmp_path)}/real/new/"
    assert {place_of(url) for url in ("link/new", "real/new", f"local://{tmp_path}/link/new")} == {wanted}


def test_other_places_stay_apart() -> None:
    urls = ["s3://b/m", "s3://b/M", "s3://B/m", "gs://b/m", "az://b/m", "s3://b/mm", "s3://b", "/b/m", "http://b/m"]
    assert len({place_of(url) for url in urls}) == len(urls)


@given(
    scheme=st.sampled_from(BUCKETS),
    parts=st.lists(st.text("ab.@-", min_size=1, max_size=3).filter(lambda part: part not in (".", "..")), max_size=4),
)
def test_whole_paths_are_taken_and_nest(scheme: str, parts: list[str]) -> None:
    url = "/".join([f"{scheme}://bkt", *parts])
    assert checked_url(scheme.upper() + url.removeprefix(scheme)) == url
    assert place_of(f"{url}/sub").startswith(place_of(url))


def test_a_local_url_is_a_folder(tmp_path: Path) -> None:
    store = open_store(f"local://{tmp_path}/a%20b")
    store.write("x", b"1")
    assert store.is_local
    assert (tmp_path / "a%20b" / "x").read_bytes() == b"1"


def test_what_can_be_written() -> None:
    assert all(map(is_writable, ("s3://b", "/x", "file:///x")))
    assert not any(map(is_writable, ("http://h", "HTTPS://h")))
