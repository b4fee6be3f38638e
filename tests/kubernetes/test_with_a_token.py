"""Jobs from a laptop, through a port-forward: Ray lets in whoever has the token."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from helpers.kubernetes import Namespace
from helpers.release import DATA, install, write_values

pytestmark = [pytest.mark.kubernetes, pytest.mark.xdist_group("kubernetes"), pytest.mark.timeout(2400)]
TOKEN = secrets.token_hex(16)
SPACE = json.dumps({"optimizer.learning_rate": {"log": [1e-4, 1e-2]}})
SMOKE = ["--data", "scans", "--recipe", "jobs/recipes/smoke.yaml"]
JOBS = {
    "train": ([*SMOKE, "--run", "first", "--set", "train.workers=2"], "published: val Dice"),
    "fit-post": (["--run", "first"], "s3://lungseg/runs/first/post/"),
    "evaluate": (["--run", "first", "--out", "/tmp/report"], "s3://lungseg/runs/first/evaluations/"),
    "tune": (
        [*SMOKE, "--run", "sweep", "--trials", "2", "--set", f"tune.space={SPACE}"],
        "get the best with: lungseg pull --store s3://lungseg --run sweep",
    ),
}


@pytest.fixture(scope="module")
def address(
    make_namespace: Callable[[], Namespace], image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Of a dashboard. Older operators make no token of `auth`: here it comes from a Secret of our own."""
    namespace, folder = make_namespace(), tmp_path_factory.mktemp("release")
    namespace.kubectl("create", "secret", "generic", "token", f"--from-literal=token={TOKEN}")
    token = {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "token", "key": "token"}}}
    more = {"auth": {"mode": "disabled"}, "extraEnv": [{"name": "RAY_AUTH_MODE", "value": "token"}, token]}
    (folder / "more.yaml").write_text(yaml.safe_dump(more))
    values = write_values(namespace, image, folder)
    install(namespace, [*values, f"--values={folder}/more.yaml"])
    with namespace.forwarded("lungseg-head-svc", 8265) as url:
        yield url


def ray_job_submit(
    address: str, home: Path, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [f"{sysconfig.get_path('scripts')}/ray", "job", "submit", "--address", address, "--", *words]
    given = {"PATH": os.environ["PATH"], "HOME": str(home), **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=900)


def test_a_job_is_refused_without_the_token(address: str, tmp_path: Path) -> None:
    done = ray_job_submit(address, tmp_path, "true")
    assert done.returncode != 0
    assert "token" in done.stdout + done.stderr
    done = ray_job_submit(address, tmp_path, "true", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="wrong")
    assert done.returncode != 0


@pytest.fixture(scope="module")
def prepared(address: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    settings = [f"data.{name}={json.dumps(value)}" for name, value in DATA.items()]
    words = ["python", "jobs/prepare.py", "pairs", "/inputs", "--data", "scans"]
    words += [word for one in settings for word in ("--set", one)]
    home = tmp_path_factory.mktemp("home")
    done = ray_job_submit(address, home, *words, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_with_the_token_a_job_runs_on_the_workers(prepared: str) -> None:
    assert "data card: s3://lungseg/data/scans/" in prepared


@pytest.mark.parametrize("verb", JOBS)
def test_every_job_is_submitted_alike(address: str, prepared: str, verb: str, tmp_path: Path) -> None:
    words, said = JOBS[verb]
    command = ["python", f"jobs/{verb}.py", *words]
    done = ray_job_submit(address, tmp_path, *command, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
