"""From `helm install` to a pulled checkpoint, on real pods that may do no more than `restricted` allows."""

from __future__ import annotations

import base64
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
from helpers.release import PREPARE, install, reached, run_job, write_values

# The first test's seconds are also those of the image: a quarter of an hour on a busy machine.
pytestmark = [pytest.mark.kubernetes, pytest.mark.xdist_group("kubernetes"), pytest.mark.timeout(2400)]
TRAIN = ["--set=data=scans,run=first,recipe=jobs/recipes/smoke.yaml,settings.train.workers=2"]


@pytest.fixture(scope="module")
def namespace(make_namespace: Callable[[], Namespace]) -> Namespace:
    return make_namespace()


@pytest.fixture(scope="module")
def release(namespace: Namespace, image: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What it was installed from; all pods are there."""
    values = write_values(namespace, image, tmp_path_factory.mktemp("release"))
    install(namespace, values)
    return values


@pytest.fixture(scope="module")
def prepared(namespace: Namespace, release: list[str]) -> dict[str, Any]:
    return run_job(namespace, "prepare", *PREPARE)


@pytest.fixture(scope="module")
def trained(namespace: Namespace, prepared: dict[str, Any]) -> dict[str, Any]:
    return run_job(namespace, "train", *TRAIN)


def test_workers_are_on_two_nodes_and_no_ray_pod_may_ask_kubernetes(
    namespace: Namespace, release: list[str]
) -> None:
    workers = namespace.pods("ray.io/node-type=worker")
    assert len({pod["spec"]["nodeName"] for pod in workers}) == len(workers) == 2
    (head,) = namespace.pods("ray.io/node-type=head")
    look = "test ! -e /var/run/secrets/kubernetes.io"
    for pod in (head, *workers):
        namespace.kubectl("exec", pod["metadata"]["name"], "--", "sh", "-c", look)


def test_a_drain_does_not_take_the_head(namespace: Namespace, release: list[str]) -> None:
    (head,) = namespace.pods("ray.io/node-type=head")
    drain = ["drain", head["spec"]["nodeName"], "--dry-run=server", "--pod-selector=ray.io/node-type=head"]
    with pytest.raises(AssertionError, match="would violate the pod's disruption budget"):
        namespace.kubectl(*drain, "--delete-emptydir-data", "--timeout=5s")


def test_trainings_metrics_are_served(namespace: Namespace, trained: dict[str, Any]) -> None:
    with (
        namespace.forwarded("lungseg-head-svc", 9464) as url,
        urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer,
    ):
        shown = answer.read().decode()
    counts = re.findall(r'^lungseg_step_seconds_count\{.*run="first".* ([0-9.]+)$', shown, re.MULTILINE)
    assert list(map(float, counts)) == [8.0, 8.0]  # two epochs of four steps on each of two workers


def test_a_sweep_of_two_trials_ends_with_a_best_one(
    namespace: Namespace, trained: dict[str, Any], tmp_path: Path
) -> None:
    space = {"tune": {"space": {"optimizer.learning_rate": {"log": [1e-4, 1e-2]}}}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"settings": space}))
    sweep = "--set=job=tune,data=scans,run=sweep,recipe=jobs/recipes/smoke.yaml,trials=2"
    run_job(namespace, "tune", sweep, f"--values={tmp_path}/values.yaml")
    shown = namespace.log("tune")
    assert len(re.findall(r"^\S+ +complete +", shown, re.MULTILINE)) == 2, shown
    assert "get the best with: lungseg pull --store s3://lungseg --run sweep" in shown


def test_checkpoint_and_report_are_pulled_by_lungseg_and_by_a_plain_client(
    namespace: Namespace, trained: dict[str, Any], tmp_path: Path
) -> None:
    run_job(namespace, "evaluate", "--set=job=evaluate,run=first")
    secret = namespace.get("secret", "lungseg-store")["data"]
    keys = {name: base64.b64decode(value).decode() for name, value in secret.items()}
    with namespace.forwarded("lungseg-store", 8333) as url:
        pull = ["pull", "--store", "s3://lungseg", "--run", "first", "--out", str(tmp_path)]
        done = subprocess.run(
            [sys.executable, "-m", "lungseg.cli", *pull],
            env={**namespace.environment, **keys, "AWS_ENDPOINT_URL": url},
            capture_output=True, text=True, timeout=300,
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


@pytest.mark.parametrize(("labels", "let_in"), [({}, set()), ({"lungseg-peer": "listed"}, {"dashboard"})])
def test_a_strangers_pod_reaches_neither_ray_nor_the_store_and_a_listed_peers_the_dashboard_alone(
    namespace: Namespace, release: list[str], image: str, labels: dict[str, str], let_in: set[str]
) -> None:
    name = "-".join(["stranger", *labels.values()])
    assert reached(namespace, image, name, labels) == let_in


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
    wait("all pods are gone", lambda: not namespace.pods("app.kubernetes.io/instance=lungseg"), 400)
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
    namespace.kubectl("rollout", "status", "statefulset/lungseg-store", "--timeout=300s", seconds=310)
    shown = namespace.helm("template", "lungseg", *values, "--show-only=templates/raycluster.yaml")
    (tmp_path / "cluster.yaml").write_text(shown)
    own = f"--set-file=ownCluster.rayCluster={tmp_path}/cluster.yaml"
    run_job(namespace, "own", *PREPARE, own, "--set=ownCluster.ttlSecondsAfterFinished=5")
    wait("the job's cluster is gone", lambda: not namespace.get("raycluster")["items"], 400)
