"""A release of the chart on a cluster, with its bundled store and a few scans, and what runs in it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from helpers.kubernetes import Namespace, wait
from helpers.painted import write_pairs

VALUES = """
head: {cpu: 500m, memory: 3Gi}
workers: [{name: cpu, replicas: 2, cpu: 1, memory: 3Gi}]
objectStore: {bundled: {enabled: true, cpu: 200m, memory: 1Gi, size: 1Gi}}
caseKey: {generate: true}
networkPolicy: {from: [{podSelector: {matchLabels: {lungseg-peer: listed}}}]}
"""
DATA = {"split": {"val": 0.25, "test": 0.25, "seed": 2}, "patch": {"shape_zyx": [16, 16, 16]}}
PREPARE = ["--set=job=prepare,data=scans,source.kind=pairs", f"--set-json=settings.data={json.dumps(DATA)}"]
PORTS = {"dashboard": ("lungseg-head-svc", 8265), "gcs": ("lungseg-head-svc", 6379)}
PORTS |= {"store": ("lungseg-store", 8333)}


def write_values(namespace: Namespace, image: str, folder: Path) -> list[str]:
    """The chart and its values, for helm."""
    repository, _, tag = image.rpartition(":")
    values = {**yaml.safe_load(VALUES), **make_scans(namespace, folder)}
    values["image"] = {"repository": repository, "tag": tag}
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    return ["helm/lungseg", f"--values={folder}/values.yaml"]


def make_scans(namespace: Namespace, folder: Path) -> dict[str, Any]:
    """Scans and masks in a ConfigMap, as every cluster can hold them; the values that mount it."""
    write_pairs(folder, 8)
    files = [str(path.relative_to(folder)) for path in folder.rglob("*.*")]
    items = [{"key": re.sub(r"[^\w.-]", "_", file), "path": file} for file in files]
    data = {one["key"]: base64.b64encode((folder / one["path"]).read_bytes()).decode() for one in items}
    scans = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "scans"}, "binaryData": data}
    namespace.kubectl("create", "-f", "-", stdin=json.dumps(scans))
    return {
        "extraVolumes": [{"name": "scans", "configMap": {"name": "scans", "items": items}}],
        "extraVolumeMounts": [{"name": "scans", "mountPath": "/inputs", "readOnly": True}],
    }


def install(namespace: Namespace, values: Sequence[str]) -> None:
    """All pods are there when it returns."""
    namespace.helm("install", "lungseg", *values)
    ready = ["raycluster/lungseg", "--for=condition=RayClusterProvisioned", "--timeout=900s"]
    namespace.kubectl("wait", *ready, seconds=910)


def run_job(namespace: Namespace, name: str, *values: str) -> dict[str, Any]:
    namespace.helm("install", name, "helm/lungseg-job", *values)
    return namespace.finished(name, 900)


def reached(namespace: Namespace, image: str, name: str, labels: dict[str, str]) -> set[str]:
    """Which of PORTS a pod of these labels, and of no release, can connect to."""
    ask = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    tries = " ".join(
        f"python -c '{ask}' {host} {port} 2>/dev/null && echo {key};" for key, (host, port) in PORTS.items()
    )
    container = {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", f"{tries} true"],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"restartPolicy": "Never", "securityContext": security, "containers": [container]}
    meta = {"name": name, "labels": labels}
    namespace.kubectl("create", "-f", "-", stdin=json.dumps(
        {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
    ))  # fmt: skip
    wait("it has tried", lambda: namespace.get("pod", name)["status"]["phase"] == "Succeeded", 120)
    return set(namespace.kubectl("logs", name).split())
