"""A real helm, and the schemas that rendered objects are held against."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helpers.kuberay import refusals
from helpers.kubernetes import tool

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.37"
OUTSIDE_KINDS = {"PodMonitor", "PrometheusRule"}  # of the Prometheus operator, whose schemas are not at hand

Document = dict[str, Any]
Helm = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Runs helm from PATH, else the one that a kubectl layer of the development group carries."""
    binary = tool("helm", tmp_path_factory.mktemp("helm"))
    home = tmp_path_factory.mktemp("helm-home")
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": str(home / "none")}

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [binary, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture(scope="session")
def render(helm: Helm) -> Callable[..., list[Document]]:
    """`helm template`, parsed, once for the same flags; a refusal by the chart fails the test."""

    @cache
    def rendered(chart: str, *flags: str | Path) -> list[Document]:
        done = helm("template", "lungseg", f"helm/{chart}", *flags)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return lambda chart, *flags: copy.deepcopy(rendered(chart, *flags))


@pytest.fixture(scope="session")
def render_one(render: Callable[..., list[Document]]) -> Callable[..., Document]:
    """The one object of a kind that `helm template` gives."""

    def run(kind: str, chart: str, *flags: str | Path) -> Document:
        (found,) = (document for document in render(chart, *flags) if document["kind"] == kind)
        return found

    return run


@pytest.fixture(scope="session")
def validate() -> Callable[[Document], None]:
    """Raises for an object that Kubernetes or KubeRay would refuse or prune, unknown fields included."""
    schemas: dict[str, jsonschema.Draft202012Validator] = {}

    def check(document: Document) -> None:
        kind = document["kind"]
        if document["apiVersion"].startswith("ray.io/"):
            assert refusals(document) == []
            if kind not in schemas:
                schemas[kind] = _kuberay_schema(kind)
            schemas[kind].validate(document)
        elif kind not in OUTSIDE_KINDS:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)

    return check


def _kuberay_schema(kind: str) -> jsonschema.Draft202012Validator:
    folder = Path(os.environ.get("LUNGSEG_KUBERAY_CRDS", ROOT.parent / "shared/k8s/crds"))
    path = folder / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"no {path}: set LUNGSEG_KUBERAY_CRDS to a folder with KubeRay 1.7's CRDs")
    crd = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    (version,) = (one for one in crd["spec"]["versions"] if one["name"] == "v1")
    schema = _closed(version["schema"]["openAPIV3Schema"])
    # The API server knows these better than the CRD, which says no more than "object".
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return jsonschema.Draft202012Validator(schema)


def _closed(node: Any) -> Any:
    """The structural schema as JSON Schema that refuses what the API server would prune.

    A field under CEL rules is refused altogether: nothing here evaluates them, so what uses such a field
    must not pass unnoticed. Rules on what it was before do not bind a new object.
    """
    if isinstance(node, list):
        return [_closed(one) for one in node]
    if not isinstance(node, dict):
        return node
    if any("oldSelf" not in one["rule"] for one in node.get("x-kubernetes-validations", [])):
        return False
    closed = {key: _closed(value) for key, value in node.items() if key not in ("properties", "default")}
    if "properties" in node:
        closed["properties"] = {name: _closed(field) for name, field in node["properties"].items()}
    if node.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
    keeps = node.get("x-kubernetes-preserve-unknown-fields")
    if node.get("type") == "object" and "additionalProperties" not in node and not keeps:
        closed["additionalProperties"] = False
    return closed
