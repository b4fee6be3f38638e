"""Ctrl-C at a terminal where a sweep trains several trials at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from helpers.balls import write_balls
from helpers.train_watch import train_workers

from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.run import load_run
from lungseg.storage import Store, open_store

TRIALS = ("0000", "0001")
SETTINGS = (
    "model.depth=2", "model.width=2", "train.global_batch=2", "train.precision=float32", "train.epochs=1",
    "train.steps_per_epoch=5000", "train.log_every_steps=5", "train.cpus_per_worker=1", "tune.pruner=none",
    "tune.space.optimizer.learning_rate={log: [0.03, 0.1]}", "tune.concurrent_trials=2",
)  # fmt: skip


@contextmanager
def sweep(store: Store, log: Path, begin: int, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """`lungseg tune` with a Ray of its own, once each trial has told of a step of its `begin`-th begin."""
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    command = [sys.executable, "-m", "lungseg.cli", "tune", "--store", store.uri, "--data", "balls"]
    command += ["--run", "sweep", "--trials", "2", *words, *more]
    # Two cores, however many this machine has.
    environment = {**os.environ, "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment)
    try:
        deadline = time.monotonic() + 240
        while not all(b": loss " in told(store, trial, begin) for trial in TRIALS):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def standing_still(workers: set[int]) -> Iterator[None]:
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:  # which cannot see that their command has gone; Ray may have ended one
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def told(store: Store, trial: str, begin: int) -> bytes:
    """What a trial's log says from its `begin`-th begin on."""
    key = f"runs/sweep/trials/{trial}/log.txt"
    *_, last = (store.get(key) if store.exists(key) else b"").split(b"from epoch 0, ", begin)[begin:] or [b""]
    return last


def committed(store: Store, trial: str) -> int:
    newest = Checkpoints(store, f"runs/sweep/trials/{trial}").newest(load_run(store, "sweep").attempt)
    return newest.state.step if newest else 0


@pytest.mark.slow
def test_one_ctrl_c_commits_all_trials_under_way_and_a_second_one_waits_for_none(tmp_path: Path) -> None:
    store, log = open_store(tmp_path / "store"), tmp_path / "log"
    write_balls(store, train=6, val=3)
    with sweep(store, log, 1) as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 130, log.read_text()
    assert "trials under way: 2" in log.read_text().splitlines()[-1]
    steps = [committed(store, trial) for trial in TRIALS]
    assert all(0 < step < 5000 for step in steps)
    with sweep(store, log, 2, "--resume") as process:
        for trial, step in zip(TRIALS, steps, strict=True):
            assert told(store, trial, 2).startswith(f"step {step}\n".encode())
        with standing_still(train_workers(process.pid)):  # the first Ctrl-C would wait for ever
            process.send_signal(signal.SIGINT)
            while "a second time ends at once" not in log.read_text():
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130, log.read_text()
    assert [committed(store, trial) for trial in TRIALS] == steps
