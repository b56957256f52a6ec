from __future__ import annotations

import json
import pickle
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage import NO_OPTIONS, StorageOptions, check_storage_options

BY_PREFIX: Mapping[str, Mapping[str, object]] = {
    "s3": {"region": "any"},
    "s3://bucket": {"region": "bucket"},
    "s3://bucket/a/b/": {"region": "deep", "config_kwargs": {"read_timeout": 7}},
    "GS": {"project": "p"},
}


@pytest.mark.parametrize(
    ("url", "region"),
    [
        ("s3://other/x", "any"),
        ("s3://bucket", "bucket"),
        ("s3://bucket/", "bucket"),
        ("S3://bucket/x", "bucket"),
        ("s3://bucketeer/x", "any"),
        ("s3://Bucket/x", "any"),
        ("s3://bucket/a/bc", "bucket"),
        ("s3://bucket/a/b", "deep"),
        ("s3://bucket/a/b/c", "deep"),
        ("s3a://bucket", None),
        ("/s3/bucket", None),
        ("s3", None),
        ("folder/s3://bucket", None),
        ("https://host/s3", None),
    ],
)
def test_the_longest_prefix_of_whole_components_holds(url: str, region: str | None) -> None:
    assert StorageOptions(BY_PREFIX).of(url).get("region") == region


def test_schemes_have_no_case() -> None:
    assert StorageOptions(BY_PREFIX).of("gs://x") == {"project": "p"}


def test_what_is_handed_out_is_the_callers_own() -> None:
    options = StorageOptions(BY_PREFIX)
    mine = options.of("s3://bucket/a/b")
    mine["config_kwargs"]["read_timeout"] = 8  # type: ignore[index]
    assert options.of("s3://bucket/a/b")["config_kwargs"] == {"read_timeout": 7}


def test_there_and_back() -> None:
    options = StorageOptions(BY_PREFIX)
    again = StorageOptions(json.loads(json.dumps(options.to_json())))
    assert again == options
    assert pickle.loads(pickle.dumps(options)) == options
    assert NO_OPTIONS.of("s3://bucket") == {}
    assert NO_OPTIONS.to_json() == {}


@given(
    keys=st.lists(st.sampled_from(["s3", "s3://b", "s3://b/c", "s3://b/c/d", "s3://bb"]), unique=True),
    url=st.sampled_from(["s3://b", "s3://b/c", "s3://b/c/d/e", "s3://bb/c", "s3://c"]),
)
def test_against_a_search_over_components(keys: list[str], url: str) -> None:
    def parts(text: str) -> list[str]:
        return [part for part in text.replace("://", "/").split("/") if part]

    holding = [key for key in keys if parts(url)[: len(parts(key))] == parts(key)]
    wanted = max(holding, key=lambda key: len(parts(key)), default=None)
    got = StorageOptions({key: {"is": key} for key in keys}).of(url)
    assert got == ({} if wanted is None else {"is": wanted})


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"s3": {"endpoint_url": "http://127.0.0.1:9000", "region": "us-east-1", "profile": "nightly"}},
        {"s3://public-models": {"anon": True}, "s3": {}},
        {"s3": {"client_kwargs": {"verify": False}, "config_kwargs": {"signature_version": "s3v4"}}},
        {"s3": {"s3_additional_kwargs": {"SSEKMSKeyId": "alias/merged", "ServerSideEncryption": "aws:kms"}}},
        {"s3": {"requester_pays": True, "max_concurrency": 4, "endpoint_url": None}},
        {"abfs": {"account_name": "models"}, "gs": {"project": "p"}, "https": {"block_size": 0}},
    ],
)
def test_nothing_is_wrong(raw: object) -> None:
    assert list(check_storage_options(raw)) == []


@pytest.mark.parametrize(
    "name",
    [
        "key", "secret", "token", "password", "passwd", "sas", "sas_token", "sasToken", "account_key", "accountKey",
        "aws_secret_access_key", "awssecretaccesskey", "connection_string", "credential", "credentials", "api-key",
        "auth", "AWS_SESSION_TOKEN", "passphrase", "SSECustomerKey", "client_secret", "hf_token",
        "Authorization", "proxy_authorization", "cookie", "cookies", "pass", "pwd", "userpwd", "login", "username",
        "user", "jwt", "bearer", "conn_str", "connectionString", "headers", "default_headers", "proxies",
    ],
)  # fmt: skip
@pytest.mark.parametrize("depth", [0, 2])
def test_credentials_are_refused_wherever_they_stand(name: str, depth: int) -> None:
    options: dict[str, object] = {name: "hunter22"}
    path: tuple[str, ...] = (name,)
    for level in range(depth):
        options, path = {f"level{level}": options}, (f"level{level}", *path)
    ((place, what, remedy),) = check_storage_options({"s3": options})
    assert place == ("s3", *path)
    assert "credential" in what
    assert remedy == "use environment variables, a profile or the instance's role"
    assert "hunter22" not in what


@pytest.mark.parametrize(
    ("raw", "place", "words"),
    [
        ([], (), "is no mapping"),
        ({"s3": "x"}, ("s3",), "is no mapping"),
        ({"no scheme": {}}, ("no scheme",), "neither a scheme nor a URL prefix"),
        ({3: {}}, ("3",), "neither a scheme nor a URL prefix"),
        ({"/models": {}}, ("/models",), "neither a scheme nor a URL prefix"),
        ({"file": {}}, ("file",), "no meaning for folders"),
        ({"file:///x": {}}, ("file:///x",), "no meaning for folders"),
        ({"": {}}, ("''",), "neither a scheme nor a URL prefix"),
        ({"s3:///bucket": {}}, ("s3:///bucket",), "names no bucket"),
        ({"s3://bucket//a": {}}, ("s3://bucket//a",), "an empty"),
        ({"s3://user:pa/hunter22@host": {}}, ("s3://...",), "colon in the bucket's name"),
        ({"s3://user:hunter22@host/x": {"region": 3}}, ("s3://...",), "may hold a credential"),
        ({"https://host/x?sig=hunter22": {}}, ("https://host/x",), "query"),
        ({"s3": {"endpoint_url": "http://u:hunter22@host"}}, ("s3", "endpoint_url"), "may hold a credential"),
        ({"gs": {"hosts": ["http://u:hunter22@host"]}}, ("gs", "hosts", "0"), "may hold a credential"),
        ({"gs": {"host": "u:hunter22@host"}}, ("gs", "host"), "may be a credential"),
        ({"gs": {"host": "https://u:hun/ter22@host"}}, ("gs", "host"), "may be a credential"),
        ({"gs": {"extra": ["Bearer hunter22"]}}, ("gs", "extra", "0"), "may be a credential"),
        ({"gs": {"extra": "basic hunter22"}}, ("gs", "extra"), "may be a credential"),
        ({"https": {"headers": {}}}, ("https", "headers"), "may be a credential"),
        ({"s3": {"endpoint_url": "127.0.0.1:9000"}}, ("s3", "endpoint_url"), "no http or https URL"),
        ({"s3": {"endpoint_url": 3}}, ("s3", "endpoint_url"), "is not a URL"),
        ({"s3": {"region": 3}}, ("s3", "region"), "is not a region's name"),
        ({"s3": {"profile": ""}}, ("s3", "profile"), "is not a profile's name"),
        ({"s3://b": {"anon": "yes"}}, ("s3://b", "anon"), "is not true or false"),
        ({"s3": {"anon": True, "profile": "x"}}, ("s3", "anon"), "takes no profile"),
        ({"s3": {4: "x"}}, ("s3", "4"), "no name of an option"),
        ({"s3": {"x": {1, 2}}}, ("s3", "x"), "is a set"),
        ({"s3": {"loop": 1}}, ("s3", "loop"), "is for programs"),
        ({"s3": {"session": "x"}}, ("s3", "session"), "is for programs"),
        ({"gs": {"asynchronous": True}}, ("gs", "asynchronous"), "is for programs"),
        ({"s3": {"endpoint_url": "http://a b"}}, ("s3", "endpoint_url"), "no http or https URL"),
        ({"s3": {"endpoint_url": "http://["}}, ("s3", "endpoint_url"), "no http or https URL"),
        ({"s3": {"endpoint_url": "http://host:99999"}}, ("s3", "endpoint_url"), "no http or https URL"),
        ({"s3": {"endpoint_url": "http://:9000"}}, ("s3", "endpoint_url"), "no http or https URL"),
        ({"s3": {"max_concurrency": 0}}, ("s3", "max_concurrency"), "no whole number above 0"),
        ({"s3": {"max_concurrency": True}}, ("s3", "max_concurrency"), "no whole number above 0"),
        ({"s3": {"config_kwargs": [1]}}, ("s3", "config_kwargs"), "is not a mapping"),
        ({"s3": {"client_kwargs": "x"}}, ("s3", "client_kwargs"), "is not a mapping"),
        (
            {"s3": {"config_kwargs": {"max_pool_connections": -1}}},
            ("s3", "config_kwargs", "max_pool_connections"),
            "no whole number above 0",
        ),
        (
            {"s3": {"config_kwargs": {"read_timeout": "zwölf"}}},
            ("s3", "config_kwargs", "read_timeout"),
            "no number of seconds above 0",
        ),
        (
            {"s3a://b": {"config_kwargs": {"connect_timeout": 0}}},
            ("s3a://b", "config_kwargs", "connect_timeout"),
            "no number of seconds above 0",
        ),
    ],
)
def test_what_is_wrong_is_named(raw: object, place: tuple[str, ...], words: str) -> None:
    ((found, what, remedy),) = check_storage_options(raw)
    assert found == place
    assert words in what
    assert remedy
    assert "hunter22" not in f"{found} {what} {remedy}"
