"""From `helm install` to a pulled checkpoint, on real pods that may do no more than `restricted` allows."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from helpers.kubernetes import Namespace, wait
from helpers.painted import write_pairs

# The first test's seconds are also those of the image: a quarter of an hour on a busy machine.
pytestmark = [pytest.mark.kubernetes, pytest.mark.xdist_group("kubernetes"), pytest.mark.timeout(2400)]
VALUES = """
head: {cpu: 500m, memory: 3Gi}
workers: [{name: cpu, replicas: 2, cpu: 1, memory: 3Gi}]
objectStore: {bundled: {enabled: true, cpu: 200m, memory: 1Gi, size: 1Gi}}
caseKey: {generate: true}
"""
DATA = {"split": {"val": 0.25, "test": 0.25, "seed": 2}, "patch": {"shape_zyx": [16, 16, 16]}}
PREPARE = ["--set=job=prepare,data=scans,source.kind=pairs", f"--set-json=settings.data={json.dumps(DATA)}"]
TRAIN = ["--set=data=scans,run=first,recipe=jobs/recipes/smoke.yaml,settings.train.workers=2"]


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


def write_values(namespace: Namespace, image: str, folder: Path) -> list[str]:
    """The chart and its values, for helm."""
    repository, _, tag = image.rpartition(":")
    values = {**yaml.safe_load(VALUES), **make_scans(namespace, folder)}
    values["image"] = {"repository": repository, "tag": tag}
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    return ["helm/lungseg", f"--values={folder}/values.yaml"]


def run_job(namespace: Namespace, name: str, *values: str, seconds: float = 300) -> dict[str, Any]:
    namespace.helm("install", name, "helm/lungseg-job", *values)
    return namespace.finished(name, seconds)


@pytest.fixture(scope="module")
def namespace(make_namespace: Callable[[], Namespace]) -> Namespace:
    return make_namespace()


@pytest.fixture(scope="module")
def release(namespace: Namespace, image: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What it was installed from; all pods are there."""
    values = write_values(namespace, image, tmp_path_factory.mktemp("release"))
    namespace.helm("install", "lungseg", *values)
    ready = ["raycluster/lungseg", "--for=condition=RayClusterProvisioned", "--timeout=300s"]
    namespace.kubectl("wait", *ready, seconds=310)
    return values


@pytest.fixture(scope="module")
def prepared(namespace: Namespace, release: list[str]) -> dict[str, Any]:
    return run_job(namespace, "prepare", *PREPARE)


@pytest.fixture(scope="module")
def trained(namespace: Namespace, prepared: dict[str, Any]) -> dict[str, Any]:
    return run_job(namespace, "train", *TRAIN, seconds=420)


def test_workers_are_on_two_nodes_and_no_ray_pod_may_ask_kubernetes(
    namespace: Namespace, release: list[str]
) -> None:
    workers = namespace.pods("ray.io/node-type=worker")
    assert len({pod["spec"]["nodeName"] for pod in workers}) == len(workers) == 2
    (head,) = namespace.pods("ray.io/node-type=head")
    look = "test ! -e /var/run/secrets/kubernetes.io"
    for pod in (head, *workers):
        namespace.kubectl("exec", pod["metadata"]["name"], "--", "sh", "-c", look)


def test_trainings_metrics_are_served(namespace: Namespace, trained: dict[str, Any]) -> None:
    with (
        namespace.forwarded("lungseg-head-svc", 9464) as url,
        urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer,
    ):
        shown = answer.read().decode()
    counts = re.findall(r'^lungseg_step_seconds_count\{.*run="first".* ([0-9.]+)$', shown, re.MULTILINE)
    assert list(map(float, counts)) == [8.0, 8.0]  # two epochs of four steps on each of two workers


def test_checkpoint_and_report_are_pulled_by_lungseg_and_by_a_plain_client(
    namespace: Namespace, trained: dict[str, Any], tmp_path: Path
) -> None:
    run_job(
        namespace, "evaluate", "--set=job=evaluate,run=first"
    )  # on workers: the head has no CPU for tasks
    secret = namespace.get("secret", "lungseg-store")["data"]
    keys = {name: base64.b64decode(value).decode() for name, value in secret.items()}
    with namespace.forwarded("lungseg-store", 8333) as url:
        pull = ["pull", "--store", "s3://lungseg", "--run", "first", "--out", str(tmp_path)]
        done = subprocess.run(
            [sys.executable, "-m", "lungseg.cli", *pull],
            env={**namespace.environment, **keys, "AWS_ENDPOINT_URL": url},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        )
        plain = client.get_object(Bucket="lungseg", Key="runs/first/best/model.keras")["Body"].read()
        listed = client.list_objects_v2(Bucket="lungseg", Prefix="runs/first/evaluations/")["Contents"]
    assert (tmp_path / "model.keras").read_bytes() == plain
    assert {".html", ".json"} <= {Path(one["Key"]).suffix for one in listed}


def test_a_strangers_pod_reaches_neither_ray_nor_the_store(
    namespace: Namespace, release: list[str], image: str
) -> None:
    ask = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)"
    targets = [("lungseg-head-svc", "8265"), ("lungseg-head-svc", "6379"), ("lungseg-store", "8333")]
    tries = " ".join(
        f"python -c '{ask}' {host} {port} 2>/dev/null && echo in || echo out;" for host, port in targets
    )
    container = {
        "name": "stranger",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", tries],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"restartPolicy": "Never", "securityContext": security, "containers": [container]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "stranger"}, "spec": spec}
    namespace.kubectl("create", "-f", "-", stdin=json.dumps(pod))
    wait("it has tried", lambda: namespace.get("pod", "stranger")["status"]["phase"] == "Succeeded", 120)
    assert namespace.kubectl("logs", "stranger").split() == ["out"] * 3


def test_an_upgrade_leaves_running_pods_and_says_so_and_uninstall_leaves_the_data(
    namespace: Namespace, release: list[str], trained: dict[str, Any]
) -> None:
    before = {pod["metadata"]["uid"] for pod in namespace.pods("ray.io/cluster=lungseg")}
    keys = (
        namespace.get("secret", "lungseg-store")["data"],
        namespace.get("secret", "lungseg-case-key")["data"],
    )
    notes = namespace.helm("upgrade", "lungseg", *release, "--set=podLabels.changed=yes")
    assert "kubectl -n" in notes
    assert "Running pods keep what they were started with" in notes
    after = {pod["metadata"]["uid"] for pod in namespace.pods("ray.io/cluster=lungseg")}
    assert (len(before), after) == (3, before)
    assert keys == (
        namespace.get("secret", "lungseg-store")["data"],
        namespace.get("secret", "lungseg-case-key")["data"],
    )
    for job in ("train", "prepare"):
        namespace.helm("uninstall", job)
    namespace.helm("uninstall", "lungseg")
    wait("all pods are gone", lambda: not namespace.pods("app.kubernetes.io/instance=lungseg"), 180)
    claims = [claim["metadata"]["name"] for claim in namespace.get("pvc")["items"]]
    assert claims == ["data-lungseg-store-0"]
    assert namespace.get("secret", "lungseg-case-key")["data"] == keys[1]


def test_a_job_brings_a_cluster_that_grows_from_no_worker_and_takes_it_away(
    make_namespace: Callable[[], Namespace], image: str, tmp_path: Path
) -> None:
    namespace = make_namespace()
    values = [*write_values(namespace, image, tmp_path), "--set=autoscaling.enabled=true"]
    values.append("--set=workers[0].replicas=0,workers[0].maxReplicas=1")
    namespace.helm("install", "lungseg", *values, "--set=standingCluster=false")
    namespace.kubectl("rollout", "status", "statefulset/lungseg-store", "--timeout=120s", seconds=130)
    shown = namespace.helm("template", "lungseg", *values, "--show-only=templates/raycluster.yaml")
    (tmp_path / "cluster.yaml").write_text(shown)
    own = f"--set-file=ownCluster.rayCluster={tmp_path}/cluster.yaml"
    run_job(namespace, "own", *PREPARE, own, "--set=ownCluster.ttlSecondsAfterFinished=5")
    wait("the job's cluster is gone", lambda: not namespace.get("raycluster")["items"], 120)
