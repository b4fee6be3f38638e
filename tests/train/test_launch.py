"""Runs through Ray that are killed, in part or whole, or cannot work, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import pytest
from helpers.scraping import Endpoint
from helpers.train_watch import actors, assert_same_end, lines, train_workers

from lungseg.config import load_recipe
from lungseg.errors import ConfigError, RunError, StorageError
from lungseg.telemetry import log
from lungseg.train.launch import _trainer_class, _watcher, source_of
from lungseg.train.ready import missing_nodes_told
from lungseg.train.worker import disk_has_room

Moment = tuple[Callable[[set[str]], bool], signal.Signals]
"""What must be among the keys that the run has written so far, and the signal that its worker then gets."""


@contextmanager
def worker_signalled(balls: Any, run: str, moments: Sequence[Moment]) -> Iterator[list[int]]:
    """Yields a list that gets the pid of each worker that was sent a signal; each one gets but one."""
    hit: list[int] = []
    over = threading.Event()

    def watch() -> None:
        seen: set[str] = set()
        for due, kind in moments:
            while not (due(seen) and train_workers() - set(hit)):
                if over.wait(0.02):
                    return
                seen.update(item.key for item in balls.store.find(f"runs/{run}/"))
            pid = max(train_workers() - set(hit))
            os.kill(pid, kind)
            hit.append(pid)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield hit
    finally:
        over.set()
        watcher.join()


def claimed(number: int) -> Callable[[set[str]], bool]:
    """A group of workers has started, and has no step yet."""
    return lambda keys: any(key.endswith(f"claims/{number:06d}.json") for key in keys)


def written(keys: set[str]) -> int:
    return sum("/checkpoints/" in key for key in keys)


def assert_endpoint_tells(balls: Any, run: str, endpoint: Endpoint, restarts: int) -> None:
    """Of a run of 4 epochs of 6 steps whose workers were ended: what each counted is added to what the one
    before it did, but for its last moments."""
    found = endpoint.scrape()
    worker = {name: value for (name, *labels), value in found.items() if labels == [run, "", "0"]}
    last = balls.final(run).state
    assert found["lungseg_restarts_total", run, "", ""] == restarts
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
def test_a_worker_that_is_asked_to_leave_and_killed_again_and_again_ends_as_if_nothing_had_been(
    balls: Any, undisturbed: str, endpoint: Endpoint
) -> None:
    """Asked before its first step it leaves after it; then a seed says after how many files of checkpoints it
    is killed."""
    random = Random(1)
    moments: list[Moment] = [(claimed(1), signal.SIGTERM)]
    for after in sorted(random.sample(range(6, 24), 2)):
        moments.append((lambda keys, after=after: written(keys) >= after, signal.SIGKILL))
    with worker_signalled(balls, "killed-worker", moments) as hit:
        best = balls.train("killed-worker", "train.max_failures=3", *endpoint.settings)
    assert len(hit) == len(set(hit)) == 3
    assert_endpoint_tells(balls, "killed-worker", endpoint, restarts=3)
    assert best.val_dice == pytest.approx(0.5, abs=0.5)
    assert "committed step 1\n" in balls.store.get("runs/killed-worker/log.txt").decode()
    assert_same_end(balls, "killed-worker", undisturbed)


@pytest.mark.slow
def test_a_run_goes_on_with_two_workers_and_then_with_one_again_within_an_epoch(
    balls: Any, undisturbed: str
) -> None:
    """One of two workers is asked; both leave at the fourth step, where they wait for the device."""
    run, settings = "elastic", ("train.max_failures=0", "train.log_every_steps=4")
    steps = []
    for number, workers in ((1, 1), (2, 2)):
        with (
            worker_signalled(balls, run, [(claimed(number), signal.SIGTERM)]) as hit,
            pytest.raises(RunError, match="worker-asked-to-leave") as caught,
        ):
            balls.train(run, f"train.workers={workers}", *settings, mode="resume")
        assert len(hit) == 1
        assert "--resume" in caught.value.remedy
        steps.append(balls.final(run).state.step)
    assert steps == [1, 4]
    balls.train(run, *settings, mode="resume")
    expected, found = balls.final(undisturbed), balls.final(run)
    assert found.state.step == expected.state.step == 24
    for path, array in expected.weights.items():
        np.testing.assert_allclose(found.weights[path], array, rtol=0, atol=2e-5, err_msg=path)
    losses = [[line["loss"] for line in lines(balls, name)] for name in (run, undisturbed)]
    # So each epoch had the same patches: other ones would have another loss.
    np.testing.assert_allclose(*losses, atol=1e-5)


@pytest.mark.slow
def test_the_port_of_a_worker_is_kept_for_its_tensorflow() -> None:
    """It is bound, but by who lets others of the same process share it, as TensorFlow's server then does."""
    code = """
import os, socket
from lungseg.train.worker import address
host, port = address().rsplit(":", 1)
with socket.socket() as other:
    try:
        other.bind((host, int(port)))
    except OSError as error:
        print(error.strerror)
import tensorflow as tf
tf.distribute.Server({"worker": [f"{host}:{port}"]}, job_name="worker", task_index=0)
print("shared")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines() == ["Address already in use", "shared"], done.stderr[-3000:]


@pytest.mark.slow
def test_our_own_errors_come_out_of_ray_as_themselves_and_are_not_tried_again(
    balls: Any, ray_cluster: Any
) -> None:
    """And of Ray Train's helpers only those are there that a run on this machine needs."""
    wild = ("optimizer.learning_rate=1e38", "optimizer.weight_decay=1e10", "optimizer.schedule=constant")
    began: dict[int, str] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            began.update(actors())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(RunError, match="loss-not-finite"):
            balls.train("wild", *wild, "train.max_failures=3")
    finally:
        over.set()
        watcher.join()
    names = list(began.values())
    assert names.count("RayTrainWorker") == 1
    assert not {"DatasetManager", "PlacementGroupCleaner", "PreemptionWatcher"} & set(names)


def test_a_full_disk_ends_a_run_at_once_and_a_store_that_may_come_back_does_not() -> None:
    watch = _watcher(3, None, source_of("runs/r")).after_exception
    away = StorageError("store-unreachable", remedy="wait")
    watch(None, {0: away})
    for full in (StorageError("store-full", remedy="free space"), RunError("disk-full", remedy="free space")):
        with pytest.raises(type(full), match=full.code):
            watch(None, {0: away, 1: full})


def test_a_full_disk_of_the_node_is_told_as_such() -> None:
    with pytest.raises(RunError, match="disk-full"), disk_has_room(), open("/dev/full", "w") as file:
        file.write("1")
    with pytest.raises(PermissionError), disk_has_room():
        raise PermissionError


@pytest.mark.parametrize(
    ("setting", "code"),
    [("train.cpus_per_worker=1000", "too-few-cpus"), ("train.gpus_per_worker=4", "gpus-missing")],
)
def test_what_the_cluster_lacks_is_an_error_before_the_name_is_taken(
    balls: Any, ray_cluster: Any, setting: str, code: str
) -> None:
    with pytest.raises(ConfigError, match=code):
        balls.train("greedy", setting)
    assert not balls.store.exists("runs/greedy/run.json")


def test_nodes_that_went_while_a_run_trains_are_told(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("lungseg.train.ready._LOOK_SECONDS", 0.01)
    monkeypatch.setattr(log("train").parent, "propagate", True)
    cores = int(ray_cluster.cluster_resources()["CPU"])
    for workers in (cores, cores + 1):  # of one core each
        config = load_recipe(None, [f"train.workers={workers}", f"train.global_batch={workers}"]).train
        with missing_nodes_told(config, {"CPU": 1}):
            time.sleep(0.2)
        assert ("waiting for" in caplog.text) == (workers > cores)
    assert f"waiting for {cores + 1} workers, {cores} are there, 0 s" in caplog.messages


def test_the_controller_asks_its_workers_more_often_than_ray_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name that Ray reads, and hands on from the driver to the controller."""
    from ray.train.v2._internal import constants

    name = constants.HEALTH_CHECK_INTERVAL_S_ENV_VAR
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    _trainer_class()
    assert 0 < float(os.environ[name]) < constants.DEFAULT_HEALTH_CHECK_INTERVAL_S
    assert name in constants.ENV_VARS_TO_PROPAGATE
