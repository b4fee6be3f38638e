"""How long a run stands still after a death, and how many steps it trains again.

    uv run python tests/benchmarks/recovery.py [--repeats 3]

A Ray cluster of a head without cores and two nodes of one core each, all on this machine, trains a tiny
network on synthetic balls with `lungseg train`, 50 steps an epoch, one checkpoint an epoch. In the middle
of an epoch the worker, its node (the raylet) or the whole command is killed by SIGKILL, or the
worker is asked to leave by SIGTERM. Prints medians and ranges; times are those at which log lines arrive.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray  # noqa: F401 - brings its own psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import psutil  # noqa: E402
from helpers.balls import write_balls  # noqa: E402
from helpers.servers import free_ports  # noqa: E402

from lungseg.storage import open_store  # noqa: E402

RAY = str(Path(sysconfig.get_path("scripts")) / "ray")
STEPS_PER_EPOCH = 50
SETTINGS = ("model.width=2", "model.depth=2", "train.global_batch=4", "train.epochs=1000", "train.seed=1")
SETTINGS += ("train.log_every_steps=1", f"train.steps_per_epoch={STEPS_PER_EPOCH}", "train.cpus_per_worker=1")
SETTINGS += ("train.precision=float32", "train.patience_epochs=1000", "train.max_failures=100")
KINDS = {
    "worker asked to leave (SIGTERM)": "left",
    "worker killed": "worker",
    "node killed": "node",
    "command killed, started again with --resume": "command",
}


@dataclass(frozen=True)
class Outcome:
    """`noticed_seconds` and `first_step_seconds` count from the kill, or from the new command."""

    noticed_seconds: float | None
    first_step_seconds: float
    steps_lost: int


class Cluster:
    """A head and nodes of one core each; a node that was killed is replaced by `fill`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.nodes = folder, list[subprocess.Popen[bytes]]()
        self.port = free_ports(1)[0]
        self.environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        self.environment |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment.pop("RAY_ADDRESS", None)
        temporary = Path("/tmp") / f"ray-{os.getpid()}"  # paths of sockets must be short
        flags = ["--head", f"--port={self.port}", "--num-cpus=0", f"--temp-dir={temporary}"]
        self.start(*flags, "--include-dashboard=false")
        self.environment["RAY_ADDRESS"] = f"127.0.0.1:{self.port}"
        time.sleep(10)

    def start(self, *flags: str) -> None:
        agents = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
        names = (*agents, "metrics-export-port")
        ports = [f"--{name}={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
        common = ["--block", "--node-ip-address=127.0.0.1", "--object-store-memory=200000000", *ports]
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                [RAY, "start", *flags, *common],
                env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.nodes.append(node)

    def fill(self) -> None:
        """Two nodes that work, beside the head."""
        missing = 3 - sum(node.poll() is None for node in self.nodes)
        for _ in range(missing):
            self.start(f"--address=127.0.0.1:{self.port}", "--num-cpus=1")
        if missing:
            time.sleep(15)

    def worker(self) -> tuple[Any, Any]:
        """The process of the training worker, and that of its raylet."""
        for node in self.nodes:
            below = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
            for process in below:
                if any(part.startswith("ray::RayTrainWorker") for part in process.cmdline()[:1]):
                    return process, next(one for one in below if one.name() == "raylet")
        raise AssertionError("no worker")

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if node.poll() is None:
                children = psutil.Process(node.pid).children(recursive=True)
                for process in [*children, psutil.Process(node.pid)]:
                    if process.is_running():
                        process.kill()
            node.wait()


class Command:
    """`lungseg train --resume` in the cluster, and what it says."""

    def __init__(self, cluster: Cluster, store: str, run: str, log: Path) -> None:
        line = [sys.executable, "-m", "lungseg.cli", "train", "--store", store, "--data", "balls"]
        line += ["--run", run, "--resume", *(part for one in SETTINGS for part in ("--set", one))]
        self.log, self.began, self.seen = log, time.monotonic(), set[str]()
        self.process = subprocess.Popen(
            line, env=cluster.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def until(self, pattern: str) -> re.Match[str]:
        """The first new line that matches, now that it has come. Ray shows a line once for each node that
        keeps its logs in this machine's folder, here all three."""
        assert self.process.stdout is not None
        with self.log.open("a") as copy:
            for line in self.process.stdout:
                if line in self.seen:
                    continue
                self.seen.add(line)
                copy.write(line)
                if found := re.search(pattern, line):
                    return found
        raise AssertionError(f"the command ended; see {self.log}")

    def started(self) -> tuple[int, int]:
        """Epochs and steps that a group of workers starts from."""
        found = self.until(r"from epoch (\d+), step (\d+)")
        return int(found[1]), int(found[2])

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def measure(cluster: Cluster, store: str, kind: str, repeats: int, log: Path) -> list[Outcome]:
    outcomes: list[Outcome] = []
    cluster.fill()
    command = Command(cluster, store, kind, log)
    try:
        epoch, _ = command.started()
        for _ in range(repeats):
            command.until(rf"epoch {epoch + 2}, step {STEPS_PER_EPOCH // 2}/")
            done = (epoch + 1) * STEPS_PER_EPOCH + STEPS_PER_EPOCH // 2
            began, noticed = time.monotonic(), None
            if kind == "command":
                command.kill()
                command = Command(cluster, store, kind, log)
                began = command.began
            else:
                worker, raylet = cluster.worker()
                victim = raylet if kind == "node" else worker
                victim.send_signal(signal.SIGTERM if kind == "left" else signal.SIGKILL)
                command.until(r"worker \d+ failed")
                noticed = time.monotonic() - began
            epoch, step = command.started()
            command.until(r"epoch \d+, step \d+/")
            outcomes.append(Outcome(noticed, time.monotonic() - began, max(0, done - step)))
            print(f"{kind}: {outcomes[-1]}", file=sys.stderr, flush=True)
            cluster.fill()
    finally:
        command.kill()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    folder = Path(tempfile.mkdtemp(prefix="lungseg-recovery-"))
    store = str(folder / "store")
    write_balls(open_store(store))
    cluster = Cluster(folder)
    rows: dict[str, list[Outcome]] = {}
    try:
        for title, kind in KINDS.items():
            rows[title] = measure(cluster, store, kind, repeats, folder / f"{kind}.log")
    finally:
        cluster.stop()
    print("| what | noticed after, s | first step after, s | steps trained again |\n|---|--:|--:|--:|")
    for title, found in rows.items():
        noticed = [one.noticed_seconds for one in found if one.noticed_seconds is not None]
        cells = [spread(noticed), spread([one.first_step_seconds for one in found])]
        print(f"| {title} | {' | '.join([*cells, spread([one.steps_lost for one in found], 0)])} |")


def spread(values: list[float] | list[int], digits: int = 1) -> str:
    """The median, and the range."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
