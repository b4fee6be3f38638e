"""Runs whose node or command goes away, and who continues them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.train_watch import assert_same_end, manifests, tell_ray_that_a_node_drains, train_workers

from lungseg.errors import RunError


@pytest.mark.slow
def test_a_run_outlives_the_node_of_its_worker(balls: Any, undisturbed: str, tmp_path: Path) -> None:
    """The second node has the only core that is free, until it is gone."""
    there: list[set[int]] = []
    with second_node(tmp_path) as raylet, head_taken() as release:

        def kill() -> None:
            while not manifests(balls, "killed-node"):
                time.sleep(0.02)
            there.append(train_workers() & {one.pid for one in raylet.children(recursive=True)})
            raylet.kill()
            release()

        killer = threading.Thread(target=kill)
        killer.start()
        balls.train("killed-node", "train.max_failures=1")
        killer.join()
    assert [len(pids) for pids in there] == [1]
    assert balls.store.exists("runs/killed-node/claims/000002.json")
    assert_same_end(balls, "killed-node", undisturbed)


@pytest.mark.slow
def test_a_worker_whose_node_drains_commits_within_the_epoch_and_goes_on_elsewhere(
    balls: Any, ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray is told as by its autoscaler; as on a cloud, somebody else ends the node. No failure may count.

    Ray itself ends a node whose time is over, and a busy machine may need half a minute for the first step.
    """
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")  # as on a cluster
    run = "drained-node"

    def drain() -> None:
        while not balls.store.exists(f"runs/{run}/claims/000001.json"):
            time.sleep(0.02)
        tell_ray_that_a_node_drains(newest_node(), seconds=120)
        until = time.monotonic() + 130
        while not manifests(balls, run) and time.monotonic() < until:
            time.sleep(0.02)
        if manifests(balls, run):
            committed.append(balls.final(run).state.step)
        raylet.kill()
        release()

    committed: list[int] = []
    with second_node(tmp_path) as raylet, head_taken() as release:
        drainer = threading.Thread(target=drain)
        drainer.start()
        long = ("train.epochs=1", "train.steps_per_epoch=1500", "train.log_every_steps=1000")
        balls.train(run, "train.max_failures=0", *long)
        drainer.join()
    assert 0 < committed[0] < 1500
    log = balls.store.get(f"runs/{run}/log.txt").decode()
    assert f"from epoch 0, step {committed[0]}\n" in log
    assert balls.final(run).state.step == 1500


def newest_node() -> str:
    import ray

    here = ray.get_runtime_context().get_node_id()
    (node,) = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {here}
    return str(node)


JOINS = """
from ray._private import services
from ray.scripts.scripts import main
services.resolve_ip_for_localhost = lambda host: host  # the head listens on the loopback address only
main()
"""


@contextmanager
def second_node(folder: Path) -> Iterator[Any]:
    """The raylet's process of another node, with one core, in the cluster of this session."""
    import psutil
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [
        sys.executable,
        "-c",
        JOINS,
        "start",
        "--block",
        f"--address={address}",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=1",
    ]

    def begin() -> subprocess.Popen[bytes]:
        with (folder / "node").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def alive() -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def raylets() -> list[Any]:
        try:
            below = psutil.Process(node.pid).children(recursive=True)
            return [process for process in below if process.name() == "raylet"]
        except psutil.NoSuchProcess:
            return []

    before, node = alive(), begin()
    try:
        deadline = time.monotonic() + 400
        # By name: that an earlier test's node is dead may be found out only now.
        while not (alive() - before and (found := raylets())):
            assert time.monotonic() < deadline, (folder / "node").read_text()[-2000:]
            if node.poll() is not None:  # a busy machine may need longer than Ray grants a node to start
                node = begin()
            time.sleep(0.2)
        (raylet,) = found
        yield raylet
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


@contextmanager
def head_taken() -> Iterator[Callable[[], None]]:
    """All cores of this node are busy until the function that it yields is called."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    where = NodeAffinitySchedulingStrategy(here, soft=False)

    class Holder:
        def ready(self) -> bool:
            return True

    cores = node["Resources"]["CPU"]
    holder = ray.remote(Holder).options(num_cpus=cores, scheduling_strategy=where).remote()
    assert ray.get(holder.ready.remote(), timeout=60)
    try:
        yield lambda: ray.kill(holder)
    finally:
        ray.kill(holder)


@contextmanager
def train_command(balls: Any, run: str, folder: Path, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    """`lungseg train` in a process of its own, with a Ray of its own, once its run has a checkpoint."""
    recipe, log = folder / "recipe.yaml", folder / "log"
    recipe.write_text(balls.recipe(*overrides).model_dump_json())  # JSON is YAML
    command = [sys.executable, "-m", "lungseg.cli", "train", "--store", balls.store.uri, "--data", "balls"]
    command += ["--run", run, "--recipe", str(recipe)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            deadline = time.monotonic() + 240
            while not manifests(balls, run):
                assert process.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_command_killed_whole_goes_on_with_resume(balls: Any, undisturbed: str, tmp_path: Path) -> None:
    run = "killed-command"
    with train_command(balls, run, tmp_path) as process:
        os.killpg(process.pid, signal.SIGKILL)
    assert balls.final(run).state.epoch < 4
    with pytest.raises(RunError, match="run-exists") as caught:
        balls.train(run)
    assert "--resume" in caught.value.remedy
    balls.train(run, mode="resume")
    assert_same_end(balls, run, undisturbed)


@pytest.mark.slow
def test_ctrl_c_commits_the_step_it_comes_at_and_says_so(balls: Any, tmp_path: Path) -> None:
    """It comes to all processes of the command, as from a terminal."""
    run = "interrupted-command"
    with train_command(balls, run, tmp_path, "train.steps_per_epoch=200") as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 130
    state = balls.final(run).state
    assert 200 < state.step < 800
    assert state.step % 200  # no end of an epoch, which is committed anyway
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith(f"lungseg: stopped: step {state.step} is committed. Remedy: ")
    assert f"committed step {state.step}\n" in balls.store.get(f"runs/{run}/log.txt").decode()


@pytest.mark.slow
def test_of_two_commands_at_once_the_later_one_has_the_run_and_the_earlier_one_says_so(
    balls: Any, undisturbed: str, tmp_path: Path
) -> None:
    """The worker of the first stands still, as if its machine hung, until the second is through."""
    run = "two-commands"
    with train_command(balls, run, tmp_path) as process:
        (worker,) = train_workers(process.pid)
        os.kill(worker, signal.SIGSTOP)
        assert balls.final(run).state.epoch < 4
        balls.train(run, mode="resume")
        ended = balls.final(run)
        os.kill(worker, signal.SIGCONT)
        assert process.wait(timeout=120) == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("lungseg: run-taken-over")
    assert balls.final(run).name == ended.name
    assert_same_end(balls, run, undisturbed)
