"""One worker's run: epochs of steps, validation, checkpoints, and the decision to go on.

Every rank runs this same function; rank 0 alone writes. It knows no Ray: what it needs of its peers is in
`Session`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import numpy as np
import tensorflow as tf

from lungseg.config import Recipe, TrainConfig
from lungseg.config.stored import store_recipe, stored_recipe
from lungseg.model.precision import set_precision
from lungseg.runs.checkpoint import Checkpoint, Checkpoints
from lungseg.runs.lease import claim
from lungseg.runs.progress import Doing
from lungseg.runs.state import TrainState
from lungseg.show import duration
from lungseg.storage import keys
from lungseg.stream.order import steps_per_pass
from lungseg.stream.patch_stream import Batch, PatchStream
from lungseg.telemetry import count_step, log, log_wait, show_step
from lungseg.train.job import Job, Session
from lungseg.train.notice import heed_sigterm_again
from lungseg.train.optimizer import rate_at
from lungseg.train.record import Recorder, diverged
from lungseg.train.step import OnDevices, Stepper, ValSums
from lungseg.train.strategy import make_strategy

_log = log("train")


@dataclass(frozen=True)
class _Worker:
    """What a worker holds while it trains, which began at the time `began` of a monotonic clock with the
    epoch after `first_epoch`; only rank 0 has a recorder."""

    job: Job
    session: Session
    stepper: Stepper
    recorder: Recorder | None
    steps_per_epoch: int
    began: float
    first_epoch: int

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        return self.stepper.weights(), self.stepper.training_state()


def run_worker(job: Job, session: Session) -> None:
    """Train from the newest valid checkpoint, or the start, to the end; then return.

    Raises RunError("loss-not-finite", "run-taken-over"), and what the store and the stream raise.
    """
    recipe = job.recipe
    strategy = make_strategy(recipe, session.world_size, session.threads)
    heed_sigterm_again()  # at once: till then a notice is TensorFlow's, and lost
    precision = set_precision(recipe.train)
    per_pass = steps_per_pass(job.manifest.rows("train"), recipe.train.global_batch)
    steps = recipe.train.steps_per_epoch or per_pass
    stepper = Stepper(recipe, strategy, steps * recipe.train.epochs)
    checkpoints = Checkpoints(job.store, job.root)
    lease = claim(job.store, job.root, job.driver) if session.rank == 0 else None
    found = _restore(job, session, checkpoints, stepper)
    fresh = TrainState(job.attempt, 0, 0, job.manifest.sha256, {})
    state = replace(
        found.state if found else fresh,
        recipe=store_recipe(recipe),
        data=job.manifest.name,
        claim=session.share(lease.number if lease else None),
    )
    with Recorder(checkpoints, lease, recipe) if lease else nullcontext() as recorder:
        if recorder:
            _log.info(
                "%d workers, %d replicas, %s, %d parameters, %d steps an epoch, from epoch %d, step %d",
                session.world_size, strategy.num_replicas_in_sync, precision,
                stepper.model.count_params(), steps, state.epoch, state.step,
            )  # fmt: skip
            log_wait("building the graph", 15)
        if recorder and found:
            _tell_of_another_schedule(found.state, recipe, per_pass)
            recorder.resumed(found)
        if state.ended(recipe.train):
            session.report(state.metrics)  # whoever waits for it, a sweep, has not heard of the last epoch
        began = time.monotonic() - state.seconds
        _train(_Worker(job, session, stepper, recorder, steps, began, state.epoch), state)


def _restore(job: Job, session: Session, checkpoints: Checkpoints, stepper: Stepper) -> Checkpoint | None:
    """The checkpoint to go on from. Rank 0 chooses, so that all ranks restore the same one."""
    found = checkpoints.newest(job.attempt) if session.rank == 0 else None
    name = session.share(found.name if found else None)
    if name is None:
        if job.init:
            run, _, name = job.init.partition("/")
            initial = Checkpoints(job.store, keys.run_root(run)).read(name, with_optimizer=False)
            stepper.begin_with(initial.weights, job.init)
        return None
    found = found or checkpoints.read(name)
    stepper.restore(found.weights, found.optimizer, name)
    return found


def _tell_of_another_schedule(old: TrainState, recipe: Recipe, per_pass: int) -> None:
    """As in Keras, the schedule is over all steps of the recipe: with more epochs the rate goes up again.
    Where minutes end a run it moves anyway."""
    was = stored_recipe(old.recipe)
    if was.train.max_minutes or recipe.train.max_minutes:
        return
    last, planned = (rate_at(old.step - back, was, per_pass) for back in (1, 0))
    now = rate_at(old.step, recipe, per_pass)
    if not math.isclose(planned, now, rel_tol=1e-3):
        _log.warning(
            "the learning rate goes from %.3g to %.3g at step %d: its schedule ended with epoch %d, and now "
            "ends with %d", last, now, old.step, was.train.epochs, recipe.train.epochs,
        )  # fmt: skip


class _Feed:
    """Batches on the devices, each copied there while the step before it runs: a step on GPUs is only begun
    by the call that trains."""

    def __init__(self, batches: Iterator[Batch], distribute: Callable[[Batch], OnDevices]) -> None:
        self._batches, self._distribute = batches, distribute
        self._ahead: OnDevices | None = None

    def take(self) -> OnDevices:
        taken = self._ahead or self._distribute(next(self._batches))
        self._ahead = None
        return taken

    def fill(self) -> None:
        self._ahead = self._ahead or self._distribute(next(self._batches))


def _train(worker: _Worker, state: TrainState) -> None:
    job, session, config = worker.job, worker.session, worker.job.recipe.train
    open_stream = partial(
        PatchStream,
        job.store,
        job.manifest,
        config=job.recipe.stream,
        global_batch=config.global_batch,
        rank=session.rank,
        world_size=session.world_size,
    )
    with open_stream(split="train", seed=config.seed, first_step=state.step) as stream:
        feed = _Feed(iter(stream), worker.stepper.distribute)
        while not state.ended(config):
            # With minutes for its end, a run learns only on its way how many epochs they hold.
            last = max(state.last_epoch(config), state.epoch + 1)
            worker.stepper.plan(last * worker.steps_per_epoch)
            state = _epoch(worker, stream, feed, state)
            _tell_of_validation(worker, state)
            with open_stream(split="val", training=False) as val:
                distributed = map(worker.stepper.distribute, val)
                sums = sum(map(worker.stepper.validate, distributed), ValSums())
            # Clocks differ between ranks; all must stop after the same epoch.
            state = _advance(config, state, session.share(_metrics(worker, state, sums)))
            if worker.recorder:
                worker.recorder.epoch(state, *worker.arrays())
                if session.settled:
                    worker.recorder.wait()
            session.report(state.metrics)


def _epoch(worker: _Worker, stream: PatchStream, feed: _Feed, state: TrainState) -> TrainState:
    """Train what is left of an epoch. Fetches the loss only every few steps: each fetch waits for the
    device."""
    every, steps = worker.job.recipe.train.log_every_steps, worker.steps_per_epoch
    stepper, patches = worker.stepper, worker.job.recipe.train.global_batch // worker.session.world_size
    losses: list[tf.Tensor] = []
    waited, began = stream.waited_seconds, time.monotonic()

    def so_far() -> TrainState:
        return replace(
            state,
            step=state.step + len(losses),
            losses=state.losses + [float(loss) for loss in losses],
            train_seconds=state.train_seconds + time.monotonic() - began,
            data_wait_seconds=state.data_wait_seconds + stream.waited_seconds - waited,
            seconds=worker.seconds(),
        )

    for number in range(len(state.losses) + 1, steps + 1):
        start, had_waited = time.monotonic(), stream.waited_seconds
        measured = stepper.train(feed.take())
        losses.append(measured.loss)
        feed.fill()
        synced = number % every == 0 or number == steps
        if synced:
            recent = float(losses[-1])
            if not math.isfinite(recent):
                raise diverged(worker.job.root, state.epoch + 1, number)
            rate = stepper.learning_rate(state.step + len(losses) - 1)
            show_step(recent, rate, float(measured.gradient_norm))
            if worker.recorder:
                pace = (time.monotonic() - began) / len(losses)
                left = _left(worker, state, number, pace)
                _tell(worker, state, number, loss=recent, seconds_per_step=pace, left_seconds=left)
                _log.info(
                    "epoch %d, step %d/%d: loss %.4f, %.2f s a step, about %s left",
                    state.epoch + 1, number, steps, recent, pace, duration(left),
                )  # fmt: skip
        count_step(time.monotonic() - start, stream.waited_seconds - had_waited, patches)
        if _asked_to_leave(worker, synced):
            _leave(worker, so_far())
    return so_far()


def _tell(worker: _Worker, state: TrainState, number: int, doing: Doing = "training", **news: float) -> None:
    """Of the epoch after those of the state, the number of the step it is at, for who asks from elsewhere."""
    assert worker.recorder
    last = state.last_epoch(worker.job.recipe.train)
    place = {"epoch": state.epoch + 1, "epochs": last, "step": number, "steps": worker.steps_per_epoch}
    worker.recorder.tell(doing=doing, **place, **news)


def _left(worker: _Worker, state: TrainState, number: int, seconds_per_step: float) -> float:
    """Seconds that the run will still take, validation aside, if it does not stop early."""
    config = worker.job.recipe.train
    epochs = max(state.last_epoch(config) - state.epoch, 1)
    left = (epochs * worker.steps_per_epoch - number) * seconds_per_step
    allowed = math.inf if config.max_minutes is None else config.max_minutes * 60 - worker.seconds()
    return max(0.0, min(left, allowed))


def _tell_of_validation(worker: _Worker, state: TrainState) -> None:
    """As long as the last one; the first as if its patches were trained on."""
    trained = worker.steps_per_epoch * worker.job.recipe.train.global_batch
    first = state.train_seconds * len(worker.job.manifest.rows("val")) / trained
    about = state.metrics.get("val_seconds", first)
    if worker.recorder:
        _tell(worker, state, len(state.losses), doing="validating")
        if about > 5:
            log_wait("validating", about)


def _asked_to_leave(worker: _Worker, synced: bool) -> bool:
    """Whether any rank was. Several ranks ask each other only where they wait for the device anyway, and
    all at the same step."""
    session = worker.session
    if session.world_size == 1 or not synced:
        return session.world_size == 1 and session.asked()
    mine = tf.constant(float(session.asked()))
    return float(_sum_over_ranks(worker.stepper.strategy, mine)) > 0


@tf.function(autograph=False)
def _sum_over_ranks(strategy: tf.distribute.Strategy, value: tf.Tensor) -> tf.Tensor:
    each = strategy.run(tf.identity, (value,))
    return strategy.reduce(tf.distribute.ReduceOp.SUM, each, axis=None)


def _leave(worker: _Worker, state: TrainState) -> NoReturn:
    """Commit where the run stands, within an epoch or not, and end this group of workers."""
    if worker.recorder:
        _tell(worker, state, len(state.losses))
        worker.recorder.leave(state, *worker.arrays())
        _log.info("asked to leave: committed step %d", state.step)
    worker.session.share(None)  # whoever ended before the commit would take rank 0 down
    worker.session.leave(state.step)


def _metrics(worker: _Worker, state: TrainState, sums: ValSums) -> dict[str, float]:
    validated = worker.job.manifest.rows("val")
    dice = {"val_dice": sums.dice(worker.job.recipe.train.val_dice_mode)} if validated else {}
    return {
        "epoch": state.epoch + 1,
        "loss": float(np.mean(state.losses)),
        **dice,
        "learning_rate": worker.stepper.learning_rate(state.step - 1),
        "train_seconds": state.train_seconds,
        "graph_seconds": worker.stepper.graph_seconds if state.epoch == worker.first_epoch else 0.0,
        "data_wait_seconds": state.data_wait_seconds,
        "val_seconds": worker.seconds() - state.seconds,
        "seconds": worker.seconds(),
    }


def _advance(config: TrainConfig, state: TrainState, metrics: dict[str, float]) -> TrainState:
    """The state after an epoch. As in Keras' EarlyStopping, what counts as the best to be beaten moves only
    with a gain of more than `min_delta`. Without validation nothing tells that a run stopped gaining."""
    best, val_dice = state.best_val_dice, metrics.get("val_dice")
    gained = val_dice is None or best is None or val_dice - config.min_delta > best
    return replace(
        state,
        epoch=state.epoch + 1,
        best_val_dice=best if val_dice is None or not gained else val_dice,
        epochs_without_gain=0 if gained else state.epochs_without_gain + 1,
        seconds=metrics["seconds"],
        metrics=metrics,
        losses=[],
        train_seconds=0.0,
        data_wait_seconds=0.0,
    )
