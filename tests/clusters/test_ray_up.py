"""The file for `ray up` and the runtime environment are what Ray itself takes, by its own validators."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
AWS: dict[str, Any] = yaml.safe_load((CLUSTERS / "aws-gpu.yaml").read_text())
RUNTIME: dict[str, Any] = yaml.safe_load((CLUSTERS / "runtime-env.yaml").read_text())


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a file before it asks the cloud; raises where it would refuse."""
    # Ray has no public word for it, and no dry run.
    from ray.autoscaler._private.util import prepare_config, validate_config

    result: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(result)
    return result


def test_ray_takes_the_cluster() -> None:
    result = prepared(AWS)
    assert set(result["available_node_types"]) == {"head", "gpu_worker", "cpu_worker"}
    # Ray's default commands would start a head that takes workers; none of them is left.
    assert result["head_start_ray_commands"] == AWS["head_start_ray_commands"]
    assert result["worker_start_ray_commands"] == AWS["worker_start_ray_commands"]
    assert result["head_setup_commands"] == result["worker_setup_commands"] == AWS["setup_commands"]


def _misspell(config: dict[str, Any]) -> None:
    config["idle_timeout_minute"] = config.pop("idle_timeout_minutes")


def _misspell_node(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu_worker"]["min_worker"] = 1


def _wrong_type(config: dict[str, Any]) -> None:
    config["max_workers"] = "8"


def _no_such_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "heads"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_misspell, "'idle_timeout_minute' was unexpected"),
        (_misspell_node, "'min_worker' was unexpected"),
        (_wrong_type, "'8' is not of type 'integer'"),
        (_no_such_head, "`head_node_type` must be one of"),
    ],
)
def test_a_mistake_is_found(change: Callable[[dict[str, Any]], None], said: str) -> None:
    config = copy.deepcopy(AWS)
    change(config)
    with pytest.raises((jsonschema.ValidationError, ValueError), match=said):
        prepared(config)


def test_only_workers_are_on_spot_nodes() -> None:
    """The words of EC2, which Ray hands on unread: a misspelt one would start an expensive or open node."""
    known = {
        "InstanceType",
        "ImageId",
        "IamInstanceProfile",
        "MetadataOptions",
        "BlockDeviceMappings",
        "InstanceMarketOptions",
    }
    for name, kind in AWS["available_node_types"].items():
        node = kind["node_config"]
        assert set(node) <= known
        assert re.fullmatch(r"ami-[0-9a-f]{17}", node["ImageId"])
        assert re.fullmatch(r"arn:aws:iam::\d{12}:instance-profile/[\w-]+", node["IamInstanceProfile"]["Arn"])
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
        spot = node.get("InstanceMarketOptions")
        assert spot == (None if name == "head" else {"MarketType": "spot"})
    assert AWS["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0 --num-gpus=0" in AWS["head_start_ray_commands"][-1]


def test_every_node_has_the_token_and_geomerge() -> None:
    assert AWS["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    setup = "\n".join(AWS["setup_commands"])
    assert "RAY_AUTH_MODE=token" in setup
    assert "-c ~/geomerge/constraints.txt ~/geomerge " in setup
    # The worker's script is where the repository is mounted.
    mounted = {remote: local for remote, local in AWS["file_mounts"].items() if "/geomerge/" in remote}
    assert all(remote == f"/home/ubuntu/geomerge/{local}" for remote, local in mounted.items())
    assert {"pipeline", "clusters", "pyproject.toml", "constraints.txt"} <= set(mounted.values())
    assert all((ROOT / local).exists() for local in mounted.values())
    assert "~/geomerge/clusters/spot-worker.sh ray start " in AWS["worker_start_ray_commands"][-1]
    assert os.access(CLUSTERS / "spot-worker.sh", os.X_OK)


@pytest.mark.parametrize("field", ["setup_commands", "head_start_ray_commands", "worker_start_ray_commands"])
def test_commands_are_shell(field: str) -> None:
    for command in AWS[field]:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_ray_takes_the_runtime_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.runtime_env import RuntimeEnv

    monkeypatch.chdir(ROOT)
    assert RuntimeEnv(**RUNTIME)["pip"]["packages"] == RUNTIME["pip"]["packages"]
    with pytest.raises(ValueError, match="not a valid"):
        RuntimeEnv(**{**RUNTIME, "working_dir": "no/such/folder"})


def test_the_runtime_environment_has_what_geomerge_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [requirement for requirement in project["dependencies"] if not requirement.startswith("ray")]
    assert RUNTIME["pip"]["packages"] == needed
    # All of it shows in the dashboard.
    assert not re.search("SECRET|TOKEN|PASSWORD|KEY", " ".join(RUNTIME["env_vars"]))
    assert not {"pipeline", "pyproject.toml"} & set(RUNTIME["excludes"])
