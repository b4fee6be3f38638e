"""What only a machine with GPUs can show: `uv run --extra gpu pytest -n0 -s tests/gpu`.

Each part runs through Ray and the real loop, on a network of a few weights. For times beside PyTorch's on the
same card: `tests/benchmarks/step.py`, whose contestants take a GPU that they see.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.balls import write_balls
from helpers.train_watch import manifests, train_workers

from lungseg.config import load_recipe
from lungseg.runs.checkpoint import Checkpoint, Checkpoints
from lungseg.runs.run import load_run
from lungseg.storage import Store, open_store

GPUS = len(list(Path("/dev").glob("nvidia[0-9]*")))
needs = [
    pytest.mark.skipif(count > GPUS, reason=f"{GPUS} NVIDIA GPUs here: run it on a machine with {count}")
    for count in (0, 1, 2)
]
pytestmark = pytest.mark.slow
SETTINGS = (
    "model.width=8", "model.depth=2", "loss.reduction=sample", "optimizer.name=sgd", "optimizer.momentum=0.9",
    "optimizer.learning_rate=0.1", "optimizer.warmup_steps=2", "train.epochs=4", "train.global_batch=4",
    "train.precision=float32", "train.gpus_per_worker=1",
)  # fmt: skip


class Runs:
    """A store with the data set "balls", and runs on it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        write_balls(store)

    def train(self, run: str, *settings: str) -> Checkpoint:
        from lungseg.train.launch import train

        train(self.store, "balls", run, load_recipe(None, [*SETTINGS, *settings]))
        found = Checkpoints(self.store, f"runs/{run}").newest(load_run(self.store, run).attempt)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Any) -> Runs:
    return Runs(open_store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def one(runs: Runs) -> Checkpoint:
    """The end of a run on one GPU."""
    return runs.train("one")


def assert_alike(found: Checkpoint, expected: Checkpoint, tolerance: float) -> None:
    assert found.state.step == expected.state.step
    for path, weights in expected.weights.items():
        np.testing.assert_allclose(found.weights[path], weights, rtol=0, atol=tolerance, err_msg=path)


@needs[1]
@pytest.mark.parametrize(
    ("name", "settings", "tolerance"),
    [
        ("cpu", ("train.gpus_per_worker=0",), 1e-3),
        ("no-xla", ("train.xla=never",), 1e-3),
        ("bfloat16", ("train.precision=mixed_bfloat16",), 0.3),
        ("float16", ("train.precision=mixed_float16",), 0.3),
        ("auto", ("train.precision=auto",), 0.3),
    ],
)
def test_precision_and_compilation_change_no_more_than_roundings(
    runs: Runs, one: Checkpoint, name: str, settings: tuple[str, ...], tolerance: float
) -> None:
    found = runs.train(name, *settings)
    assert_alike(found, one, tolerance)
    assert found.state.metrics["val_dice"] == pytest.approx(one.state.metrics["val_dice"], abs=0.1)


@needs[1]
def test_memory_grows_and_is_not_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # before this process looks for devices
    import tensorflow as tf

    from lungseg.train.strategy import make_strategy

    make_strategy(load_recipe(None, SETTINGS), 1, None)
    (gpu,) = tf.config.list_physical_devices("GPU")
    assert tf.config.experimental.get_memory_growth(gpu)
    tf.zeros([1]).numpy()
    assert tf.config.experimental.get_memory_info("GPU:0")["current"] < 1 << 30


@needs[2]
@pytest.mark.parametrize(
    ("name", "settings"),
    [("mirrored", ("train.gpus_per_worker=2",)), ("nccl", ("train.workers=2",))],
)
def test_final_weights_do_not_depend_on_the_number_of_gpus(
    runs: Runs, one: Checkpoint, name: str, settings: tuple[str, ...]
) -> None:
    assert_alike(runs.train(name, *settings), one, 1e-3)


@needs[2]
def test_two_workers_of_which_one_is_killed_end_as_if_nothing_had_been(runs: Runs, one: Checkpoint) -> None:
    run, killed = "killed", []

    def kill() -> None:
        while not manifests(runs, run):
            time.sleep(0.02)
        killed.append(min(train_workers()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = runs.train(run, "train.workers=2", "train.max_failures=2")
    killer.join()
    assert killed
    assert_alike(found, one, 1e-3)
