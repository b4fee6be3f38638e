"""`ray start --head` and `ray job submit -- python jobs/train.py …`, as on a cluster, on 127.0.0.1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.balls import write_balls
from helpers.servers import ROOT, free_ports

from lungseg.storage import open_store

pytestmark = pytest.mark.slow
LUNGSEG = [sys.executable, "-m", "lungseg.cli"]
RAY = str(Path(sysconfig.get_path("scripts")) / "ray")


PLANNED = '[{"nodes": 1, "CPU": "2", "GPU": 0}]'


@contextmanager
def ray_start(environment: dict[str, str], *flags: str) -> Iterator[None]:
    """A node, while the block runs. A busy machine may need longer than the 30 s that Ray grants it to start:
    then it is started again."""
    command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *flags]
    command += ["--object-store-memory=200000000"]
    started: list[subprocess.Popen[bytes]] = []
    over = threading.Event()

    def keep_up() -> None:
        while not over.wait(0.5):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen(command, env=environment, cwd=ROOT, **quiet))
            started[-1].wait()

    keeper = threading.Thread(target=keep_up)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        for node in started:
            node.terminate()
        keeper.join(timeout=60)


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """The environment of a client of a fresh head node, which like the charts' takes no work of itself;
    LUNGSEG_TEST_GCS is where nodes join it."""
    gcs, dashboard, client, *agents = free_ports(7)
    # Ray's sockets live below the temporary folder, and their paths must stay below 108 bytes.
    temporary = Path("/tmp") / f"ray-{os.getpid()}"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # nothing here is worth a half-minute drain
    environment["PATH"] = f"{sysconfig.get_path('scripts')}:{environment['PATH']}"  # as in the image
    # As the charts say.
    environment |= {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "90"}
    environment["LUNGSEG_NODE_GROUPS"] = PLANNED
    environment.pop("RAY_ADDRESS", None)
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
    flags = [f"--{name}={port}" for name, port in zip((*names, "metrics-export-port"), agents, strict=True)]
    flags += ["--head", "--dashboard-host=127.0.0.1", f"--port={gcs}", "--num-cpus=0"]
    flags += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    with ray_start(environment, *flags, f"--temp-dir={temporary}"):
        address = {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}", "LUNGSEG_TEST_GCS": f"127.0.0.1:{gcs}"}
        yield environment | address


def run(command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Its exit code, and all it said."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def until_it_answers(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Of a head that has just begun the dashboard answers late, and before its node can run jobs."""
    for _ in range(60):
        code, said = run(command, environment)
        if not re.search("cluster-unreachable|Failed to connect|No available agent", said):
            return code, said
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


@pytest.fixture
def nodes() -> Iterator[ExitStack]:
    """Nodes that join the head while a test runs."""
    with ExitStack() as stack:
        yield stack


def test_a_job_waits_for_its_node_loses_no_step_when_stopped_and_its_successor_ends_with_a_checkpoint_to_pull(
    head: dict[str, str], nodes: ExitStack, tmp_path: Path
) -> None:
    from ray.job_submission import JobSubmissionClient

    store = ["--store", str(tmp_path / "store")]
    write_balls(open_store(store[1]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {epochs: 1, steps_per_epoch: 300, log_every_steps: 1, global_batch: 2}")
    words = ["train", *store, "--data", "balls", "--run", "r", "--resume", "--recipe", str(recipe)]
    words += ["--set", "model.width=2", "--set", "model.depth=2"]
    submit = [*LUNGSEG, "submit", *words]
    code, log = until_it_answers([*submit, "--set", "train.cpus_per_worker=3"], head)
    assert code == 2, log
    assert "lungseg: too-few-cpus (workers=1, cpus_per_worker=3, cluster_cpus=2)" in log  # of the coming node
    assert "waiting for 1" not in log

    assert run([*submit, "--no-wait"], head)[0] == 0
    recipe.unlink()  # it went along by the store
    assert "train-r runs already" in run([*LUNGSEG, "submit", "--no-wait", *words[:-6]], head)[1]
    client = JobSubmissionClient(head["RAY_ADDRESS"])
    logs_until(client, "train-r", "waiting for 1 worker, 0 are there, ")
    nodes.enter_context(ray_start(head, f"--address={head['LUNGSEG_TEST_GCS']}", "--num-cpus=2"))
    logs_until(client, "train-r", "step 20/300")
    run([RAY, "job", "stop", "train-r"], head)
    assert run([*LUNGSEG, "wait", *store, "--run", "r"], head)[0] == 130
    code, log = run([*LUNGSEG, "logs", *store, "--run", "r"], head)
    trained = max(int(step) for step in re.findall(r"step (\d+)/300", log))
    assert f"lungseg: stopped: step {trained} is committed" in log
    assert not re.search("Traceback|oneDNN|cuda|absl|TF_CONFIG|Requesting resources", log)
    code, told = run([*LUNGSEG, "status", *store, "--run", "r"])
    assert told.splitlines()[0] == "r (train on balls): stopped"
    assert told.splitlines()[-1] == f"  committed: step {trained}"

    train = ["python", str(ROOT / "jobs" / "train.py"), *words[1:-6], "--submitted"]
    run([RAY, "job", "submit", "--submission-id", "second", "--", *train], head)
    log = client.get_job_logs("second")
    assert client.get_job_status("second") == "SUCCEEDED", log
    assert f"from epoch 0, step {trained}\n" in log
    assert min(int(step) for step in re.findall(r"step (\d+)/300", log)) == trained + 1
    assert f"committed step {trained}\n" in run([*LUNGSEG, "logs", *store, "--run", "r"])[1]  # of the store
    assert run([*LUNGSEG, "pull", *store, "--run", "r", "--out", str(tmp_path / "out")])[0] == 0
    assert (tmp_path / "out" / "model.keras").stat().st_size > 0
