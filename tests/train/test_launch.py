"""Runs through Ray that are killed, in part or whole, or cannot work, and what becomes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scraping import Endpoint

from lungseg.config import load_recipe
from lungseg.errors import ConfigError, RunError
from lungseg.train.launch import cpus_per_worker


def manifests(balls: Any, run: str) -> list[str]:
    return [item.key for item in balls.store.find(f"runs/{run}/") if item.key.endswith("/manifest.json")]


def train_workers() -> set[int]:
    """Processes of Ray Train workers below this one: other sessions on this machine have theirs."""
    import psutil  # Ray's own copy

    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            # Ray names a busy actor Class.method, an idle one Class.
            if process.cmdline()[0].startswith("ray::RayTrainWorker"):
                found.add(process.pid)
        except (psutil.Error, IndexError):
            continue  # it ended while we looked
    return found


@contextmanager
def worker_killed_after_first_checkpoint(balls: Any, run: str) -> Iterator[list[int]]:
    """Yields a list that gets the pid of the worker that was killed."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            if manifests(balls, run):
                (pid,) = train_workers()
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        over.set()
        watcher.join()


def assert_same_end(balls: Any, run: str, undisturbed: str) -> None:
    """Bit for bit: a resumed run restores weights, optimiser and place, and draws by (seed, step, row)."""
    expected, found = balls.final(undisturbed), balls.final(run)
    assert found.state.epoch == expected.state.epoch
    for part in ("weights", "optimizer"):
        wanted, got = getattr(expected, part), getattr(found, part)
        assert wanted.keys() == got.keys()
        assert [path for path in wanted if wanted[path].tobytes() != got[path].tobytes()] == []
    lines = [json.loads(line) for line in balls.store.get(f"runs/{run}/metrics.jsonl").decode().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]


def assert_endpoint_tells(balls: Any, run: str, endpoint: Endpoint) -> None:
    """Of a run of 4 epochs of 6 steps whose worker was killed after its first checkpoint: what the first
    worker counted is added to what the second one did, but for its last moments."""
    found = endpoint.scrape()
    worker = {name: value for (name, *labels), value in found.items() if labels == [run, "", "0"]}
    last = balls.final(run).state
    assert found["lungseg_restarts_total", run, "", ""] == 1
    assert worker["lungseg_val_dice"] == last.metrics["val_dice"]
    assert 18 <= worker["lungseg_step_seconds_count"] <= 30
    assert worker["lungseg_patches_total"] == 4 * worker["lungseg_step_seconds_count"]
    assert worker["lungseg_step_seconds_sum"] > worker["lungseg_data_wait_seconds_total"] > 0
    assert 3 <= worker["lungseg_checkpoint_seconds_count"] <= 5
    assert worker["lungseg_checkpoint_bytes_total"] > 3 * 1000
    assert 0 <= worker["lungseg_learning_rate"] < 0.01  # the cosine's end
    assert 0 < worker["lungseg_train_loss"] < 2
    assert worker["lungseg_stream_patches_total"] > worker["lungseg_patches_total"]


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_ends_as_if_nothing_had_been(
    balls: Any, undisturbed: str, endpoint: Endpoint
) -> None:
    with worker_killed_after_first_checkpoint(balls, "killed-worker") as killed:
        best = balls.train("killed-worker", "train.max_failures=1", *endpoint.settings)
    assert len(killed) == 1
    assert_endpoint_tells(balls, "killed-worker", endpoint)
    assert best["val_dice"] == pytest.approx(0.5, abs=0.5)
    assert_same_end(balls, "killed-worker", undisturbed)


@pytest.mark.slow
def test_a_command_killed_whole_goes_on_with_resume(balls: Any, undisturbed: str, tmp_path: Path) -> None:
    run = "killed-command"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(balls.recipe().model_dump_json())  # JSON is YAML
    command = [sys.executable, "-m", "lungseg.cli", "train", "--store", balls.store.uri, "--data", "balls"]
    command += ["--run", run, "--recipe", str(recipe)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 240
            while not manifests(balls, run):
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert balls.final(run).state.epoch < 4
    with pytest.raises(RunError, match="run-exists") as caught:
        balls.train(run)
    assert "--resume" in caught.value.remedy
    balls.train(run, mode="resume")
    assert_same_end(balls, run, undisturbed)


@pytest.mark.slow
def test_our_own_errors_come_out_of_ray_as_themselves_and_are_not_tried_again(
    balls: Any, ray_cluster: Any
) -> None:
    wild = ("optimizer.learning_rate=1e38", "optimizer.weight_decay=1e10", "optimizer.schedule=constant")
    began = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            began.update(train_workers())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(RunError, match="loss-not-finite"):
            balls.train("wild", *wild, "train.max_failures=3")
    finally:
        over.set()
        watcher.join()
    assert len(began) == 1


def test_cores_that_the_cluster_lacks_are_an_error_before_the_name_is_taken(
    balls: Any, ray_cluster: Any
) -> None:
    with pytest.raises(ConfigError, match="too-few-cpus"):
        balls.train("greedy", "train.cpus_per_worker=1000")
    assert not balls.store.exists("runs/greedy/run.json")


@pytest.mark.parametrize(
    ("cores", "workers", "asked", "given"),
    [
        ([8], 1, None, 8),
        ([8], 2, None, 4),
        ([8], 3, None, 2),
        ([4, 8], 2, None, 4),  # one a node, alike on both
        ([4, 8], 3, None, 2),
        ([0, 4, 4], 2, None, 4),  # a head node that takes no work
        ([8], 2, 1, 1),
        ([4, 8], 1, 8, 8),  # more than the smallest node has, but the larger one has them
        ([2], 3, None, None),
        ([2], 2, 2, None),
        ([4, 4], 1, 8, None),  # no node has them
        ([4, 4, 4], 2, 6, None),
        ([], 1, None, None),
    ],
)
def test_workers_share_the_cores_of_their_nodes(
    cores: list[int], workers: int, asked: int | None, given: int | None
) -> None:
    settings = [f"train.workers={workers}", f"train.global_batch={workers}"]
    recipe = load_recipe(None, settings + ([f"train.cpus_per_worker={asked}"] if asked else []))
    nodes = [{"Alive": True, "Resources": {"CPU": float(count)} if count else {}} for count in cores]
    nodes.append({"Alive": False, "Resources": {"CPU": 1.0}})
    if given is None:
        with pytest.raises(ConfigError, match="too-few-cpus"):
            cpus_per_worker(recipe, nodes)
    else:
        assert cpus_per_worker(recipe, nodes) == given
