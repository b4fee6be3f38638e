"""Jobs on a real head (`ray start --head`) with a token, on 127.0.0.1: what users do, and what may break.

One head for all of it, since each start takes its time: a test goes on where the one before it has ended.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers.balls import write_balls
from helpers.faults import FaultProxy, fault_proxy
from helpers.servers import ROOT, free_ports

from lungseg.storage import Store, open_store
from lungseg.submit.status import stored_log

pytestmark = pytest.mark.slow
LUNGSEG = [sys.executable, "-m", "lungseg.cli"]
RAY = str(Path(sysconfig.get_path("scripts")) / "ray")
PLANNED = '[{"nodes": 1, "CPU": "2", "GPU": 0}]'


@dataclass
class Node:
    """`ray start` with these flags. What ends while it is `running` is started again: a busy machine may need
    longer than the 30 s that Ray grants a node, and what was killed comes back, as on a cluster."""

    environment: dict[str, str]
    flags: list[str]
    process: subprocess.Popen[bytes] | None = None
    over: threading.Event = field(default_factory=threading.Event)
    up: threading.Event = field(default_factory=threading.Event)

    def _keep_up(self) -> None:
        command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        command += ["--object-store-memory=200000000", *self.flags]
        while not self.over.wait(0.5):
            piped: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            unbuffered = {**self.environment, "PYTHONUNBUFFERED": "1"}
            self.process = subprocess.Popen(command, env=unbuffered, cwd=ROOT, **piped)
            for line in self.process.stdout or ():
                if "Ray runtime started" in line:  # before, the dashboard may answer and the node give up
                    self.up.set()
            self.process.wait()

    @contextmanager
    def running(self) -> Iterator[Node]:
        keeper = threading.Thread(target=self._keep_up)
        keeper.start()
        try:
            yield self
        finally:
            self.over.set()
            if self.process:
                self.process.terminate()
            keeper.join(timeout=60)

    def kill(self) -> None:
        """With everything that it started, as the end of a machine would."""
        assert self.process is not None
        self.up.clear()
        kill_tree(self.process.pid)


def kill_tree(pid: int) -> None:
    import psutil  # Ray's own copy

    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass


@dataclass
class Cluster:
    """A head, which like the charts' takes no work of itself, and its clients' environment; nodes join it at
    `gcs`. `train` are the words that train the run "r": for seconds, once TensorFlow is there."""

    head: Node
    environment: dict[str, str]
    address: str
    gcs: str
    store: Store
    train: list[str]

    @property
    def of_run(self) -> list[str]:
        return ["--store", self.store.uri, "--run", "r"]

    def begin(
        self, *words: str, program: Sequence[str] = LUNGSEG, **environment: str
    ) -> subprocess.Popen[str]:
        """A command that goes on beside the test."""
        both = {**self.environment, **environment}
        piped: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*program, *words], env=both, cwd=ROOT, **piped)

    def lungseg(self, *words: str) -> tuple[int, str]:
        return ended(self.begin(*words))

    def logs_until(self, job: str, wanted: str) -> None:
        """Asked in this process, since a command of its own would cost what the job needs."""
        from ray.job_submission import JobSubmissionClient

        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        client, deadline = JobSubmissionClient(self.address, headers=token), time.monotonic() + 240
        while wanted not in (log := client.get_job_logs(job)):
            assert not client.get_job_status(job).is_terminal(), log[-3000:]
            assert time.monotonic() < deadline, log[-3000:]
            time.sleep(0.5)

    def until(self, wanted: str, *words: str) -> str:
        """What the command says once it says what is wanted."""
        deadline = time.monotonic() + 240
        while not re.search(wanted, (said := self.lungseg(*words)[1])):
            assert time.monotonic() < deadline, said[-3000:]
        return said


def ended(command: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and all it said."""
    said = command.communicate(timeout=300)[0]
    return command.returncode, said


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    store = open_store(folder / "store")
    write_balls(store)
    recipe = folder / "recipe.yaml"
    recipe.write_text("train: {epochs: 1, steps_per_epoch: 600, log_every_steps: 1, global_batch: 2}")
    train = ["train", "--store", store.uri, "--data", "balls", "--run", "r", "--resume"]
    train += ["--recipe", str(recipe), "--set", "model.width=2", "--set", "model.depth=2"]
    gcs, dashboard, client, *agents = free_ports(7)
    # Ray's sockets live below the temporary folder, and their paths must stay below 108 bytes.
    temporary = Path("/tmp") / f"ray-{os.getpid()}"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
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
    head, address = Node(environment, [*flags, f"--temp-dir={temporary}"]), f"http://127.0.0.1:{dashboard}"
    with head.running():
        assert head.up.wait(timeout=300)
        clients = environment | {"RAY_API_SERVER_ADDRESS": address}
        yield Cluster(head, clients, address, f"127.0.0.1:{gcs}", store, train)


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> Iterator[Node]:
    """Two cores that join the head."""
    joining = Node(cluster.environment, [f"--address={cluster.gcs}", "--num-cpus=2"])
    with joining.running():
        yield joining


@pytest.fixture(scope="module")
def patient(cluster: Cluster) -> Iterator[tuple[subprocess.Popen[str], FaultProxy]]:
    """Who waits for the run "r" as long as it takes, over a connection that can be cut."""
    with fault_proxy(cluster.address) as connection:
        waiter = cluster.begin("wait", *cluster.of_run, "--address", connection.endpoint)
        while not connection.seen:
            time.sleep(0.1)
        yield waiter, connection
        waiter.kill()
        waiter.communicate()


def test_a_stranger_is_refused_and_of_two_at_the_same_moment_one_starts_the_job(cluster: Cluster) -> None:
    strangers = [
        cluster.begin("submit", *cluster.train, RAY_AUTH_TOKEN="another"),
        cluster.begin("wait", *cluster.of_run, RAY_AUTH_MODE="disabled"),
    ]
    for code, said in map(ended, strangers):
        assert (code, said.count("\n")) == (2, 1), said
        assert said.startswith("lungseg: cluster-refused")
        assert "RAY_AUTH_TOKEN" in said
    assert not list(cluster.store.find("runs/"))
    wide = ["wide" if word == "r" else word for word in cluster.train]
    wide += ["--set", "train.cpus_per_worker=3"]
    cluster.until("train-wide is submitted", "submit", "--no-wait", *wide)  # a new head has no agent for jobs
    doctor = cluster.begin("doctor")
    both = [cluster.begin("submit", "--no-wait", *cluster.train) for _ in range(2)]
    said = sorted(ended(one)[1].partition(" http")[0] for one in both)
    assert said == ["train of r runs already on", "train-r is submitted to"]
    assert cluster.lungseg("wait", *cluster.of_run[:3], "wide")[0] == 2
    log = cluster.lungseg("logs", *cluster.of_run[:3], "wide")[1]
    assert "lungseg: too-few-cpus (workers=1, cpus_per_worker=3, cluster_cpus=2)" in log  # of the coming node
    assert "waiting for 1" not in log
    told = cluster.until("waits for", "status", *cluster.of_run)
    assert re.fullmatch(
        r"r \(train\): waiting\n  job train-r: RUNNING for \d+ s, waits for 1 x 2 CPU since \d+ s\n", told
    )
    checks = ended(doctor)[1]
    assert re.search(rf"cluster +ok +{cluster.address}: answers; Ray ([\d.]+) there, \1 here", checks)
    assert re.search("token +ok +of RAY_AUTH_TOKEN: accepted", checks)
    assert cluster.environment["RAY_AUTH_TOKEN"] not in checks


def test_a_run_that_is_stopped_loses_no_step_and_who_waits_hears_of_it_over_a_broken_network(
    cluster: Cluster, node: Node, patient: tuple[subprocess.Popen[str], FaultProxy]
) -> None:
    waiter, connection = patient
    cluster.logs_until("train-r", "step 10/")
    connection.always["GET"] = "reset"
    code, told = cluster.lungseg("stop", *cluster.of_run)
    del connection.always["GET"]
    assert code == 0, told
    code, log = cluster.lungseg("logs", *cluster.of_run)
    trained = max(int(step) for step in re.findall(r"step (\d+)/600", log))
    assert f"lungseg: stopped: step {trained} is committed" in log
    # Seen now and then: somebody writes to a process that was stopped before; who it is, is not known.
    log = re.sub(r"(?s)Traceback.*?\[Errno 32\] Broken pipe", "", log)
    assert not re.search("Traceback|oneDNN|cuda|absl|TF_CONFIG|Requesting resources", log)
    first, second, *_, last = told.splitlines()
    assert (first, second) == ("train-r is asked to stop", "r (train on balls): stopped")
    assert last == f"  committed: step {trained}"
    code, said = ended(waiter)
    assert code == 130
    assert said.count("the cluster does not answer, and is asked again") == 1
    code, told = cluster.lungseg("stop", *cluster.of_run)
    assert (code, told.partition(" (")[0]) == (2, "lungseg: nothing-to-stop: train of r has ended: STOPPED")


def test_a_job_outlives_its_head_in_the_store_and_a_killed_driver_is_told_as_lost(
    cluster: Cluster, node: Node
) -> None:
    assert "train-r:2 is submitted" in cluster.lungseg("submit", "--no-wait", *cluster.train)[1]
    waiter = cluster.begin("wait", *cluster.of_run)
    cluster.logs_until("train-r:2", "step ")
    node.kill()
    cluster.head.kill()
    assert cluster.head.up.wait(timeout=300)
    said = cluster.until("is submitted", "submit", "--no-wait", *cluster.train)
    assert said.startswith("train-r is submitted")  # to a head that knows nothing
    kill_driver(cluster)
    assert ended(waiter)[0] == 1
    assert cluster.lungseg("status", *cluster.of_run)[1].startswith("r (train on balls): lost\n")


def test_what_goes_on_by_ray_job_submit_ends_with_a_checkpoint_to_pull(
    cluster: Cluster, node: Node, tmp_path: Path
) -> None:
    recipe = next(item.key for item in cluster.store.find("runs/r/submitted-"))
    train = ["python", str(ROOT / "jobs" / "train.py"), *cluster.train[1:8], "--submitted", recipe]
    submit = cluster.begin("job", "submit", "--submission-id", "second", "--", *train, program=[RAY])
    code, said = ended(submit)
    assert code == 0, said
    # As the store has it: what Ray shows of the workers may have other lines within a line.
    *_, (committed, log) = re.findall(
        r"(?s)from epoch 0, step (\d+)(.*?)(?=from epoch|\Z)", stored_log(cluster.store, "r")
    )
    assert min(int(step) for step in re.findall(r"step (\d+)/600", log)) == int(committed) + 1
    told = cluster.lungseg("status", *cluster.of_run)[1]
    assert told.startswith("r (train on balls): ended\n  job second: SUCCEEDED for ")
    assert cluster.lungseg("pull", *cluster.of_run, "--out", str(tmp_path / "out"))[0] == 0
    assert (tmp_path / "out" / "model.keras").stat().st_size > 0


def look(cluster: Cluster, what: str, **environment: str) -> list[str]:
    """What a job's driver tells of the nodes."""
    driver = [str(ROOT / "tests/helpers/look_at_nodes.py"), what]
    environment |= {"RAY_ADDRESS": cluster.gcs, "PYTHONPATH": str(ROOT / "tests")}
    code, said = ended(cluster.begin(*driver, program=[sys.executable], **environment))
    assert code == 0, said
    return re.findall(r"(?m)^(?:\d served|(?:True|False) (?:True|False)|on the head|elsewhere)$", said)


def test_metrics_are_served_by_the_head(cluster: Cluster, node: Node) -> None:
    assert look(cluster, "exporter", METRICS_PORT=str(free_ports(1)[0])) == 5 * ["on the head"]


def test_workers_begin_with_their_imports_done_on_every_node_that_has_cores_and_work(
    cluster: Cluster, node: Node
) -> None:
    assert look(cluster, "workers") == ["1 served", "True True", "1 served", "0 served", "False False"]


def test_a_node_that_drains_is_not_held_by_its_warm_processes(cluster: Cluster, node: Node) -> None:
    # Its worker goes on, and is nobody's child any more.
    assert look(cluster, "drain") == ["1 served", "True True", "0 served", "True False"]


def kill_driver(cluster: Cluster) -> None:
    import psutil

    assert cluster.head.process
    head = psutil.Process(cluster.head.process.pid)
    deadline = time.monotonic() + 120
    while not (drivers := [one for one in head.children(recursive=True) if "lungseg.cli" in cmdline(one)]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for driver in drivers:
        driver.kill()


def cmdline(process: Any) -> str:
    import psutil

    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it ended while we looked
