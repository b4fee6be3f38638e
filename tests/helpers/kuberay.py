"""What KubeRay 1.7 refuses beyond its schemas: the rules of its validation.go that concern our charts.

`kubectl apply` does not show such a refusal: the object is there, with an event, and nothing comes of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

CLUSTER_NAME, JOB_NAME = 53, 47  # Services and generated names must fit into 63 characters
TLS_VARIABLES = {"RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"}
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"


def refusals(document: dict[str, Any]) -> list[str]:
    """Why KubeRay would not take this RayCluster or RayJob; empty if it would."""
    spec, name = document["spec"], document["metadata"]["name"]
    longest = CLUSTER_NAME if document["kind"] == "RayCluster" else JOB_NAME
    found = [] if re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= longest else ["name"]
    return [*found, *(_cluster(spec) if document["kind"] == "RayCluster" else _job(spec))]


def pod_templates(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those of a RayCluster, head first, and of a StatefulSet."""
    for document in documents:
        if document["kind"] == "RayCluster":
            spec = document["spec"]
            yield from (group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))
        elif document["kind"] == "StatefulSet":
            yield document["spec"]["template"]


def _job(spec: dict[str, Any]) -> Iterator[str]:
    selected, own = spec.get("clusterSelector"), spec.get("rayClusterSpec")
    if not selected and own is None:
        yield "one of rayClusterSpec or clusterSelector must be set"
    if selected and not selected.get("ray.io/cluster"):
        yield "clusterSelector without a cluster's name"
    if selected and spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit is incompatible with clusterSelector"
    if selected and spec.get("suspend"):
        yield "suspend is incompatible with clusterSelector"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if spec.get("activeDeadlineSeconds", 1) <= 0 or spec.get("backoffLimit", 0) < 0:
        yield "activeDeadlineSeconds must be positive, backoffLimit not negative"
    if own is not None:
        if "type" in own.get("upgradeStrategy", {}):
            yield "upgradeStrategy cannot be set when the RayCluster is created by a RayJob"
        yield from _cluster(own)


def _cluster(spec: dict[str, Any]) -> Iterator[str]:
    head, groups = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    for group in (head, *groups):
        params = group.get("rayStartParams", {})
        if "labels" in params:
            yield "rayStartParams.labels: use labels"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(params):
            yield "resources both in rayStartParams and in resources"
    for group in groups:
        bounds = group.get("minReplicas"), group.get("maxReplicas")
        if None in bounds:
            if not spec.get("enableInTreeAutoscaling"):
                yield "minReplicas and maxReplicas must be set where nothing scales"
        elif not 0 <= bounds[0] <= bounds[1]:
            yield "0 <= minReplicas <= maxReplicas must hold"
    yield from _autoscaler(spec)
    yield from _fault_tolerance(spec)
    yield from _authentication_and_tls(spec)


def _variables(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in group["template"]["spec"]["containers"][0].get("env", [])}


def _autoscaler(spec: dict[str, Any]) -> Iterator[str]:
    head = spec["headGroupSpec"]
    if not spec.get("enableInTreeAutoscaling"):
        if _variables(head).get(AUTOSCALER_V2, {}).get("value") in ("1", "true"):
            yield f"{AUTOSCALER_V2} without enableInTreeAutoscaling"
        return
    if "version" in spec.get("autoscalerOptions", {}) and AUTOSCALER_V2 in _variables(head):
        yield f"{AUTOSCALER_V2} beside autoscalerOptions.version"
    for group in (head, *spec.get("workerGroupSpecs", [])):
        if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "restartPolicy must be Never under autoscaler v2"
        if group.get("suspend"):
            yield "a suspended group under the autoscaler"


def _fault_tolerance(spec: dict[str, Any]) -> Iterator[str]:
    options, head = spec.get("gcsFaultToleranceOptions"), spec["headGroupSpec"]
    variables, params = _variables(head), head.get("rayStartParams", {})
    if "redis-username" in params or "REDIS_USERNAME" in variables:
        yield "REDIS_USERNAME: use gcsFaultToleranceOptions.redisUsername"
    if options is None:
        if "RAY_REDIS_ADDRESS" in variables:
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    if "redis-password" in params or {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & set(variables):
        yield "Redis by the head's environment beside gcsFaultToleranceOptions"
    redis = {"redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"}
    if options.get("backend") == "rocksdb" and redis & set(options):
        yield "fields of Redis with backend rocksdb"
    if options.get("backend", "redis") == "redis" and "storage" in options:
        yield "storage belongs to backend rocksdb"


def _authentication_and_tls(spec: dict[str, Any]) -> Iterator[str]:
    options = spec.get("authOptions", {})
    version = tuple(map(int, re.findall(r"\d+", spec.get("rayVersion", ""))))
    if options.get("mode") == "token" and version < (2, 52):
        yield "authOptions.mode token needs Ray 2.52"
    if options.get("enableK8sTokenAuth") and (options.get("mode") != "token" or options.get("secretName")):
        yield "enableK8sTokenAuth needs mode token and no secretName"
    if spec.get("tlsOptions", {}).get("enabled"):
        for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])):
            mounts = group["template"]["spec"]["containers"][0].get("volumeMounts", [])
            if TLS_VARIABLES & set(_variables(group)) or any(
                m["mountPath"] == "/etc/ray/tls" for m in mounts
            ):
                yield "TLS is the operator's under tlsOptions"
