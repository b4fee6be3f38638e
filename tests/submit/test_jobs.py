"""Whose jobs on a cluster are ours, and where it is."""

from __future__ import annotations

import os

import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails

from lungseg.errors import ConfigError
from lungseg.submit.jobs import Cluster, _id, _job


@pytest.mark.parametrize(
    ("entrypoint", "ours"),
    [
        ("python -m lungseg.cli train --store s --data d --run r --resume", ("train", "r")),
        ("lungseg -q evaluate --run=r --out o", ("evaluate", "r")),
        ("python -m lungseg.cli evaluate --run b --run=a --out o", ("evaluate", "a+b")),
        ("python -m lungseg.cli fit-post --run r", ("fit-post", "r")),
        ("python jobs/tune.py --run 'r' --data d --trials 3", ("tune", "r")),
        ("python /app/jobs/prepare.py lidc /dicom --data d", ("prepare", "d")),
        ("python train.py --run r", None),
        ("python jobs/fit-post.py --run r", ("fit-post", "r")),
        ("python jobs/train.py --data d", None),
        ("python jobs/train.py --data d --run", None),
    ],
)
def test_a_job_is_known_by_its_verb_and_run_however_it_was_submitted(
    entrypoint: str, ours: tuple[str, str] | None
) -> None:
    details = JobDetails(
        type="SUBMISSION", submission_id="x", status="RUNNING", entrypoint=entrypoint, start_time=5000
    )
    job = _job(details)
    assert (job and (job.verb, job.name)) == ours
    assert job is None or (job.id, job.state, job.began, job.ended) == ("x", "RUNNING", 5.0, None)
    same = [job] if job else []
    assert [_id("train", "r", []), _id("train", "r", same)] == ["train-r", "train-r:2" if job else "train-r"]


def test_an_address_is_that_of_a_dashboard_and_what_is_given_counts_more_than_the_environment(
    monkeypatch: pytest.MonkeyPatch, refusing_port: int
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://203.0.113.1:8265")  # which nobody has
    with pytest.raises(ConfigError, match=f"cluster-unreachable.*127.0.0.1:{refusing_port}"):
        Cluster(f"http://127.0.0.1:{refusing_port}/")
    assert os.environ["RAY_API_SERVER_ADDRESS"] == f"http://127.0.0.1:{refusing_port}"
    with pytest.raises(ConfigError, match="cluster-address"):
        Cluster("127.0.0.1:6379")
    monkeypatch.setenv("RAY_TLS_CA_CERT", "/missing.pem")
    with pytest.raises(ConfigError, match=r"cluster-certificate.*missing\.pem"):
        Cluster(f"https://127.0.0.1:{refusing_port}")
