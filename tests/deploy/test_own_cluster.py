"""A job that brings its cluster: what helm/lungseg renders, taken over by helm/lungseg-job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

FLAGS = ["--set=data=lidc,run=first,ownCluster.backoffLimit=2,commonLabels.queue=lab"]
BUNDLED = "--set=objectStore.bundled.enabled=true"
MONITORED = "--set=podMonitor.enabled=true,standingCluster=false"

Document = dict[str, Any]


@pytest.fixture(scope="module")
def cluster(helm: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the job's values tell to render."""
    shown = helm("template", "lungseg", "helm/lungseg", BUNDLED, "--show-only=templates/raycluster.yaml")
    path = tmp_path_factory.mktemp("own") / "cluster.yaml"
    path.write_text(shown.stdout)
    return path


@pytest.fixture(scope="module")
def documents(render: Callable[..., list[Document]], cluster: Path) -> dict[str, Document]:
    found = render("lungseg-job", *FLAGS, f"--set-file=ownCluster.rayCluster={cluster}")
    return {document["kind"]: document for document in found}


@pytest.fixture(scope="module")
def pods(documents: dict[str, Document]) -> list[Document]:
    """Pod templates of the job's cluster, head first."""
    spec = documents["RayJob"]["spec"]["rayClusterSpec"]
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def selects(selector: dict[str, str], template: Document) -> bool:
    """As Kubernetes does, with the labels that KubeRay adds to a cluster whose name it makes up."""
    role = template["metadata"]["labels"]["app.kubernetes.io/component"]
    added = {"ray.io/cluster": "lungseg-x7k2p", "ray.io/node-type": role}
    return selector.items() <= {**template["metadata"]["labels"], **added}.items()


def test_kuberay_takes_it(
    documents: dict[str, Document], cluster: Path, validate: Callable[[Document], None]
) -> None:
    for document in documents.values():
        validate(document)
    spec = documents["RayJob"]["spec"]
    rendered = yaml.safe_load(cluster.read_text())["spec"]
    assert "upgradeStrategy" in rendered
    assert "upgradeStrategy" not in spec["rayClusterSpec"]
    assert "clusterSelector" not in spec
    assert (spec["backoffLimit"], spec["ttlSecondsAfterFinished"]) == (2, 600)


def test_its_pods_are_those_that_the_releases_policies_mean(
    pods: list[Document], render: Callable[..., list[Document]]
) -> None:
    around = render("lungseg", BUNDLED, MONITORED)
    assert "RayCluster" not in {document["kind"] for document in around}
    names = {one["metadata"]["name"] for one in around if one["kind"] == "ServiceAccount"}
    policies = {one["metadata"]["name"]: one["spec"] for one in around if one["kind"] == "NetworkPolicy"}
    (monitor,) = (one for one in around if one["kind"] == "PodMonitor")
    for template in pods:
        assert template["spec"]["serviceAccountName"] in names
        assert selects(policies["lungseg"]["podSelector"]["matchLabels"], template)
        assert selects(monitor["spec"]["selector"]["matchLabels"], template)
        for policy in policies.values():
            assert selects(policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"], template)


def test_its_workers_avoid_each_other_and_a_drain_waits_for_its_head_alone(
    documents: dict[str, Document], pods: list[Document]
) -> None:
    head, worker = pods
    (term,) = worker["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert selects(term["labelSelector"]["matchLabels"], worker)
    assert not selects(term["labelSelector"]["matchLabels"], head)
    budget = documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert [selects(budget, template) for template in pods] == [True, False]
    assert all(template["metadata"]["labels"]["queue"] == "lab" for template in pods)


def test_gpus_that_no_group_has_are_refused(cluster: Path, helm: Callable[..., Any]) -> None:
    asked = "--set=settings.train.workers=2,settings.train.gpus_per_worker=4"
    done = helm(
        "template", "one", "helm/lungseg-job", *FLAGS, asked, f"--set-file=ownCluster.rayCluster={cluster}"
    )
    assert "2 workers of 4 GPUs each, and the cluster's groups could hold 0" in done.stderr
