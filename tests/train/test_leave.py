"""One worker that is asked to leave, or whose run somebody else continues: in this process, without Ray."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from helpers.balls import write_balls

from lungseg.config import load_recipe
from lungseg.errors import RunError, StorageError
from lungseg.runs.checkpoint import Checkpoint, Checkpoints
from lungseg.runs.lease import claim
from lungseg.runs.progress import Progress
from lungseg.storage import FolderStore
from lungseg.train.job import LEFT, Job, Session
from lungseg.train.loop import run_worker

ROOT = "runs/r"
SETTINGS = (
    "model.width=2",
    "model.depth=2",
    "model.dropout=0.2",
    "optimizer.warmup_steps=2",
    "train.epochs=2",
    "train.global_batch=2",
    "train.precision=float32",
)
"""Two epochs of three steps. Dropout, since its draws must not depend on where a run was interrupted."""


class Left(Exception):  # noqa: N818 - no error
    """How a worker of these tests leaves."""

    code = LEFT


def leave(step: int) -> NoReturn:
    raise Left


def job_in(folder: Path, *overrides: str, store: type[FolderStore] = FolderStore) -> Job:
    opened = store(folder)
    manifest = write_balls(FolderStore(folder), train=6, val=3)
    return Job(opened, ROOT, "a1", manifest, load_recipe(None, [*SETTINGS, *overrides]))


def run(job: Job, asked: Callable[[], bool] = lambda: False, report: Any = lambda metrics: None) -> None:
    run_worker(job, Session(0, 1, None, lambda value: value, report, asked, leave))


def newest(job: Job) -> Checkpoint:
    found = Checkpoints(job.store, ROOT).newest("a1")
    assert found is not None
    return found


def lines(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.store.get(f"{ROOT}/metrics.jsonl").decode().splitlines()]


def bits(found: Checkpoint) -> dict[str, bytes]:
    parts = {"weights": found.weights, "optimizer": found.optimizer}
    return {f"{part}/{path}": a.tobytes() for part, group in parts.items() for path, a in group.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that nobody disturbed."""
    job = job_in(tmp_path_factory.mktemp("whole"))
    run(job)
    return job


@pytest.mark.slow
def test_a_worker_asked_at_every_step_leaves_each_time_and_ends_as_if_nothing_had_been(
    whole: Job, tmp_path: Path
) -> None:
    job, steps = job_in(tmp_path), []
    for _ in range(6):
        with pytest.raises(Left):
            run(replace(job, driver="the same"), asked=lambda: True)
        found = newest(job)
        steps.append((found.state.step, found.state.epoch, len(found.state.losses)))
        said = Progress.read(job.store, ROOT)
        assert said is not None
        assert (said.doing, 3 * (said.epoch - 1) + said.step) == ("stopped", found.state.step)
    # Leaving after the last step of an epoch, it validates only when it goes on.
    assert steps == [(1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 1, 1), (5, 1, 2), (6, 1, 3)]
    run(replace(job, driver="the same"))
    said = Progress.read(job.store, ROOT)
    assert said is not None
    assert (said.doing, said.epochs, said.steps, said.claim) == ("ended", 2, 3, 7)
    assert bits(newest(job)) == bits(newest(whole))
    for column in ("epoch", "step", "loss", "val_dice", "learning_rate"):
        assert [line[column] for line in lines(job)] == [line[column] for line in lines(whole)]


def test_weights_that_nobody_validated_are_never_the_best(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    with pytest.raises(Left):
        run(job, asked=lambda: True)
    assert newest(job).state.val_dice is None
    assert Checkpoints(job.store, ROOT).best() is None


def test_training_goes_on_while_the_store_takes_its_time_and_ends_with_all_committed(
    whole: Job, tmp_path: Path
) -> None:
    """Both epochs are trained before the first of them is written."""
    go, reported = threading.Event(), []

    class Slow(FolderStore):
        def put(self, key: str, data: bytes | Path) -> None:
            go.wait()
            super().put(key, data)

    def report(metrics: dict[str, float]) -> None:
        reported.append((metrics["epoch"], FolderStore(tmp_path).exists(f"{ROOT}/metrics.jsonl")))
        if len(reported) == 2:
            go.set()

    job = job_in(tmp_path, store=Slow)
    run(job, report=report)
    assert reported == [(1, False), (2, False)]
    assert bits(newest(job)) == bits(newest(whole))
    assert [line["epoch"] for line in lines(job)] == [1, 2]


def test_a_store_that_fails_ends_the_run_an_epoch_later_at_the_latest(tmp_path: Path) -> None:
    class Failing(FolderStore):
        def put(self, key: str, data: bytes | Path) -> None:
            if "checkpoints/" in key:
                raise StorageError("store-unreachable", remedy="")
            super().put(key, data)

    reported: list[float] = []

    def report(metrics: dict[str, float]) -> None:
        reported.append(metrics["epoch"])
        time.sleep(0.3)  # by now the first epoch's commit has failed

    with pytest.raises(StorageError, match="store-unreachable"):
        run(job_in(tmp_path, "train.epochs=50", store=Failing), report=report)
    assert len(reported) == 1


def test_a_run_that_another_command_continues_stops_and_the_other_one_wins(
    whole: Job, tmp_path: Path
) -> None:
    """Both resume; the second begins when the first has trained an epoch."""
    job = job_in(tmp_path)

    def second_begins(metrics: dict[str, float]) -> None:
        if metrics["epoch"] == 1:
            run(replace(job, driver="second"))

    with pytest.raises(RunError, match="run-taken-over"):
        run(replace(job, driver="first"), report=second_begins)
    with pytest.raises(RunError, match="run-taken-over"):
        run(replace(job, driver="first"))  # nor may it take the run back, as when Ray restarts its workers
    assert bits(newest(job)) == bits(newest(whole))
    assert newest(job).state.claim == 2
    assert [line["epoch"] for line in lines(job)] == [1, 2]


def test_of_many_claims_each_gets_a_number_of_its_own_and_the_last_one_holds(s3_uri: str) -> None:
    from lungseg.storage import open_store

    store = open_store(s3_uri)
    leases = []
    threads = [
        threading.Thread(target=lambda n=n: leases.append(claim(store, ROOT, f"driver-{n}")))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lease.number for lease in leases) == [1, 2, 3, 4, 5, 6]
    for lease in leases:
        if lease.number == 6:
            lease.check()
        else:
            with pytest.raises(RunError, match="run-taken-over"):
                lease.check()


def test_a_late_checkpoint_of_a_run_that_was_taken_over_is_not_the_newest(tmp_path: Path) -> None:
    """It was committed between the look at the claims and the write, and has more steps."""
    job = job_in(tmp_path)
    run(job)
    checkpoints, found = Checkpoints(job.store, ROOT), newest(job)
    mine = checkpoints.commit(replace(found.state, claim=2, step=7), found.weights, found.optimizer)
    checkpoints.commit(replace(found.state, claim=1, step=99), found.weights, found.optimizer)
    assert newest(job).name == mine


def test_a_run_may_begin_with_the_weights_of_another(whole: Job, tmp_path: Path) -> None:
    import numpy as np

    job = job_in(tmp_path, "train.epochs=1", "optimizer.learning_rate=1e-20", "optimizer.warmup_steps=0")
    taught = newest(whole)
    source = Checkpoints(job.store, "runs/teacher")
    name = source.commit(taught.state, taught.weights, taught.optimizer)
    run(replace(job, init=f"teacher/{name}"))
    assert newest(job).state.step == 3
    for path, array in taught.weights.items():
        np.testing.assert_allclose(newest(job).weights[path], array, atol=1e-6)


def test_gains_below_min_delta_do_not_postpone_the_end(tmp_path: Path) -> None:
    """No val Dice gains 1 (less a hair): after the first epoch patience runs out."""
    run(job := job_in(tmp_path, "train.epochs=9", "train.patience_epochs=2", "train.min_delta=0.999"))
    assert [line["epoch"] for line in lines(job)] == [1, 2, 3]


def test_log_and_tensorboard_events_are_in_the_store_and_readable_by_tensorboard(
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = job_in(tmp_path)
    asked = iter([False, False, False, False, True])
    with pytest.raises(Left):
        run(job, asked=lambda: next(asked))
    run(job)
    events = EventAccumulator(str(tmp_path / ROOT / "tensorboard" / "a1"))
    events.Reload()
    for name in ("loss", "val_dice", "learning_rate", "seconds"):
        wanted = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines(job)]
        assert [(event.step, event.value) for event in events.Scalars(name)][-1] == wanted[-1]
    found = [*(tmp_path / ROOT / "tensorboard" / "a1").iterdir()]
    assert len(found) == 2  # one a start
    log = job.store.get(f"{ROOT}/log.txt").decode()
    for text in ("from epoch 0, step 0", "epoch 1: loss", "committed step 5", "from epoch 1, step 5"):
        assert text in log
    assert log.index("committed step 5") < log.index("from epoch 1, step 5") < log.index("epoch 2: loss")
