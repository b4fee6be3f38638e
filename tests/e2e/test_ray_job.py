"""`ray start --head` and `ray job submit -- python jobs/train.py …`, as on a cluster, on 127.0.0.1."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

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


def test_a_submitted_training_job_succeeds_and_its_best_checkpoint_can_be_pulled(
    head: dict[str, str], tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    write_balls(open_store(store))
    common = ["--set", "train.global_batch=2", "--set", "model.width=2", "--set", "model.depth=2"]
    common += ["--set", "train.epochs=1"]
    here = ["--store", store, "--data", "balls", *common]
    train = ["python", str(ROOT / "jobs" / "train.py"), *here, "--run", "job"]
    not_yet = ("Failed to connect", "No available agent")  # the dashboard answers before a node can run jobs
    for attempt in range(60):
        done = subprocess.run(
            [RAY, "job", "submit", "--submission-id", "first", "--", *train],
            env=head, capture_output=True, text=True, timeout=300, cwd=ROOT,
        )  # fmt: skip
        if not any(words in done.stderr + done.stdout for words in not_yet) or attempt == 59:
            break
        time.sleep(1)
    shown = subprocess.run(
        [RAY, "job", "status", "first"], env=head, capture_output=True, text=True, timeout=60
    )
    assert "SUCCEEDED" in (shown.stdout + shown.stderr).upper(), done.stdout[-3000:] + done.stderr[-3000:]
    pull = ["pull", "--store", store, "--run", "job", "--out", str(tmp_path / "out")]
    pulled = subprocess.run([*LUNGSEG, *pull], capture_output=True, text=True, timeout=60)
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "out" / "model.keras").stat().st_size > 0
