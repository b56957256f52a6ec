from __future__ import annotations

import errno
import time

import aiohttp
import botocore.exceptions
import pytest

from pipeline.storage import counters
from pipeline.storage.retrying import RetryPolicy, cause_of, code_of, is_mistake, is_permanent

QUICK = RetryPolicy(first_pause_s=0.001, longest_pause_s=0.002)


def failing(errors: list[BaseException], calls: list[float]) -> object:
    def request(seconds: float) -> str:
        calls.append(seconds)
        if errors:
            raise errors.pop(0)
        return "done"

    return request


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EBUSY, "Slow Down"),
        ConnectionResetError("reset"),
        TimeoutError(),
        aiohttp.ClientPayloadError("cut"),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
    ],
)
def test_passing_faults_are_tried_again(error: BaseException) -> None:
    calls: list[float] = []
    assert QUICK.run(failing([error, error], calls)) == "done"
    assert len(calls) == 3


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("a"),
        PermissionError("no"),
        OSError(errno.EINVAL, "range"),
        RuntimeError("unsupported"),
        botocore.exceptions.NoCredentialsError(),
        ValueError("a fault of ours"),
    ],
)
def test_lasting_faults_are_not(error: BaseException) -> None:
    calls: list[float] = []
    with pytest.raises(type(error)):
        QUICK.run(failing([error], calls))
    assert len(calls) == 1


@pytest.mark.parametrize(("status", "permanent"), [(404, True), (403, True), (429, False), (408, False), (503, False)])
def test_http_answers(status: int, permanent: bool) -> None:
    error = OSError("answer")
    error.status = status  # type: ignore[attr-defined]
    assert is_permanent(error) is permanent


def refusal(code: str, errno_: int = errno.EINVAL) -> OSError:
    """An error of S3 as s3fs hands it on."""
    error = OSError(errno_, "words")
    error.__cause__ = botocore.exceptions.ClientError({"Error": {"Code": code}}, "PutObject")
    return error


@pytest.mark.parametrize(
    "code", ["BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"]
)
def test_damage_on_the_way_passes_though_it_looks_like_a_mistake(code: str) -> None:
    assert not is_permanent(refusal(code))
    assert code_of(refusal(code)) == code


@pytest.mark.parametrize("code", ["InvalidArgument", "PreconditionFailed", "InvalidBucketName"])
def test_mistakes_do_not_pass(code: str) -> None:
    assert is_permanent(refusal(code))


def test_errors_of_others_have_no_code() -> None:
    assert code_of(OSError("x")) == ""


def test_repetitions_are_counted() -> None:
    before = counters()
    QUICK.run(failing([OSError("a"), OSError("b")], []))  # type: ignore[arg-type]
    assert counters().retries - before.retries == 2


def test_attempts_are_limited_and_the_last_error_is_raised() -> None:
    calls: list[float] = []
    with pytest.raises(OSError, match=f"^{QUICK.attempts - 1}$"):
        QUICK.run(failing([OSError(str(number)) for number in range(9)], calls))
    assert len(calls) == QUICK.attempts


def test_one_deadline_bounds_all_attempts() -> None:
    policy = RetryPolicy(deadline_s=0.2, attempt_s=0.15, attempts=1000, first_pause_s=0.01, longest_pause_s=0.05)
    calls: list[float] = []
    begin = time.monotonic()
    with pytest.raises(OSError, match="busy"):
        policy.run(failing([OSError("busy")] * 1000, calls))
    # Far from the 5 s and more of a thousand attempts, even on a loaded machine.
    assert time.monotonic() - begin < 3
    assert 1 < len(calls) < 1000
    assert max(calls) <= 0.15


def test_causes_in_words() -> None:
    assert cause_of(OSError(errno.EBUSY, "Slow Down")) == "Slow Down (OSError)"
    assert cause_of(TimeoutError()) == "no answer in time (TimeoutError)"
    assert cause_of(ConnectionResetError()) == "ConnectionResetError"
    assert cause_of(aiohttp.ClientPayloadError("cut")) == "cut (ClientPayloadError)"


def test_a_store_that_has_answered_is_waited_for_longer() -> None:
    outage = botocore.exceptions.EndpointConnectionError(endpoint_url="http://x")
    for known, wanted in ((True, 31), (False, QUICK.attempts)):
        calls: list[float] = []
        request = failing([outage] * 30, calls)
        if known:
            assert QUICK.run(request, known=True) == "done"
        else:
            with pytest.raises(botocore.exceptions.EndpointConnectionError):
                QUICK.run(request)
        assert len(calls) == wanted


def test_what_a_store_answers_counts_also_between_outages() -> None:
    calls: list[float] = []
    errors: list[BaseException] = [ConnectionRefusedError("down"), OSError(errno.EBUSY, "starting")] * QUICK.attempts
    with pytest.raises(OSError, match="starting"):
        QUICK.run(failing(errors, calls), known=True)
    assert len(calls) == 2 * QUICK.attempts


def test_waiting_for_a_store_ends_too() -> None:
    policy = RetryPolicy(deadline_s=0.2, first_pause_s=0.01, longest_pause_s=0.02)
    with pytest.raises(ConnectionRefusedError):
        policy.run(failing([ConnectionRefusedError("down")] * 1000, []), known=True)


def unhandled(behind: BaseException) -> botocore.exceptions.HTTPClientError:
    """What botocore makes of an error that its HTTP client does not know."""
    error = botocore.exceptions.HTTPClientError(error=behind)
    error.__context__ = behind
    return error


@pytest.mark.parametrize(
    "error",
    [
        unhandled(TypeError("'<=' not supported")),
        unhandled(ValueError("newlines are not allowed in headers")),
        unhandled(FileNotFoundError("certificates")),
        botocore.exceptions.ProfileNotFound(profile="x"),
        botocore.exceptions.ConfigParseError(path="x", error="y"),
        refusal("InvalidBucketName"),
    ],
)
def test_mistakes_of_the_user_are_told_from_faults(error: BaseException) -> None:
    calls: list[float] = []
    assert is_mistake(error)
    with pytest.raises(type(error)):
        QUICK.run(failing([error], calls))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "error", [unhandled(ConnectionResetError("cut")), unhandled(TimeoutError()), OSError("x"), TypeError("x")]
)
def test_faults_are_no_mistakes(error: BaseException) -> None:
    assert not is_mistake(error)


def test_a_store_that_has_answered_is_set_up_well() -> None:
    assert QUICK.run(failing([unhandled(ValueError("garbage"))], []), known=True) == "done"


def test_each_repetition_is_told_and_the_last_error_raised() -> None:
    told: list[BaseException] = []
    errors: list[BaseException] = [OSError("a"), OSError("b"), PermissionError("c")]
    with pytest.raises(PermissionError):
        QUICK.run(failing(list(errors), []), repeats=told.append)
    assert told == errors[:2]
