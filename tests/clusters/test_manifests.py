"""The files for Kubernetes are what KubeRay and geomerge's own command line take, by their definitions."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import pipeline
from pipeline.cli import main
from tests.clusters import crds

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
README = (CLUSTERS / "README.md").read_text()
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
UNITS = {"Gi": 1 << 30, "Mi": 1 << 20}
# What Ray's own processes on a worker's pod take, beside the workers.
RAY_BYTES = 2_000_000_000

needs_definitions = pytest.mark.skipif(
    not crds.available(), reason=f"KubeRay's definitions are not at {crds.FOLDER}; GEOMERGE_KUBERAY_CRDS names a folder"
)


def documents(name: str) -> dict[str, dict[str, Any]]:
    """The documents of a file by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((CLUSTERS / name).read_text())}


def job_spec(name: str) -> dict[str, Any]:
    """The spec of the RayJob that a file is about."""
    if name == "nightly.yaml":
        return documents(name)["RayCronJob"]["spec"]["jobTemplate"]
    return documents(name)["RayJob"]["spec"]


def container(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]["containers"][0]


def parsed(command: str) -> dict[str, Any]:
    """What geomerge's command line makes of a command; a mistake is a usage error."""
    words = shlex.split(command)
    assert words[0] == "geomerge"
    with main.make_context("geomerge", words[1:]) as context:
        name, verb, rest = main.resolve_command(context, [*context._protected_args, *context.args])
        assert verb is not None
        with verb.make_context(name, rest, parent=context) as inner:
            return {"command": name, **inner.params}


JOBS = ("rayjob.yaml", "nightly.yaml")


@needs_definitions
@pytest.mark.parametrize(("name", "kind"), [("rayjob.yaml", "RayJob"), ("nightly.yaml", "RayCronJob")])
def test_kuberay_takes_it(name: str, kind: str) -> None:
    document = documents(name)[kind]
    assert document["apiVersion"] == "ray.io/v1"
    assert crds.problems(document) == []


@needs_definitions
def test_kubernetes_takes_the_pod_of_redis() -> None:
    found = documents("redis.yaml")
    template = found["Deployment"]["spec"]["template"]
    assert crds.template_problems(template) == []
    labels = template["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels == found["Service"]["spec"]["selector"]


def _misspell(spec: dict[str, Any]) -> None:
    spec["backofLimit"] = spec.pop("backoffLimit")


def _misspell_deep(spec: dict[str, Any]) -> None:
    container(spec["rayClusterSpec"]["headGroupSpec"])["imag"] = "x"


def _no_group_name(spec: dict[str, Any]) -> None:
    del spec["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]


def _wrong_type(spec: dict[str, Any]) -> None:
    spec["backoffLimit"] = "3"


def _unquoted_parameter(spec: dict[str, Any]) -> None:
    spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _wrong_mode(spec: dict[str, Any]) -> None:
    spec["rayClusterSpec"]["authOptions"]["mode"] = "tokens"


@needs_definitions
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_misspell, "'backofLimit' was unexpected"),
        (_misspell_deep, "'imag' was unexpected"),
        (_no_group_name, "'groupName' is a required property"),
        (_wrong_type, "'3' is not of type 'integer'"),
        (_unquoted_parameter, "0 is not of type 'string'"),
        (_wrong_mode, "'tokens' is not one of"),
    ],
)
def test_a_mistake_is_found(change: Callable[[dict[str, Any]], None], said: str) -> None:
    """The check of the files would notice: Kubernetes itself drops an unknown field without a word."""
    document = copy.deepcopy(documents("rayjob.yaml")["RayJob"])
    change(document["spec"])
    found = crds.problems(document)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize("name", JOBS)
def test_what_the_operator_refuses_is_not_there(name: str) -> None:
    """Rules that no definition holds, as KubeRay's controller has them."""
    spec = job_spec(name)
    # A submission mode is any string to the definition.
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode")
    # A time to live is refused where the cluster is not shut down.
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] >= 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["backoffLimit"] > 0
    # Tokens need the version spelled out, and 2.52; a drain on SIGTERM 2.60.
    assert tuple(map(int, spec["rayClusterSpec"]["rayVersion"].split("."))) >= (2, 60, 0)
    # The password goes through these options and nowhere else.
    head = spec["rayClusterSpec"]["headGroupSpec"]
    assert "redis-password" not in head["rayStartParams"]
    assert {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}.isdisjoint(_environment(head))


def _environment(group: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in container(group).get("env", [])}


@pytest.mark.parametrize("name", JOBS)
def test_workers_have_room_and_time_to_leave(name: str) -> None:
    spec = job_spec(name)
    asked = parsed(spec["entrypoint"])
    cluster = spec["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    resources = container(group)["resources"]
    assert resources["requests"] == resources["limits"]
    cores = int(resources["limits"]["cpu"])
    memory = resources["limits"]["memory"]
    memory_bytes = int(memory[:-2]) * UNITS[memory[-2:]]
    per_pod = -(-asked["workers"] // group["replicas"])
    assert per_pod <= cores
    assert per_pod * asked["memory"] + RAY_BYTES <= memory_bytes
    drain_s = float(_environment(group)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    grace_s = group["template"]["spec"]["terminationGracePeriodSeconds"]
    # Two minutes from the notice to the end of a spot node of AWS.
    assert drain_s + 10 <= grace_s < 120
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"]["mode"] == "token"


def test_the_night_runs_on_the_cluster_of_the_single_merge() -> None:
    assert job_spec("nightly.yaml")["rayClusterSpec"] == job_spec("rayjob.yaml")["rayClusterSpec"]
    # A night ends before the next.
    assert job_spec("nightly.yaml")["activeDeadlineSeconds"] < 24 * 3600
    assert re.fullmatch(r"\d+ \d+ \* \* \*", documents("nightly.yaml")["RayCronJob"]["spec"]["schedule"])


def test_the_password_of_redis_has_one_place() -> None:
    option = job_spec("rayjob.yaml")["rayClusterSpec"]["gcsFaultToleranceOptions"]
    redis = container(documents("redis.yaml")["Deployment"]["spec"])
    (variable,) = redis["env"]
    assert option["redisPassword"]["valueFrom"] == variable["valueFrom"]
    service = documents("redis.yaml")["Service"]
    port = service["spec"]["ports"][0]["port"]
    assert option["redisAddress"] == f"redis://{service['metadata']['name']}:{port}"


@pytest.mark.parametrize(("name", "command"), [("rayjob.yaml", "merge"), ("nightly.yaml", "batch")])
def test_the_entrypoint_is_a_command_of_geomerge(name: str, command: str) -> None:
    asked = parsed(job_spec(name)["entrypoint"])
    assert asked["command"] == command
    # Ray sets the address for the entrypoint of a job, and "auto" finds it.
    assert asked["executor"] == "auto"
    assert asked["address"] is None


@pytest.mark.parametrize("wrong", ["geomerge merge a", "geomerge merge a b --worker 8", "geomerge batsh a b"])
def test_a_wrong_entrypoint_is_found(wrong: str) -> None:
    with pytest.raises(click.UsageError):
        parsed(wrong)


def _commands(text: str) -> Iterator[str]:
    """Commands of geomerge in the code blocks of a document, plain or behind submit.sh."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "geomerge" in words[:1]:
                yield shlex.join(words)
            elif any(word.endswith("submit.sh") for word in words):
                after = next(number for number, word in enumerate(words) if word.endswith("submit.sh"))
                yield shlex.join(["geomerge", *words[after + 2 :]])


def test_commands_of_the_readme_are_commands_of_geomerge() -> None:
    commands = list(_commands(README))
    assert len(commands) >= 3
    for command in commands:
        parsed(command)


def test_links_of_the_readme_lead_somewhere() -> None:
    links = [link for link in LINK.findall(README) if "://" not in link]
    assert links
    assert [link for link in links if not (CLUSTERS / link).exists()] == []
    # It speaks of every file beside it.
    files = {path.name for path in CLUSTERS.iterdir()} - {"README.md", "Dockerfile.dockerignore"}
    assert [name for name in sorted(files) if name not in README] == []


def test_versions_are_those_of_the_tests() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"\S+==", line)
    )
    for name in JOBS:
        cluster = job_spec(name)["rayClusterSpec"]
        assert cluster["rayVersion"] == pins["ray"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert container(group)["image"] == f"REGISTRY/geomerge:{pipeline.__version__}"
    assert f"geomerge:{pipeline.__version__} " in (CLUSTERS / "Dockerfile").read_text()


# A key of AWS, a private key, or a word for a secret with something after it that is no reference.
_SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:secret_access_key|auth_token|password)[ \t]*[:=][ \t]*['\"]?[^\s{$~'\"]"
)


@pytest.mark.parametrize("text", ["AWS_SECRET_ACCESS_KEY: abc", "RAY_AUTH_TOKEN=0123", "password: 'x'"])
def test_a_credential_would_be_found(text: str) -> None:
    assert _SECRET.search(text)


def test_no_file_holds_a_credential() -> None:
    assert [path.name for path in CLUSTERS.iterdir() if _SECRET.search(path.read_text())] == []
