from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage.redaction import bare_name, redacted, secrets_of, shown_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/models/", "s3://bucket/models"),
        ("sftp://me:pa55word@host:22/models", "sftp://host:22/models"),
        ("https://host/m?X-Amz-Signature=abc&x=1", "https://host/m"),
        ("simplecache::https://u:p@host/m?sig=1", "simplecache::https://host/m"),
        ("sftp://me:pa55@w0rd@host/models", "sftp://host/models"),
        ("memory://", "memory://"),
        ("nightly/what?.yaml", "nightly/what?.yaml"),
        ("file:///nightly/what?.yaml", "file:///nightly/what?.yaml"),
        ("hf://user/repo@main/sub", "hf://user/repo@main/sub"),
    ],
)
def test_shown_url(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_every_secret_of_url_and_options_is_blanked_out_also_decoded() -> None:
    url = "https://me:pa55%2Fword@host/m?X-Amz-Credential=AKIA1234%2Fx&sig=s1gn4ture"
    options = {
        "key": "AKIAKEY",
        "client_kwargs": {"aws_secret_access_key": "inner5ecret"},
        "anon": False,
        "token": "t0ken",
    }
    text = f"failed for {url}: pa55/word pa55%2Fword AKIA1234/x s1gn4ture AKIAKEY inner5ecret t0ken host/m"
    clean = redacted(text, secrets_of(url, options))
    for secret in ("pa55", "AKIA", "s1gn", "inner5", "t0ken"):
        assert secret not in clean
    assert clean.endswith("host/m")


def test_unknown_urls_in_a_text_lose_their_credentials_too() -> None:
    text = "403, message='Forbidden', url='https://u:p@host/a/b?sig=abc' (ClientResponseError)"
    assert redacted(text, ()) == "403, message='Forbidden', url='https://host/a/b' (ClientResponseError)"


@given(
    password=st.text(st.characters(categories=["L", "N"]), min_size=4),
    path=st.from_regex(r"[a-z]{1,9}", fullmatch=True),
)
def test_a_password_never_survives(password: str, path: str) -> None:
    url = f"sftp://user:{password}@host/{path}"
    assert shown_url(url) == f"sftp://host/{path}"
    assert password not in redacted(f"<{password}> at {url}", secrets_of(url, {})).replace("host", "").replace(path, "")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("s3://KEY:SEC/RET@bucket/base?token=T", "s3://bucket/base"),
        ("s3://KEY:SE@CRET@bucket/base", "s3://bucket/base"),
        ("https://hub/base#token=T", "https://hub/base"),
        ("KEY:SECRET@bucket/base", "bucket/base"),
        ("/mnt/base?token=T", "/mnt/base"),
        ("org/name@revision", "org/name@revision"),
        ("meta/llama-3", "meta/llama-3"),
    ],
)
def test_a_bare_name_holds_no_credentials(name: str, shown: str) -> None:
    assert bare_name(name) == shown
