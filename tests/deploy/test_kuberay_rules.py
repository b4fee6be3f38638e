"""Each of KubeRay's rules that concern the charts refuses what breaks it, in a rendered object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.kuberay import refusals

Spec = dict[str, Any]


def head(spec: Spec) -> Spec:
    return spec["headGroupSpec"]["template"]["spec"]


def add_variable(spec: Spec, name: str) -> None:
    head(spec)["containers"][0]["env"].append({"name": name, "value": "1"})


BREAKS: dict[str, Callable[[Spec], Any]] = {
    "labels": lambda spec: spec["headGroupSpec"]["rayStartParams"].update(labels="a=b"),
    "resources": lambda spec: spec["headGroupSpec"].update(resources={"CPU": "1"}),
    "minReplicas": lambda spec: spec["workerGroupSpecs"][0].update(minReplicas=9),
    "suspended": lambda spec: spec["workerGroupSpecs"][0].update(suspend=True),
    "restartPolicy": lambda spec: head(spec).update(restartPolicy="Always"),
    "RAY_enable_autoscaler_v2": lambda spec: add_variable(spec, "RAY_enable_autoscaler_v2"),
    "environment": lambda spec: add_variable(spec, "REDIS_PASSWORD"),
    "REDIS_USERNAME": lambda spec: add_variable(spec, "REDIS_USERNAME"),
    "rocksdb": lambda spec: spec["gcsFaultToleranceOptions"].update(backend="rocksdb"),
    "without gcsFault": lambda spec: (
        spec.pop("gcsFaultToleranceOptions"),
        add_variable(spec, "RAY_REDIS_ADDRESS"),
    ),
    "storage": lambda spec: spec["gcsFaultToleranceOptions"].update(storage={"size": "1Gi"}),
    "Ray 2.52": lambda spec: spec.update(rayVersion="2.51.1"),
    "secretName": lambda spec: spec["authOptions"].update(enableK8sTokenAuth=True),
    "TLS": lambda spec: add_variable(spec, "RAY_USE_TLS"),
}


@pytest.mark.parametrize("named", BREAKS)
def test_a_cluster_that_breaks_a_rule_is_refused(
    named: str, render_one: Callable[..., dict[str, Any]]
) -> None:
    cluster = render_one("RayCluster", "lungseg", "--values", "tests/deploy/everything.yaml")
    assert refusals(cluster) == []
    BREAKS[named](cluster["spec"])
    (refusal,) = refusals(cluster)
    assert named in refusal


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"clusterSelector": None}, "one of rayClusterSpec or clusterSelector"),
        ({"clusterSelector": {"ray.io/cluster": ""}}, "without a cluster's name"),
        ({"backoffLimit": 1}, "backoffLimit is incompatible"),
        ({"suspend": True}, "suspend is incompatible"),
        ({"ttlSecondsAfterFinished": 5}, "without shutdownAfterJobFinishes"),
        ({"activeDeadlineSeconds": 0}, "must be positive"),
    ],
)
def test_a_job_that_breaks_a_rule_is_refused(
    change: dict[str, Any], named: str, render_one: Callable[..., dict[str, Any]]
) -> None:
    job = render_one("RayJob", "lungseg-job", "--set=data=lidc,run=first")
    assert refusals(job) == []
    job["spec"].update(change)
    (refusal,) = refusals(job)
    assert named in refusal
    job["metadata"]["name"] = "n" * 48
    assert refusals(job)[0] == "name"
