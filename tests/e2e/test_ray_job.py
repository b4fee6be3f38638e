"""`ray start --head` and `ray job submit -- python jobs/train.py …`, as on a cluster, on 127.0.0.1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.balls import write_balls
from helpers.servers import ROOT, free_ports

from lungseg.storage import open_store

pytestmark = pytest.mark.slow
LUNGSEG = [sys.executable, "-m", "lungseg.cli"]
RAY = str(Path(sysconfig.get_path("scripts")) / "ray")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of a fresh head node."""
    gcs, dashboard, client, *agents = free_ports(7)
    # Ray's sockets live below the temporary folder, and their paths must stay below 108 bytes.
    temporary = Path("/tmp") / f"ray-{os.getpid()}"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # nothing here is worth a half-minute drain
    environment["PATH"] = f"{sysconfig.get_path('scripts')}:{environment['PATH']}"  # as in the image
    environment |= {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "90"}  # as the charts say
    environment.pop("RAY_ADDRESS", None)
    flags = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={gcs}", "--num-cpus=2"]
    flags += [
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
        f"--temp-dir={temporary}",
    ]
    names = (
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    )
    flags += [f"--{name}={port}" for name, port in zip(names, agents, strict=True)]
    flags += ["--disable-usage-stats", "--object-store-memory=200000000"]
    node = subprocess.Popen(
        [RAY, "start", "--head", "--block", *flags],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip
    try:
        yield {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        node.terminate()
        node.wait(timeout=60)


def ray_job(head: dict[str, str], verb: str, *words: str) -> str:
    command = [RAY, "job", verb, *words]
    done = subprocess.run(command, env=head, capture_output=True, text=True, timeout=300, cwd=ROOT)
    return done.stdout + done.stderr


def submit(head: dict[str, str], job: str, words: list[str]) -> None:
    not_yet = ("Failed to connect", "No available agent")  # the dashboard answers before a node can run jobs
    for _ in range(60):
        said = ray_job(head, "submit", "--no-wait", "--submission-id", job, "--", "python", *words)
        if not any(one in said for one in not_yet):
            return
        time.sleep(1)
    pytest.fail(said)


def logs_until(client: Any, job: str, wanted: str) -> str:
    """The job's log once it holds the words."""
    deadline = time.monotonic() + 240
    while wanted not in (log := client.get_job_logs(job)):
        assert not client.get_job_status(job).is_terminal(), log[-3000:]
        assert time.monotonic() < deadline, log[-3000:]
        time.sleep(0.5)
    return str(log)


def test_a_stopped_training_job_loses_no_step_and_the_next_one_goes_on_to_a_checkpoint_to_pull(
    head: dict[str, str], tmp_path: Path
) -> None:
    from ray.job_submission import JobSubmissionClient

    store = str(tmp_path / "store")
    write_balls(open_store(store))
    settings = ["train.global_batch=2", "model.width=2", "model.depth=2", "train.epochs=1"]
    settings += ["train.steps_per_epoch=600", "train.log_every_steps=1"]
    words = [str(ROOT / "jobs" / "train.py"), "--store", store, "--data", "balls", "--run", "job", "--resume"]
    words += [word for one in settings for word in ("--set", one)]
    submit(head, "first", words)
    client = JobSubmissionClient(head["RAY_ADDRESS"])
    logs_until(client, "first", "step 20/600")
    ray_job(head, "stop", "first")
    assert client.get_job_status("first") == "STOPPED"
    log = client.get_job_logs("first")
    trained = max(int(step) for step in re.findall(r"step (\d+)/600", log))
    assert f"lungseg: stopped: step {trained} is committed" in log

    submit(head, "second", words)
    log = logs_until(client, "second", "published: ")
    assert f"from epoch 0, step {trained}\n" in log
    assert min(int(step) for step in re.findall(r"step (\d+)/600", log)) == trained + 1
    pull = ["pull", "--store", store, "--run", "job", "--out", str(tmp_path / "out")]
    pulled = subprocess.run([*LUNGSEG, *pull], capture_output=True, text=True, timeout=60)
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "out" / "model.keras").stat().st_size > 0
