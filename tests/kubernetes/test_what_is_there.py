"""What the charts look up in the cluster, in a namespace that takes no pods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.kubernetes import Namespace

# The first test's seconds are also those of the image: a quarter of an hour on a busy machine.
pytestmark = [pytest.mark.kubernetes, pytest.mark.xdist_group("kubernetes"), pytest.mark.timeout(2400)]
VALUES = [
    "--set=autoscaling.enabled=true,objectStore.bundled.enabled=true,caseKey.generate=true",
    "--set=workers[0].name=cpu,workers[0].replicas=0,workers[0].maxReplicas=2,workers[0].cpu=1",
    "--set=workers[0].memory=1Gi",
]


@pytest.fixture(scope="module")
def namespace(make_namespace: Callable[[], Namespace]) -> Namespace:
    made = make_namespace()
    made.kubectl("create", "quota", "none", "--hard=pods=0")
    return made


@pytest.fixture(scope="module")
def release(namespace: Namespace) -> str:
    return namespace.helm("install", "lungseg", "helm/lungseg", *VALUES)


def test_an_upgrade_keeps_what_was_drawn_and_the_workers_that_the_autoscaler_asked_for(
    namespace: Namespace, release: str
) -> None:
    def drawn() -> list[dict[str, str]]:
        return [namespace.get("secret", f"lungseg-{name}")["data"] for name in ("store", "case-key")]

    before = drawn()
    scaled = '[{"op": "replace", "path": "/spec/workerGroupSpecs/0/replicas", "value": 1}]'
    namespace.kubectl(
        "patch", "raycluster", "lungseg", "--type=json", "-p", scaled, "--field-manager=autoscaler"
    )
    upgrade = ["upgrade", "lungseg", "helm/lungseg", *VALUES, "--set=podLabels.new=yes"]
    with pytest.raises(AssertionError, match=r"conflict with .*autoscaler"):
        namespace.helm(*upgrade)
    namespace.helm(*upgrade, "--force-conflicts")
    (group,) = namespace.get("raycluster", "lungseg")["spec"]["workerGroupSpecs"]
    assert group["replicas"] == 1
    assert group["template"]["metadata"]["labels"]["new"] == "yes"
    assert drawn() == before


def test_a_job_for_gpus_that_the_cluster_has_not_is_refused(namespace: Namespace, release: str) -> None:
    with pytest.raises(AssertionError, match=r"asks for 1 workers of 2 GPUs each, .* could hold 0"):
        namespace.helm(
            "install", "gpus", "helm/lungseg-job", "--set=data=d,run=r,settings.train.gpus_per_worker=2"
        )


def test_a_job_whose_clusters_release_is_not_there_is_refused(
    namespace: Namespace, release: str, tmp_path: Path
) -> None:
    shown = namespace.helm(
        "template", "absent", "helm/lungseg", *VALUES, "--show-only=templates/raycluster.yaml"
    )
    (tmp_path / "cluster.yaml").write_text(shown)
    own = f"--set-file=ownCluster.rayCluster={tmp_path}/cluster.yaml"
    with pytest.raises(AssertionError, match="release absent, which is not here: helm install absent"):
        namespace.helm("install", "own", "helm/lungseg-job", "--set=data=d,run=r", own)
