"""What helm/lungseg renders is what Kubernetes and KubeRay take; wrong values are refused by name."""

from __future__ import annotations

import copy
import json
import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from lungseg.config import load_recipe

ROOT = Path(__file__).parents[2]
VALUES = sorted(ROOT.glob("deploy/values-*.yaml"))
SECRETIVE = re.compile(r"secret|token|password|access_key", re.IGNORECASE)
EVERYTHING = """
upgradeStrategy: Recreate
image: {pullSecrets: [registry]}
auth: {mode: token, existingSecret: ray-token}
workers:
  - {name: cpu, replicas: 1, minReplicas: 0, maxReplicas: 3, cpu: 4, memory: 8Gi}
  - name: gpu
    replicas: 1
    cpu: 8
    memory: 64Gi
    gpus: 4
    scratch: 100Gi
    nodeSelector: {pool: gpu}
    tolerations: [{key: gpu, operator: Exists}]
autoscaling: {enabled: true}
objectStore: {bundled: {enabled: true, storageClass: fast}}
inputs: {existingClaim: dicom}
extraEnv:
  - {name: TF_CPP_MIN_LOG_LEVEL, value: "1"}
  - name: PROXY_PASSWORD
    valueFrom: {secretKeyRef: {name: proxy, key: password}}
serviceAccount: {annotations: {role: trainer}}
podMonitor: {enabled: true, labels: {release: prometheus}}
networkPolicy:
  from: [{podSelector: {matchLabels: {app: notebook}}}]
"""

Render = Callable[..., list[dict[str, Any]]]
RenderOne = Callable[..., dict[str, Any]]
Validate = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("values") / "everything.yaml"
    path.write_text(EVERYTHING)
    return path


def pods(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The pod specs of a RayCluster, head first, and of the bundled store."""
    for document in documents:
        if document["kind"] == "RayCluster":
            spec = document["spec"]
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                yield group["template"]["spec"]
        elif document["kind"] == "StatefulSet":
            yield document["spec"]["template"]["spec"]


def containers(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for pod in pods(documents):
        yield from pod["containers"]


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_every_environment_passes_lint_and_both_schemas(
    values: Path, helm: Callable[..., Any], render: Render, validate: Validate
) -> None:
    linted = helm("lint", "--strict", "helm/lungseg", "--values", values)
    assert linted.returncode == 0, linted.stdout + linted.stderr
    for document in render("lungseg", "--values", values):
        validate(document)


def test_the_defaults_and_every_option_at_once_pass_both_schemas(
    everything: Path, render: Render, validate: Validate
) -> None:
    for flags in (
        [],
        ["--values", everything],
        ["--set=networkPolicy.enabled=false,podDisruptionBudget.enabled=false"],
    ):
        for document in render("lungseg", *flags):
            validate(document)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("RayCluster", ["spec", "headGroupSpec"]),
        (
            "RayCluster",
            ["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "securityContext"],
        ),
        ("StatefulSet", ["spec", "template", "spec"]),
        ("NetworkPolicy", ["spec", "ingress", 0]),
    ],
)
def test_an_unknown_field_fails_validation(
    kind: str, where: list[Any], everything: Path, render: Render, validate: Validate
) -> None:
    document = next(one for one in render("lungseg", "--values", everything) if one["kind"] == kind)
    validate(document)
    mutated = copy.deepcopy(document)
    target: Any = mutated
    for step in where:
        target = target[step]
    target["misspelt"] = "x"
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(mutated)


def test_no_secret_is_the_value_of_an_environment_variable(everything: Path, render: Render) -> None:
    for flags in (["--values", everything], *(["--values", path] for path in VALUES)):
        for container in containers(render("lungseg", *flags)):
            for variable in container.get("env", []):
                if SECRETIVE.search(variable["name"]):
                    assert set(variable) == {"name", "valueFrom"}, variable


def test_the_bundled_stores_secret_appears_in_its_secret_only(
    everything: Path, render: Render, render_one: RenderOne
) -> None:
    documents = render("lungseg", "--values", everything)
    (secret,) = (document for document in documents if document["kind"] == "Secret")
    data = {key: b64decode(value).decode() for key, value in secret["data"].items()}
    (identity,) = json.loads(data["s3.json"])["identities"]
    assert identity["credentials"] == [
        {"accessKey": data["AWS_ACCESS_KEY_ID"], "secretKey": data["AWS_SECRET_ACCESS_KEY"]}
    ]
    assert len(data["AWS_SECRET_ACCESS_KEY"]) == 40
    elsewhere = yaml.safe_dump_all([document for document in documents if document is not secret])
    assert data["AWS_ACCESS_KEY_ID"] not in elsewhere
    assert data["AWS_SECRET_ACCESS_KEY"] not in elsewhere
    again = render_one("Secret", "lungseg", "--values", everything)
    assert again["data"] != secret["data"], "a credential that every installation shares"


def test_pods_are_unprivileged_and_what_they_request_is_their_limit(everything: Path, render: Render) -> None:
    documents = render("lungseg", "--values", everything)
    for pod in pods(documents):
        assert pod["securityContext"]["runAsNonRoot"] is True
    found = list(containers(documents))
    assert len(found) == 4
    for container in found:
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_workers_take_a_node_each_and_the_head_takes_no_tasks(
    everything: Path, render_one: RenderOne
) -> None:
    spec = render_one("RayCluster", "lungseg", "--values", everything)["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    gpus = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for group in spec["workerGroupSpecs"]
    ]
    assert gpus == [None, 4]
    assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0, 1]
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (rule,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule["topologyKey"] == "kubernetes.io/hostname"
        assert rule["labelSelector"]["matchLabels"] == {
            "ray.io/cluster": "lungseg",
            "ray.io/node-type": "worker",
        }
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


def test_a_stopped_driver_has_time_to_commit_before_its_pod_goes(render_one: RenderOne) -> None:
    spec = render_one("RayCluster", "lungseg")["spec"]["headGroupSpec"]["template"]["spec"]
    environment = {one["name"]: one.get("value") for one in spec["containers"][0]["env"]}
    assert environment["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert 3 < int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) < spec["terminationGracePeriodSeconds"]


def test_only_the_cluster_and_the_operator_reach_ray(render_one: RenderOne) -> None:
    first, second = render_one("NetworkPolicy", "lungseg")["spec"]["ingress"]
    assert first == {"from": [{"podSelector": {"matchLabels": {"ray.io/cluster": "lungseg"}}}]}
    assert second["ports"] == [{"protocol": "TCP", "port": 8265}]
    (peer,) = second["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay-system"}


def test_trainings_metrics_are_open_on_the_head_and_to_prometheus_alone(
    everything: Path, render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = {document["kind"]: document for document in render("lungseg", "--values", everything)}
    head, *workers = (pod["containers"][0] for pod in pods([documents["RayCluster"]]))
    assert {"name": "training", "containerPort": 9464} in head["ports"]
    for container in (head, *workers):  # a driver may run on any
        for one in container["env"]:
            if one["name"].startswith("LUNGSEG_METRICS"):
                monkeypatch.setenv(one["name"], one["value"])
        settings = load_recipe().telemetry
        assert (settings.metrics_host, settings.metrics_port) == ("0.0.0.0", 9464)
        monkeypatch.undo()
    scraped = [one["port"] for one in documents["PodMonitor"]["spec"]["podMetricsEndpoints"]]
    assert scraped == ["metrics", "training"]
    (rule,) = (
        one
        for one in documents["NetworkPolicy"]["spec"]["ingress"]
        if {"protocol": "TCP", "port": 9464} in one.get("ports", [])
    )
    assert [set(peer) for peer in rule["from"]] == [{"namespaceSelector"}]


def test_without_metrics_no_port_is_open_and_no_run_serves_any(everything: Path, render: Render) -> None:
    shown = yaml.safe_dump_all(render("lungseg", "--values", everything, "--set=metrics.enabled=false"))
    assert "9464" not in shown
    assert "LUNGSEG_METRICS" not in shown
    assert "port: training" not in shown


def test_what_needs_foreign_crds_is_off_by_default(render: Render) -> None:
    assert "PodMonitor" not in {document["kind"] for document in render("lungseg")}


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("auth.mode=tokn", "/auth/mode"),
        ("workers[0].memory=16GB", "/workers/0"),
        ("head.memory=lots", "/head/memory"),
        ("objectStore.uri=lungseg", "/objectStore/uri"),
        ("objectStore.endpoint=https://key:secret@minio:9000", "/objectStore/endpoint"),
        ("objectStore.accessKey=abc", "accessKey"),
        ("headd.cpu=2", "headd"),
        ("metrics.port=8265", "/metrics/port"),
        ("rayVersion=latest", "/rayVersion"),
        ("jobStopWaitSeconds=120", "terminationGracePeriodSeconds must exceed jobStopWaitSeconds"),
        ("workers[0].replicas=2,workers[0].maxReplicas=1", "minReplicas <= replicas <= maxReplicas"),
        (
            "objectStore.bundled.enabled=true,objectStore.existingSecret=mine",
            "brings its own endpoint and Secret",
        ),
        ("extraEnv[0].name=MY_TOKEN,extraEnv[0].value=x", "must come from a Secret"),
    ],
)
def test_wrong_cluster_values_are_refused_by_name(flag: str, named: str, helm: Callable[..., Any]) -> None:
    workers = "workers[0].name=cpu,workers[0].replicas=1,workers[0].cpu=1,workers[0].memory=1Gi"
    done = helm("template", "lungseg", "helm/lungseg", f"--set={workers},{flag}")
    assert done.returncode != 0
    assert named in done.stderr
