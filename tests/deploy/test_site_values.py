"""What a site asks of the charts: labels, classes, accelerators, disks, certificates, proxies, users."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.kuberay import pod_templates

EVERYTHING = ["--values", "tests/deploy/everything.yaml"]
BUNDLED = "--set=objectStore.bundled.enabled=true"

Document = dict[str, Any]


@pytest.fixture(scope="module")
def documents(render: Callable[..., list[Document]]) -> list[Document]:
    return render("lungseg", *EVERYTHING)


@pytest.fixture(scope="module")
def groups(documents: list[Document]) -> dict[str, Document]:
    """Pod templates of the Ray cluster by the name of their group."""
    (cluster,) = (one for one in documents if one["kind"] == "RayCluster")
    workers = {group["groupName"]: group["template"] for group in cluster["spec"]["workerGroupSpecs"]}
    return {"head": cluster["spec"]["headGroupSpec"]["template"], **workers}


def requests(template: Document) -> Document:
    return template["spec"]["containers"][0]["resources"]["requests"]


def test_labels_and_annotations_reach_every_object_and_pod_but_selectors_stay(
    documents: list[Document],
) -> None:
    for document in documents:
        labels = document["metadata"]["labels"]
        assert (labels["kueue.x-k8s.io/queue-name"], labels["app.kubernetes.io/name"]) == ("lab", "lungseg")
    for template in pod_templates(documents):
        labels = template["metadata"]["labels"]
        assert labels["kueue.x-k8s.io/queue-name"] == "lab"
        assert labels["azure.workload.identity/use"] == "true"
        assert labels["app.kubernetes.io/name"] in ("lungseg", "lungseg-store")
        assert template["metadata"]["annotations"] == {"karpenter.sh/do-not-disrupt": "true"}


def test_cpus_are_quantities_and_a_digest_takes_the_tags_place(groups: dict[str, Document]) -> None:
    assert (requests(groups["head"])["cpu"], requests(groups["cpu"])["cpu"]) == ("500m", "3500m")
    (image,) = {template["spec"]["containers"][0]["image"] for template in groups.values()}
    assert image == f"lungseg@sha256:{'0' * 64}"


def test_accelerators_are_asked_for_by_their_plugins_name_and_told_to_ray(documents: list[Document]) -> None:
    (cluster,) = (one for one in documents if one["kind"] == "RayCluster")
    _, gpu, _ = cluster["spec"]["workerGroupSpecs"]
    assert requests(gpu["template"])["amd.com/gpu"] == 4
    assert gpu["rayStartParams"] == {"num-gpus": "4"}


def test_what_a_pod_may_write_on_its_nodes_disk_is_what_it_requests(groups: dict[str, Document]) -> None:
    asked = {name: requests(template).get("ephemeral-storage") for name, template in groups.items()}
    assert asked == {"head": "5Gi", "cpu": None, "gpu": "300Gi", "fast": "10Gi"}
    volumes = {one["name"]: one for one in groups["gpu"]["spec"]["volumes"]}
    assert volumes["tmp"]["emptyDir"]["sizeLimit"] == "100Gi"
    assert volumes["cache"]["emptyDir"]["sizeLimit"] == "200Gi"
    (claimed,) = (one for one in groups["fast"]["spec"]["volumes"] if one["name"] == "cache")
    claim = claimed["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("nvme", "300Gi")


def test_where_pods_go_is_the_sites_to_say(groups: dict[str, Document]) -> None:
    assert groups["head"]["spec"]["priorityClassName"] == "head-first"
    assert groups["gpu"]["spec"]["runtimeClassName"] == "accelerated"
    assert groups["gpu"]["spec"]["nodeSelector"] == {"pool": "gpu"}
    (term,) = groups["gpu"]["spec"]["affinity"]["podAntiAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    (spread,) = groups["gpu"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"] == term["podAffinityTerm"]["labelSelector"]
    assert spread["labelSelector"]["matchLabels"].items() <= groups["gpu"]["metadata"]["labels"].items()
    assert "affinity" not in groups["head"]["spec"]


def test_a_private_authority_proxies_and_volumes_reach_every_ray_pod(groups: dict[str, Document]) -> None:
    for template in groups.values():
        (container,) = template["spec"]["containers"]
        variables = {one["name"]: one.get("value") for one in container["env"]}
        assert variables["AWS_CA_BUNDLE"] == "/etc/lungseg/ca/ca.crt"
        assert variables["HTTPS_PROXY"] == "http://proxy:3128"
        assert variables["NO_PROXY"] == "localhost,127.0.0.1,.svc,.cluster.local,.example.org"
        assert "HTTP_PROXY" not in variables
        assert variables["AWS_WEB_IDENTITY_TOKEN_FILE"] == "/var/run/secrets/token"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert {"ca", "atlas", "inputs"} <= mounted
        assert mounted <= {volume["name"] for volume in template["spec"]["volumes"]}


def test_users_and_groups_are_fixed_unless_left_to_the_platform(
    documents: list[Document], render: Callable[..., list[Document]]
) -> None:
    for template in pod_templates(documents):
        context = template["spec"]["securityContext"]
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(context)
        assert context["supplementalGroups"] == [4000]
    for template in pod_templates(render("lungseg", BUNDLED)):
        context = template["spec"]["securityContext"]
        assert [context[name] for name in ("runAsUser", "runAsGroup", "fsGroup")] == [1000] * 3


def test_fault_tolerance_and_tls_are_kuberays_own(documents: list[Document]) -> None:
    (cluster,) = (one for one in documents if one["kind"] == "RayCluster")
    assert cluster["spec"]["tlsOptions"] == {"enabled": True}
    assert cluster["spec"]["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
