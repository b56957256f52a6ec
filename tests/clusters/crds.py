"""KubeRay's resource definitions as strict JSON Schemas.

Kubernetes drops what a definition does not know without a word; here it is an error.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).parents[2]
# The definitions are KubeRay's, and too large to keep here.
FOLDER = Path(os.environ.get("GEOMERGE_KUBERAY_CRDS", ROOT.parent / "shared/kuberay"))
_PLURALS = {"RayJob": "rayjobs", "RayCronJob": "raycronjobs"}


def available() -> bool:
    """Whether the definitions are on this machine."""
    return all(_file(kind).is_file() for kind in _PLURALS)


def problems(document: dict[str, Any]) -> list[str]:
    """Return what the definition of a document's kind finds wrong with it, each with its place."""
    return _wrong(document, schema(document["kind"]))


def template_problems(template: dict[str, Any]) -> list[str]:
    """Return what is wrong with a pod template, wherever it stands: the definitions of KubeRay hold all of one."""
    cluster = schema("RayJob")["properties"]["spec"]["properties"]["rayClusterSpec"]
    return _wrong(template, cluster["properties"]["headGroupSpec"]["properties"]["template"])


@cache
def schema(kind: str) -> dict[str, Any]:
    """Return the strict schema of a kind in version v1."""
    # The C loader: a definition has tens of thousands of lines.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load(_file(kind).read_text(), Loader=loader)
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    strict: dict[str, Any] = _strict(version["schema"]["openAPIV3Schema"])
    # The definition leaves these to Kubernetes.
    strict["properties"]["metadata"] = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
        },
        "required": ["name"],
        "additionalProperties": False,
    }
    strict["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return strict


def _file(kind: str) -> Path:
    return FOLDER / f"ray.io_{_PLURALS[kind]}.yaml"


def _wrong(value: Any, strict: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(strict).iter_errors(value)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]


def _strict(node: Any) -> Any:
    """Return a schema that forbids properties it does not list, and takes "integer or string" at its word."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: _strict(value) for key, value in node.items()}
    if node.get("x-kubernetes-int-or-string") is True:
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    listed = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if listed and not node.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result
