"""What helm/lungseg renders is what Kubernetes and KubeRay take; wrong values are refused by name."""

from __future__ import annotations

import copy
import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helpers.kuberay import pod_templates

from lungseg.config import load_recipe
from lungseg.train.resources import planned_nodes

ROOT = Path(__file__).parents[2]
VALUES = sorted(ROOT.glob("deploy/values-*.yaml"))
OVERLAYS = {"values-openshift"}
SECRETIVE = re.compile(r"secret|token|password|access_key", re.IGNORECASE)
EVERYTHING = ["--values", "tests/deploy/everything.yaml"]
BUNDLED = "--set=objectStore.bundled.enabled=true"

Render = Callable[..., list[dict[str, Any]]]
RenderOne = Callable[..., dict[str, Any]]
Validate = Callable[[dict[str, Any]], None]


def environment(values: Path) -> list[str]:
    below = ["--values", "deploy/values-cpu.yaml"] if values.stem in OVERLAYS else []
    return [*below, "--values", str(values)]


def containers(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for template in pod_templates(documents):
        yield from template["spec"]["containers"]


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_every_environment_passes_lint_and_both_schemas(
    values: Path, helm: Callable[..., Any], render: Render, validate: Validate
) -> None:
    linted = helm("lint", "--strict", "helm/lungseg", *environment(values))
    assert linted.returncode == 0, linted.stdout + linted.stderr
    for document in render("lungseg", *environment(values)):
        validate(document)


@pytest.mark.parametrize(
    "flags",
    [
        [BUNDLED],
        EVERYTHING,
        [
            BUNDLED,
            "--set=networkPolicy.enabled=false,podDisruptionBudget.enabled=false,standingCluster=false",
        ],
    ],
    ids=["defaults", "everything", "policies-off"],
)
def test_the_defaults_and_every_option_at_once_pass_both_schemas(
    flags: list[str], render: Render, validate: Validate
) -> None:
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
    kind: str, where: list[Any], render: Render, validate: Validate
) -> None:
    document = next(one for one in render("lungseg", *EVERYTHING) if one["kind"] == kind)
    validate(document)
    mutated = copy.deepcopy(document)
    target: Any = mutated
    for step in where:
        target = target[step]
    target["misspelt"] = "x"
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(mutated)


def test_no_secret_is_the_value_of_an_environment_variable(render: Render) -> None:
    for flags in (EVERYTHING, *map(environment, VALUES)):
        for container in containers(render("lungseg", *flags)):
            for variable in container.get("env", []):
                if SECRETIVE.search(variable["name"]) and not variable["name"].endswith("_FILE"):
                    assert set(variable) == {"name", "valueFrom"}, variable


def test_what_is_drawn_appears_in_its_secret_only_and_is_drawn_anew_for_each_installation(
    render: Render, helm: Callable[..., Any]
) -> None:
    documents = render("lungseg", *EVERYTHING)
    secrets = [document for document in documents if document["kind"] == "Secret"]
    drawn = [b64decode(value).decode() for secret in secrets for value in secret["data"].values()]
    assert sorted(map(len, drawn)) == [20, 40, 64]
    elsewhere = yaml.safe_dump_all([document for document in documents if document not in secrets])
    again = helm("template", "lungseg", "helm/lungseg", *EVERYTHING).stdout
    encoded = [value for secret in secrets for value in secret["data"].values()]
    assert not any(value in elsewhere or value in again for value in (*drawn, *encoded))
    (key,) = (secret for secret in secrets if "LUNGSEG_CASE_KEY" in secret["data"])
    assert key["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_with_ones_own_secrets_a_render_holds_none_and_is_the_same_every_time(
    render: Render, helm: Callable[..., Any]
) -> None:
    flags = (BUNDLED, "--set=objectStore.bundled.existingSecret=mine,caseKey.existingSecret=key")
    documents = render("lungseg", *flags)
    assert "Secret" not in {document["kind"] for document in documents}
    again = yaml.safe_load_all(helm("template", "lungseg", "helm/lungseg", *flags).stdout)
    assert [document for document in again if document] == documents
    for container in containers(documents):
        named = {one["name"]: one.get("valueFrom", {}).get("secretKeyRef") for one in container["env"]}
        assert named["AWS_SECRET_ACCESS_KEY"] == {"name": "mine", "key": "AWS_SECRET_ACCESS_KEY"}
        if container["name"] != "seaweedfs":
            assert named["LUNGSEG_CASE_KEY"] == {"name": "key", "key": "LUNGSEG_CASE_KEY"}


def test_pods_are_unprivileged_and_what_they_request_is_their_limit(render: Render) -> None:
    documents = render("lungseg", *EVERYTHING)
    for template in pod_templates(documents):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    found = list(containers(documents))
    assert len(found) == 5
    for container in found:
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_kubernetes_token_is_the_autoscalers_alone(render_one: RenderOne) -> None:
    spec = render_one("RayCluster", "lungseg", *EVERYTHING)["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert "api-token" not in {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert "api-token" in {volume["name"] for volume in spec["headGroupSpec"]["template"]["spec"]["volumes"]}
    (mount,) = spec["autoscalerOptions"]["volumeMounts"]
    assert mount["name"] == "api-token"
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"


def test_workers_take_a_node_each_and_the_head_takes_no_tasks(render_one: RenderOne) -> None:
    spec = render_one("RayCluster", "lungseg", BUNDLED)["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [2]
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (rule,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule["topologyKey"] == "kubernetes.io/hostname"
        labels = group["template"]["metadata"]["labels"]
        assert rule["labelSelector"]["matchLabels"].items() <= labels.items()
        assert labels["app.kubernetes.io/component"] == "worker"
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


def test_jobs_are_told_what_nodes_there_can_be(render_one: RenderOne) -> None:
    def told(*flags: str) -> list[tuple[int, int]]:
        pod = next(pod_templates([render_one("RayCluster", "lungseg", BUNDLED, *flags)]))
        variables = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
        nodes = [node["Resources"] for node in planned_nodes(variables["LUNGSEG_NODE_GROUPS"])]
        return [(one["CPU"], one["GPU"]) for one in nodes]

    assert told() == [(4, 0)] * 2
    assert told(*EVERYTHING) == [(4, 0)] * 3 + [(8, 4), (8, 0)]  # what autoscaling may make of them
    assert told(*EVERYTHING, "--set=autoscaling.enabled=false") == [(4, 0), (8, 4), (8, 0)]


def test_a_stopped_driver_has_time_to_commit_before_its_pod_goes(render_one: RenderOne) -> None:
    spec = render_one("RayCluster", "lungseg", BUNDLED)["spec"]["headGroupSpec"]["template"]["spec"]
    variables = {one["name"]: one.get("value") for one in spec["containers"][0]["env"]}
    assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert 3 < int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) < spec["terminationGracePeriodSeconds"]


def test_only_the_cluster_and_the_operator_reach_ray(render: Render) -> None:
    policies = {
        one["metadata"]["name"]: one["spec"]
        for one in render("lungseg", BUNDLED)
        if one["kind"] == "NetworkPolicy"
    }
    ours = {"app.kubernetes.io/name": "lungseg", "app.kubernetes.io/instance": "lungseg"}
    first, second = policies["lungseg"]["ingress"]
    assert first == {"from": [{"podSelector": {"matchLabels": ours}}]}
    assert second["ports"] == [{"protocol": "TCP", "port": 8265}]
    (peer,) = second["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay-system"}
    (store,) = policies["lungseg-store"]["ingress"]
    assert store["from"] == first["from"]


def test_trainings_metrics_are_open_on_the_head_and_to_prometheus_alone(
    render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = {document["kind"]: document for document in render("lungseg", *EVERYTHING)}
    head, *workers = containers([documents["RayCluster"]])
    assert {"name": "training", "containerPort": 9464} in head["ports"]
    for container in (head, *workers):  # a driver may run on any
        for one in container["env"]:
            if one["name"].startswith("LUNGSEG_METRICS"):
                monkeypatch.setenv(one["name"], one["value"])
        settings = load_recipe().telemetry
        assert (settings.metrics_host, settings.metrics_port) == ("0.0.0.0", 9464)
        monkeypatch.undo()
    (rule,) = (
        one
        for one in documents["NetworkPolicy"]["spec"]["ingress"]
        if {"protocol": "TCP", "port": 9464} in one.get("ports", [])
    )
    assert [set(peer) for peer in rule["from"]] == [{"namespaceSelector"}]


def test_without_metrics_no_port_is_open_and_no_run_serves_any(render: Render) -> None:
    documents = render("lungseg", *EVERYTHING, "--set=metrics.enabled=false,dashboard.enabled=false")
    shown = yaml.safe_dump_all(documents)
    assert "9464" not in shown
    assert "LUNGSEG_METRICS" not in shown
    assert "port: training" not in shown


def test_what_needs_foreign_crds_is_off_by_default(render: Render) -> None:
    kinds = {document["kind"] for document in render("lungseg", BUNDLED)}
    assert not {"PodMonitor", "PrometheusRule"} & kinds
