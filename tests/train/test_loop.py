"""One worker's run in this process, without Ray: where it ends, and how it goes on."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from helpers.balls import write_balls
from helpers.faults import fault_proxy
from helpers.servers import S3Server

from lungseg.config import load_recipe
from lungseg.errors import RunError
from lungseg.runs.checkpoint import Checkpoint, Checkpoints
from lungseg.runs.export import load_best
from lungseg.storage import FolderStore, open_store
from lungseg.train.job import Job, Session
from lungseg.train.loop import run_worker

ROOT = "runs/r"
SETTINGS = (
    "model.width=2",
    "model.depth=2",
    "optimizer.warmup_steps=2",
    "train.epochs=3",
    "train.global_batch=2",
    "train.precision=float32",
)


@pytest.fixture(autouse=True)
def _policy() -> Iterator[None]:
    yield
    keras.mixed_precision.set_dtype_policy("float32")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    store = FolderStore(tmp_path)
    return Job(store, ROOT, "a1", write_balls(store, train=6, val=3), load_recipe(None, SETTINGS))


def with_settings(job: Job, *overrides: str) -> Job:
    return replace(job, recipe=load_recipe(None, [*SETTINGS, *overrides]))


def run(job: Job, report: Any = lambda metrics: None) -> None:
    run_worker(job, Session(rank=0, world_size=1, threads=None, share=lambda value: value, report=report))


def lines(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.store.get(f"{ROOT}/metrics.jsonl").decode().splitlines()]


def newest(job: Job) -> Checkpoint:
    found = Checkpoints(job.store, ROOT).newest("a1")
    assert found is not None
    return found


def assert_equal_bits(one: Checkpoint, other: Checkpoint) -> None:
    for a, b in ((one.weights, other.weights), (one.optimizer, other.optimizer)):
        assert {path: array.tobytes() for path, array in a.items()} == {
            path: array.tobytes() for path, array in b.items()
        }


class Killed(BaseException):
    """As a SIGKILL: nothing in the loop may catch it."""


@pytest.mark.slow
def test_a_run_killed_after_an_epoch_goes_on_to_the_very_same_weights(job: Job, tmp_path: Path) -> None:
    reported: list[dict[str, float]] = []
    run(job, reported.append)
    whole = newest(job)
    assert [line["epoch"] for line in lines(job)] == [line["epoch"] for line in reported] == [1, 2, 3]
    assert [line["step"] for line in lines(job)] == [3, 6, 9]
    assert all(math.isfinite(line["loss"]) and 0 <= line["val_dice"] <= 1 for line in lines(job))

    def die(metrics: dict[str, float]) -> None:
        if metrics["epoch"] == 2:
            raise Killed

    again = replace(job, store=FolderStore(tmp_path / "again"))
    write_balls(again.store, train=6, val=3)
    with pytest.raises(Killed):
        run(again, die)
    assert newest(again).state.epoch == 2
    run(again)
    assert newest(again).state.epoch == 3
    assert_equal_bits(newest(again), whole)
    assert [line["epoch"] for line in lines(again)] == [1, 2, 3]
    assert [line["loss"] for line in lines(again)] == [line["loss"] for line in lines(job)]
    assert [0 < line["graph_seconds"] <= line["train_seconds"] for line in lines(again)] == [
        True,
        False,
        True,
    ]
    said_again: list[dict[str, float]] = []
    run(again, said_again.append)
    assert said_again == [newest(again).state.metrics]


@pytest.mark.slow
def test_an_object_store_that_is_away_for_30_s_stops_nothing(
    job: Job, s3_uri: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the end of the first epoch on, when patches to validate and the look before its commit are due."""
    run(job)
    with fault_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        far = replace(job, store=open_store(s3_uri))
        write_balls(far.store, train=6, val=3)

        def cut_off(metrics: dict[str, float]) -> None:
            if metrics["epoch"] == 1:
                proxy.always.update(dict.fromkeys(("GET", "HEAD", "PUT", "DELETE"), "reset"))
                threading.Timer(30, proxy.always.clear).start()

        began = time.monotonic()
        run(far, cut_off)
        assert time.monotonic() - began > 30
        assert {"GET", "HEAD"} <= {seen.method for seen in proxy.seen if seen.fault}
        assert_equal_bits(newest(far), newest(job))
        assert [line["loss"] for line in lines(far)] == [line["loss"] for line in lines(job)]


def test_a_run_killed_before_it_published_its_best_publishes_when_it_goes_on(job: Job) -> None:
    class Dying(FolderStore):
        def put(self, key: str, data: bytes | Path) -> None:
            if key.endswith("model.keras"):
                raise Killed
            super().put(key, data)

    last = with_settings(job, "train.epochs=1")
    with pytest.raises(Killed):
        run(replace(last, store=Dying(job.store.root)))
    checkpoints = Checkpoints(job.store, ROOT)
    assert checkpoints.best() is None
    run(last)
    pointer = checkpoints.best()
    assert pointer is not None
    assert pointer.checkpoint == newest(last).name
    assert len(checkpoints.committed("a1")) == 1


@pytest.mark.slow
def test_more_epochs_raise_the_learning_rate_again_and_the_log_says_so(job: Job) -> None:
    """Three steps an epoch; the peak is 1e-3 and the warm-up half of the shorter schedule."""
    peak = "optimizer.learning_rate=1e-3"
    run(with_settings(job, peak, "train.epochs=1"))
    run(with_settings(job, peak, "train.epochs=2"))
    run(with_settings(job, peak, "train.epochs=3", "optimizer.schedule=constant"))
    run(with_settings(job, peak, "train.epochs=4", "optimizer.schedule=constant"))
    log = job.store.get(f"{ROOT}/log.txt").decode().splitlines()
    last, now = (0.5e-3 * (1 + math.cos(math.pi * done)) for done in (0.5 / 1.5, 1 / 4))
    told = [line.partition("the learning rate ")[2] for line in log if "the learning rate" in line]
    assert told[0] == (
        f"goes from {last:.3g} to {now:.3g} at step 3: its schedule ended with epoch 1, and now ends with 2"
    )
    assert [" at step 6: " in line for line in told[1:]] == [
        True
    ]  # another schedule; then the same for longer


def test_a_run_ends_after_patience_epochs_without_a_gain(job: Job) -> None:
    run(with_settings(job, "train.epochs=50", "train.patience_epochs=2", "optimizer.learning_rate=1e-20"))
    assert [line["epoch"] for line in lines(job)] == [1, 2, 3]  # the first gains, two do not
    assert newest(job).state.epochs_without_gain == 2
    pointer = Checkpoints(job.store, ROOT).best()
    assert pointer is not None
    assert pointer.epoch == 1


@pytest.mark.parametrize("validated", [True, False])
def test_the_last_epoch_is_published_where_it_is_wanted(job: Job, validated: bool) -> None:
    """No val Dice gains at such a rate; without validation that is no reason to end early."""
    settings = ("train.publish=last", "optimizer.learning_rate=1e-20", "train.patience_epochs=1")
    last = with_settings(job, *settings)
    if not validated:
        last = replace(last, manifest=replace(job.manifest, shards={**job.manifest.shards, "val": ()}))
    run(last)
    assert [line["epoch"] for line in lines(last)] == ([1, 2] if validated else [1, 2, 3])
    assert all(("val_dice" in line) == validated for line in lines(last))
    pointer = Checkpoints(last.store, ROOT).best()
    assert pointer is not None
    assert pointer.checkpoint == newest(last).name
    assert (pointer.val_dice is not None) == validated


def test_a_run_out_of_minutes_ends_after_its_epoch_with_that_committed(job: Job) -> None:
    run(with_settings(job, "train.epochs=50", "train.max_minutes=0.0001", "checkpoint.every_epochs=50"))
    assert [line["epoch"] for line in lines(job)] == [1]
    assert newest(job).state.epoch == 1
    assert newest(job).state.seconds > 0.006


@pytest.mark.parametrize("steps", [1, 3], ids=["by its last update", "within an epoch"])
def test_a_diverged_run_says_so_and_commits_no_broken_weights(job: Job, steps: int) -> None:
    """After a single step the loss is still finite, and only the weights show it."""
    wild = with_settings(
        job,
        "optimizer.name=sgd",
        "optimizer.learning_rate=1e38",
        "optimizer.weight_decay=1e10",
        "optimizer.schedule=constant",
        f"train.steps_per_epoch={steps}",
    )
    with pytest.raises(RunError, match="loss-not-finite") as caught:
        run(wild)
    assert caught.value.where["epoch"] == 1
    assert Checkpoints(job.store, ROOT).committed("a1") == []


def test_the_best_network_is_rebuilt_from_the_run_as_it_was(job: Job) -> None:
    from lungseg.model.unet import build_unet
    from lungseg.runs.run import open_run

    opened = open_run(job.store, "r", job.manifest, job.recipe, "fresh")
    run(replace(job, attempt=opened.attempt))
    best = load_best(job.store, "r")
    saved = Checkpoints(job.store, ROOT).read_best()
    network = build_unet(job.recipe.model)
    for variable in network.weights:
        variable.assign(saved.weights[variable.path])
    hu = np.random.default_rng(0).uniform(-1000, 400, (1, 16, 16, 16, 1)).astype(np.float32)
    expected = 1 / (1 + np.exp(-network(hu).numpy().astype(np.float64)))
    np.testing.assert_allclose(best.predict(hu), expected, atol=1e-6)
    assert (best.checkpoint, best.recipe.model) == (saved.name, job.recipe.model)
