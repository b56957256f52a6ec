"""Where requests to S3 go and as whom: environment, profiles and options, against a real server that asks for both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from pipeline.errors import SettingsError, StorageError
from pipeline.storage import counters, open_store
from tests.support.s3 import KEY, SECRET, prefix

# Nobody listens there.
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def endpoint(s3_url: str) -> str:
    return os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture
def url(s3_url: str) -> str:
    place = prefix(s3_url)
    open_store(place).write("a", b"12345")
    return place


@pytest.fixture
def bare(url: str, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """An environment that leads nowhere and holds no credentials; what a test sets in it holds for new filesystems."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


def keys(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("AWS_ACCESS_KEY_ID", KEY)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


def profiles(folder: Path, endpoint: str) -> None:
    """Write a profile with endpoint, region and credentials, and a default one that is of no use."""
    (folder / "config").write_text(
        f"[default]\nregion = nowhere-1\nendpoint_url = {NOWHERE}\n"
        f"[profile nightly]\nregion = eu-north-1\nendpoint_url = {endpoint}\n"
    )
    (folder / "credentials").write_text(
        "[default]\naws_access_key_id = nobody\naws_secret_access_key = wrong\n"
        f"[nightly]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
    )


def refused(url: str, options: dict[str, object] | None = None, exit_code: int = 5) -> str:
    """Read and write, each refused, and return the text of the refused read, which shows no secret."""
    store = open_store(url, options)
    before = counters()
    with pytest.raises(StorageError) as caught:
        store.read("a", 0, 1)
    for act in (lambda: store.exists("a"), store.list, lambda: store.write("b", b""), lambda: store.create("b", b"")):
        with pytest.raises(StorageError) as other:
            act()
        assert SECRET not in str(other.value)
        assert other.value.exit_code == exit_code
    assert SECRET not in str(caught.value)
    assert counters().retries == before.retries, "what waiting does not mend is not waited for"
    return str(caught.value)


def test_the_environment_leads_to_the_server(bare: pytest.MonkeyPatch, url: str, endpoint: str) -> None:
    bare.setenv("AWS_ENDPOINT_URL", endpoint)
    bare.setenv("AWS_DEFAULT_REGION", "eu-west-9")
    keys(bare)
    store = open_store(url)
    assert store.read("a") == b"12345"
    assert store._backend.fs.s3.meta.region_name == "eu-west-9"  # type: ignore[attr-defined]


def test_an_endpoint_for_s3_alone(bare: pytest.MonkeyPatch, url: str, endpoint: str) -> None:
    bare.setenv("AWS_ENDPOINT_URL", NOWHERE)
    bare.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    keys(bare)
    assert open_store(url).read("a") == b"12345"


def test_options_lead_to_the_server_without_the_environment(bare: pytest.MonkeyPatch, url: str, endpoint: str) -> None:
    keys(bare)
    store = open_store(url, {"endpoint_url": endpoint, "region": "eu-south-7"})
    assert store.read("a") == b"12345"
    with store.open_writer("b") as writer:
        writer.write(b"streamed")
        writer.commit()
    assert store.read("b") == b"streamed"
    assert store._backend.fs.s3.meta.region_name == "eu-south-7"  # type: ignore[attr-defined]


def test_options_come_before_the_environment(bare: pytest.MonkeyPatch, url: str, endpoint: str) -> None:
    bare.setenv("AWS_ENDPOINT_URL", NOWHERE)
    bare.setenv("AWS_DEFAULT_REGION", "nowhere-1")
    keys(bare)
    store = open_store(url, {"endpoint_url": endpoint, "region": "eu-south-7", "client_kwargs": {"use_ssl": False}})
    assert store.read("a") == b"12345"
    assert store._backend.fs.s3.meta.region_name == "eu-south-7"  # type: ignore[attr-defined]


@pytest.mark.parametrize("by", ["environment", "options"])
def test_a_profile_has_endpoint_region_and_credentials(
    bare: pytest.MonkeyPatch, url: str, endpoint: str, tmp_path: Path, by: str
) -> None:
    profiles(tmp_path, endpoint)
    options = {"profile": "nightly"} if by == "options" else {}
    if by == "environment":
        bare.setenv("AWS_PROFILE", "nightly")
    store = open_store(url, options)
    assert store.read("a") == b"12345"
    assert store._backend.fs.s3.meta.region_name == "eu-north-1"  # type: ignore[attr-defined]


def test_stores_with_different_options_live_side_by_side(
    bare: pytest.MonkeyPatch, url: str, endpoint: str, tmp_path: Path
) -> None:
    profiles(tmp_path, endpoint)
    good, bad = (
        open_store(url, {"profile": "nightly"}),
        open_store(url, {"profile": "default", "endpoint_url": endpoint}),
    )
    for _ in range(2):
        assert good.read("a") == b"12345"
        with pytest.raises(StorageError, match="check the credentials"):
            bad.read("a", 0, 1)


@pytest.mark.parametrize("by", ["environment", "options"])
def test_a_profile_that_is_not_there_is_named(
    bare: pytest.MonkeyPatch, url: str, endpoint: str, tmp_path: Path, by: str
) -> None:
    profiles(tmp_path, endpoint)
    keys(bare)
    if by == "environment":
        bare.setenv("AWS_PROFILE", "nightli")
    text = refused(url, {"profile": "nightli"} if by == "options" else {"endpoint_url": endpoint}, exit_code=2)
    assert text.startswith(f"{url}/a: cannot read: The config profile (nightli) could not be found")
    assert "AWS_PROFILE" in text


def test_anonymous_access_to_a_server_that_wants_a_signature(bare: pytest.MonkeyPatch, url: str, endpoint: str) -> None:
    keys(bare)
    text = refused(url, {"endpoint_url": endpoint, "anon": True})
    assert text.startswith(f"{url}/a: cannot read: ")
    assert "anonymous access is refused: leave out anon: true and give credentials" in text


def test_no_credentials_at_all(bare: pytest.MonkeyPatch, url: str, endpoint: str) -> None:
    text = refused(url, {"endpoint_url": endpoint})
    assert "Unable to locate credentials" in text
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile, or give the machine a role" in text


@pytest.mark.parametrize(("key", "secret"), [(KEY, "another-secret"), ("nobody", SECRET)])
def test_wrong_credentials(bare: pytest.MonkeyPatch, url: str, endpoint: str, key: str, secret: str) -> None:
    bare.setenv("AWS_ACCESS_KEY_ID", key)
    bare.setenv("AWS_SECRET_ACCESS_KEY", secret)
    text = refused(url, {"endpoint_url": endpoint})
    assert "check the credentials and what they allow" in text
    assert secret not in text


def test_a_bucket_that_is_not_there(url: str) -> None:
    store = open_store("s3://no-such-bucket-anywhere/prefix")
    for act in (lambda: store.read("a", 0, 1), lambda: store.exists("a"), store.list, store.leftovers):
        with pytest.raises(StorageError, match=r"there is no such bucket \(create it, or correct") as caught:
            act()
        assert str(caught.value).startswith("s3://no-such-bucket-anywhere/prefix")


@pytest.mark.parametrize("name", ["Bad_Bucket!", "a b"])
def test_a_name_that_no_bucket_can_have(s3_url: str, name: str) -> None:
    store = open_store(f"s3://{name}/prefix")
    writing = (lambda: store.write("a", b""), lambda: store.create("a", b""), lambda: store.open_writer("a").commit())
    for act in (lambda: store.read("a", 0, 1), lambda: store.exists("a"), store.list, store.leftovers, *writing):
        with pytest.raises(StorageError, match=f"'{name}' is no bucket's name .correct the bucket's name: 3 to 63"):
            act()


def test_an_option_that_nobody_knows(url: str) -> None:
    with pytest.raises(SettingsError, match=r"endpiont_url.*check the URL's scheme, the storage options"):
        open_store(url, {"endpiont_url": "http://127.0.0.1:1"}).read("a", 0, 1)


def test_an_endpoint_that_is_no_url(url: str) -> None:
    with pytest.raises(SettingsError, match=r"Invalid endpoint: 127\.0\.0\.1:1.*storage options"):
        open_store(url, {"endpoint_url": "127.0.0.1:1"}).read("a", 0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"config_kwargs": {"signature_version": "s5"}},
        {"config_kwargs": {"retries": {"mode": "stubborn"}}},
        {"config_kwargs": {"s3": {"addressing_style": "round"}}},
        {"config_kwargs": {"connect_timeout": "eleven"}},
        {"client_kwargs": {"nonsense": 1}},
        {"region": "a b"},
        {"max_concurrency": 0},
    ],
)
def test_settings_of_no_use_are_not_waited_for(url: str, options: dict[str, object]) -> None:
    before = counters()
    with pytest.raises(SettingsError) as caught:
        open_store(url, options).list()
    assert caught.value.exit_code == 2
    assert counters().retries - before.retries <= 2, "botocore's own"


def test_a_configuration_that_cannot_be_parsed(bare: pytest.MonkeyPatch, url: str, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default\nregion")
    keys(bare)
    assert "Unable to parse config file" in (text := refused(url, exit_code=2))
    assert "correct the file (AWS_CONFIG_FILE or ~/.aws/config" in text


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_a_credential_with_a_line_break_is_refused_before_a_request(
    bare: pytest.MonkeyPatch, url: str, name: str
) -> None:
    keys(bare)
    bare.setenv(name, f"{SECRET}\n")
    with pytest.raises(SettingsError, match=rf"^{url}: {name} holds a line break .*\(set {name} again") as caught:
        open_store(url)
    assert SECRET not in str(caught.value)


def test_an_endpoint_of_the_environment_with_a_user(bare: pytest.MonkeyPatch, url: str, endpoint: str) -> None:
    keys(bare)
    bare.setenv("AWS_ENDPOINT_URL", endpoint.replace("//", "//someone:hunter22@"))
    with pytest.raises(SettingsError, match=rf"^{url}: AWS_ENDPOINT_URL has a user") as caught:
        open_store(url)
    assert "hunter22" not in str(caught.value)
    assert open_store(url, {"endpoint_url": endpoint}).read("a") == b"12345"
