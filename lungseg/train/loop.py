"""One worker's run: epochs of steps, validation, checkpoints, and the decision to go on.

Every rank runs this same function; rank 0 alone writes. It knows no Ray: what it needs of its peers is in
`Session`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from lungseg.config import Recipe
from lungseg.data.order import steps_per_pass
from lungseg.data.shards import Manifest
from lungseg.data.stream import PatchStream
from lungseg.errors import RunError
from lungseg.storage import Store
from lungseg.telemetry import VAL_DICE, count_step, log, show_step
from lungseg.train.checkpoint import Checkpoints, TrainState
from lungseg.train.export import export_model
from lungseg.train.step import Stepper, ValSums
from lungseg.train.strategy import make_strategy, set_precision

_log = log("train")


@dataclass(frozen=True)
class Session:
    """This worker among its peers. `share` gives every rank what rank 0 passed in; `report` tells the
    driver of an epoch and is a barrier."""

    rank: int
    world_size: int
    threads: int | None
    share: Callable[[Any], Any]
    report: Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Job:
    """What to train: `root` is the run's prefix in the store."""

    store: Store
    root: str
    attempt: str
    manifest: Manifest
    recipe: Recipe


def run_worker(job: Job, session: Session) -> None:
    """Train from the newest valid checkpoint, or the start, to the end; then return.

    Raises RunError("loss-not-finite"), and what the store and the stream raise.
    """
    recipe = job.recipe
    strategy = make_strategy(recipe.train, session.world_size, session.threads)
    precision = set_precision(recipe.train)
    per_pass = steps_per_pass(job.manifest.rows("train"), recipe.train.global_batch)
    steps = recipe.train.steps_per_epoch or per_pass
    stepper = Stepper(recipe, strategy, steps * recipe.train.epochs)
    checkpoints = Checkpoints(job.store, job.root)
    state = _restore(job, session, checkpoints, stepper)
    if session.rank == 0:
        _log.info(
            "%d workers, %d replicas, %s, %d parameters, %d steps an epoch, from epoch %d",
            session.world_size, strategy.num_replicas_in_sync, precision,
            stepper.model.count_params(), steps, state.epoch,
        )  # fmt: skip
    open_stream = partial(
        PatchStream,
        job.store,
        job.manifest,
        config=recipe.stream,
        global_batch=recipe.train.global_batch,
        rank=session.rank,
        world_size=session.world_size,
    )
    began = time.monotonic() - state.seconds
    with open_stream(split="train", seed=recipe.train.seed, first_step=state.step) as stream:
        batches = iter(stream)
        while not state.ended(recipe.train):
            metrics = _epoch(job, session, stepper, stream, batches, steps, state.epoch)
            with open_stream(split="val", training=False) as val:
                sums = sum((stepper.validate(stepper.place(batch)) for batch in val), ValSums())
            metrics |= {"val_dice": sums.dice, "seconds": time.monotonic() - began}
            # Clocks differ between ranks; all must stop after the same epoch.
            metrics = session.share(metrics)
            state = _advance(state, steps, metrics)
            if session.rank == 0:
                _write(job, checkpoints, stepper, state)
            session.report(metrics)


def _restore(job: Job, session: Session, checkpoints: Checkpoints, stepper: Stepper) -> TrainState:
    """The state to go on from. Rank 0 chooses, so that all ranks restore the same checkpoint."""
    found = checkpoints.newest(job.attempt) if session.rank == 0 else None
    name = session.share(found.name if found else None)
    if name is None:
        recipe = job.recipe.model_dump(mode="json")
        return TrainState(job.attempt, 0, 0, job.manifest.sha256, recipe, -1.0, 0, 0.0)
    found = found or checkpoints.read(name)
    stepper.restore(found.weights, found.optimizer, name)
    if session.rank == 0:
        # Whoever was killed between committing its best checkpoint and publishing it left this undone.
        _publish(job, checkpoints, stepper, found.state, name)
    return replace(found.state, recipe=job.recipe.model_dump(mode="json"))


def _epoch(
    job: Job,
    session: Session,
    stepper: Stepper,
    stream: PatchStream,
    batches: Any,
    steps: int,
    epoch: int,
) -> dict[str, float]:
    """Train `steps` steps; the epoch's means. Fetches the loss only every few steps: each fetch waits for
    the device."""
    every = job.recipe.train.log_every_steps
    losses: list[tf.Tensor] = []
    waited, began = stream.waited_seconds, time.monotonic()
    for number in range(1, steps + 1):
        start = time.monotonic()
        batch = next(batches)
        arrived = time.monotonic()
        measured = stepper.train(stepper.place(batch))
        losses.append(measured.loss)
        if number % every == 0 or number == steps:
            recent = float(losses[-1])
            if not math.isfinite(recent):
                raise _diverged(job, epoch + 1, number)
            show_step(recent, stepper.learning_rate(batch.step), float(measured.gradient_norm))
            if session.rank == 0:
                pace = (time.monotonic() - began) / number
                _log.info(
                    "epoch %d, step %d/%d: loss %.4f, %.2f s a step", epoch + 1, number, steps, recent, pace
                )
        count_step(time.monotonic() - start, arrived - start, len(batch.mask))
    return {
        "epoch": epoch + 1,
        "loss": float(tf.reduce_mean(tf.stack(losses))),
        "train_seconds": time.monotonic() - began,
        "data_wait_seconds": stream.waited_seconds - waited,
    }


def _advance(state: TrainState, steps: int, metrics: dict[str, float]) -> TrainState:
    gained = metrics["val_dice"] > state.best_val_dice
    return replace(
        state,
        step=state.step + steps,
        epoch=state.epoch + 1,
        best_val_dice=max(state.best_val_dice, metrics["val_dice"]),
        epochs_without_gain=0 if gained else state.epochs_without_gain + 1,
        seconds=metrics["seconds"],
        metrics=metrics,
    )


def _write(job: Job, checkpoints: Checkpoints, stepper: Stepper, state: TrainState) -> None:
    """Rank 0 after an epoch: the metrics line, the checkpoint, the best pointer, then retention."""
    val_dice, better = state.metrics["val_dice"], False
    VAL_DICE.set(val_dice)
    weights, optimizer = stepper.weights(), stepper.training_state()
    if not all(np.isfinite(array).all() for array in weights.values()):
        raise _diverged(job, state.epoch, state.step)  # a resume from such weights would be stuck for ever
    _append_metrics(job, state)
    due = state.ended(job.recipe.train) or state.epoch % job.recipe.checkpoint.every_epochs == 0
    if due or _beats(val_dice, checkpoints.best()):
        name = checkpoints.commit(state, weights, optimizer)
        better = _publish(job, checkpoints, stepper, state, name)
        checkpoints.retain(job.attempt, job.recipe.checkpoint)
    _log.info(
        "epoch %d: loss %.4f, val Dice %.4f%s, %.0f s, %.1f of them waiting for data",
        state.epoch, state.metrics["loss"], val_dice, " (best)" if better else "",
        state.metrics["train_seconds"], state.metrics["data_wait_seconds"],
    )  # fmt: skip


def _publish(job: Job, checkpoints: Checkpoints, stepper: Stepper, state: TrainState, name: str) -> bool:
    """Make a committed checkpoint the best of the run if it is, and say whether."""
    better = _beats(state.metrics["val_dice"], checkpoints.best())
    if better:
        checkpoints.publish_best(name, state, export_model(stepper.model, job.recipe.model))
    return better


def _beats(val_dice: float, best: dict[str, Any] | None) -> bool:
    return best is None or val_dice > best["val_dice"]


def _diverged(job: Job, epoch: int, step: int) -> RunError:
    remedy = "lower optimizer.learning_rate or optimizer.clip_norm, then --resume"
    return RunError("loss-not-finite", run=job.root, epoch=epoch, step=step, remedy=remedy)


def _append_metrics(job: Job, state: TrainState) -> None:
    """One line an epoch; lines that a resumed run trains again are replaced."""
    key = f"{job.root}/metrics.jsonl"
    old = job.store.get(key).decode().splitlines() if job.store.exists(key) else []
    lines = [json.loads(line) for line in old]
    kept = [ln for ln in lines if ln["attempt"] != job.attempt or ln["epoch"] < state.epoch]
    kept.append({"attempt": job.attempt, "step": state.step, **state.metrics, "epoch": state.epoch})
    job.store.put(key, "".join(json.dumps(line) + "\n" for line in kept).encode())
