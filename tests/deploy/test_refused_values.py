"""Values that cannot work are refused before anything is created, with the value's name or the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

WORKER = "workers[0].name=cpu,workers[0].replicas=1,workers[0].cpu=1,workers[0].memory=1Gi"


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("objectStore.bundled.enabled=false", "no store: name a bucket"),
        ("image.repository=", "/image/repository"),
        ("image.digest=sha256:12", "/image/digest"),
        ("auth.mode=tokn", "/auth/mode"),
        ("head.cpu=half", "/head/cpu"),
        ("head.cpu=0", "/head/cpu"),
        ("workers[0].memory=16GB", "/workers/0"),
        ("workers[0].scratch=500Mi", "/workers/0/scratch"),
        ("head.memory=lots", "/head/memory"),
        ("objectStore.uri=lungseg", "/objectStore/uri"),
        ("objectStore.endpoint=https://key:secret@minio:9000", "/objectStore/endpoint"),
        ("objectStore.accessKey=abc", "accessKey"),
        ("headd.cpu=2", "headd"),
        ("metrics.port=8265", "/metrics/port"),
        ("rayVersion=latest", "/rayVersion"),
        ("proxy.http=http://me:secret@proxy:3128", "/proxy/http"),
        ("gcsFaultTolerance.redisPassword.value=secret", "/gcsFaultTolerance/redisPassword"),
        ("jobStopWaitSeconds=120", "terminationGracePeriodSeconds must exceed jobStopWaitSeconds"),
        ("workers[0].replicas=2,workers[0].maxReplicas=1", "minReplicas <= replicas <= maxReplicas"),
        ("objectStore.existingSecret=mine", "brings its own endpoint and Secret"),
        ("caseKey.generate=true,caseKey.existingSecret=mine", "either existingSecret or generate"),
        ("caBundle.configMap=a,caBundle.secret=b", "either configMap or secret"),
        ("extraEnv[0].name=MY_TOKEN,extraEnv[0].value=x", "must come from a Secret"),
        ("extraEnv[0].name=AWS_REGION,extraEnv[0].value=x", "extraEnv AWS_REGION: there already"),
        (
            "extraEnv[0].name=A,extraEnv[0].value=x,extraEnv[1].name=A,extraEnv[1].value=y",
            "extraEnv A: there already",
        ),
    ],
)
def test_wrong_cluster_values(flag: str, named: str, helm: Callable[..., Any]) -> None:
    flags = ["--set=objectStore.bundled.enabled=true", f"--set={WORKER},{flag}"]
    done = helm("template", "lungseg", "helm/lungseg", *flags)
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("job=predict", "/job"),
        ("run=", "needs the name of a run"),
        ("data=", "needs the name of the prepared data"),
        ("run=../other", "/run"),
        ("store=s3://key:secret@bucket", "/store"),
        ("resume=perhaps", "/resume"),
        ("job=evaluate,recipe=x.yaml", "job=evaluate takes no recipe"),
        ("ownCluster.backoffLimit=2", "KubeRay refuses retries on a shared cluster"),
        ("ownCluster.rayCluster=spec", "--set-file ownCluster.rayCluster=FILE"),
        ("activeDeadlineSeconds=0", "/activeDeadlineSeconds"),
        ("epochs=5", "epochs"),
        (
            "settings.train.workers=2,settings.train.gpus_per_worker=4,settings.train.global_batch=12",
            "global_batch=12 is no multiple of 8",
        ),
    ],
)
def test_wrong_job_values(flag: str, named: str, helm: Callable[..., Any]) -> None:
    done = helm("template", "one", "helm/lungseg-job", f"--set=data=lidc,run=first,{flag}")
    assert done.returncode != 0
    assert named in done.stderr


def test_release_names_that_kuberay_refuses(helm: Callable[..., Any]) -> None:
    for name in ("1st", "a.b", "n" * 48):
        done = helm("template", name, "helm/lungseg-job", "--set=data=lidc,run=first")
        assert "release name" in done.stderr
    assert "release name" in helm("template", name, "helm/lungseg").stderr
