"""What rank 0 leaves in the store: metrics, log, events for TensorBoard, checkpoints and the best of them.

All of it is written beside the training, by one thread: a step waits at most for the copy of the weights.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from lungseg.config import Recipe
from lungseg.errors import LungsegError, RunError, StorageError
from lungseg.runs.checkpoint import Checkpoint, Checkpoints
from lungseg.runs.export import export_model
from lungseg.runs.lease import Lease
from lungseg.runs.progress import Heart
from lungseg.runs.state import TrainState
from lungseg.show import val_dice_text
from lungseg.storage import keys
from lungseg.telemetry import VAL_DICE, log
from lungseg.train.job import LEFT
from lungseg.train.writer import Writer

Arrays = Mapping[str, np.ndarray]
_log = log("train")


class Recorder:
    """Use it in a `with` block, which ends when all is written.

    Every method returns at once, unless two epochs wait to be written already, and raises what writing an
    earlier one raised; among that is RunError("run-taken-over", "loss-not-finite").
    """

    def __init__(self, checkpoints: Checkpoints, lease: Lease, recipe: Recipe) -> None:
        self._checkpoints, self._store, self._root = checkpoints, checkpoints.store, checkpoints.root
        self._lease, self._recipe = lease, recipe
        self._writer = Writer()
        self._heart = Heart(self._store, self._root, lease.number, self._put_log)
        self.tell = self._heart.tell
        self._lines = _Lines()
        self._earlier_lines: bytes | None = None
        self._log_lock = threading.Lock()

    def __enter__(self) -> Self:
        logging.getLogger("lungseg").addHandler(self._lines)
        self._folder = tempfile.TemporaryDirectory(prefix="lungseg-events-")
        # Ends in the number of the claim: two starts within a second must not share a name.
        self._events = EventsWriter(f"{self._folder.name}/events", f".{self._lease.number}")
        self._writer.__enter__()
        self._heart.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._writer.__exit__(kind, error, trace)
        except Exception as failure:
            error = failure
            raise
        finally:
            left = getattr(error, "code", "") == LEFT
            self._heart.end("stopped" if left else "failed" if error else "ended", str(error or ""))
            if error and not isinstance(error, StorageError):
                if not left:
                    _log.error("ended by %s", error)
                with suppress(LungsegError):
                    self._put_log()
            logging.getLogger("lungseg").removeHandler(self._lines)
            self._events.close()
            self._folder.cleanup()

    def resumed(self, found: Checkpoint) -> None:
        """Whoever was killed between committing its best checkpoint and publishing it left that undone."""
        self._writer.submit(partial(self._publish, found.name, found.state, found.weights))

    def epoch(self, state: TrainState, weights: Arrays, optimizer: Arrays) -> None:
        """Metrics of the epoch that ended, and its checkpoint if one is due or it is the best."""
        self._writer.submit(partial(self._epoch, state, weights, optimizer))

    def leave(self, state: TrainState, weights: Arrays, optimizer: Arrays) -> None:
        """Commit a checkpoint, wherever the run stands, and wait until it is there."""
        self._writer.submit(partial(self._commit, state, weights, optimizer))
        self.wait()

    def wait(self) -> None:
        """Until all is written."""
        self._writer.wait()

    def _epoch(self, state: TrainState, weights: Arrays, optimizer: Arrays) -> None:
        self._lease.check()
        self._require_finite(state, weights)
        if state.val_dice is not None:
            VAL_DICE.set(state.val_dice)
        self._append_metrics(state)
        published = self._due(state) and self._commit(state, weights, optimizer)
        _log.info(
            "epoch %d: loss %.4f, %s%s, %.0f s, %.1f of them waiting for data",
            state.epoch, state.metrics["loss"],
            val_dice_text(state.val_dice), " (published)" if published else "",
            state.metrics["train_seconds"], state.metrics["data_wait_seconds"],
        )  # fmt: skip
        self._put_events(state)
        self._put_log()

    def _commit(self, state: TrainState, weights: Arrays, optimizer: Arrays) -> bool:
        """A checkpoint, which is published if it should be, then retention; whether it was published."""
        self._lease.check()
        self._require_finite(state, weights)
        name = self._checkpoints.commit(state, weights, optimizer)
        published = self._publish(name, state, weights)
        self._checkpoints.retain(state.attempt, self._recipe.checkpoint)
        return published

    def _due(self, state: TrainState) -> bool:
        config, every = self._recipe.train, self._recipe.checkpoint.every_epochs
        return (
            state.ended(config)
            or state.epoch % every == 0
            or (config.publish == "best" and self._beats(state))
        )

    def _publish(self, name: str, state: TrainState, weights: Arrays) -> bool:
        """Make a committed checkpoint the run's published one if it is the best of it, or the last epoch
        where that is wanted; whether it is."""
        whole_epoch = state.epoch > 0 and not state.losses
        publish = whole_epoch if self._recipe.train.publish == "last" else self._beats(state)
        if publish:
            model_keras = export_model(weights, self._recipe.model)
            self._lease.check()
            self._checkpoints.publish_best(name, state, model_keras)
        return publish

    def _beats(self, state: TrainState) -> bool:
        """Over all attempts of the run's name on this data set."""
        best = self._checkpoints.best()
        return best.beaten_by(state) if best else state.val_dice is not None

    def _require_finite(self, state: TrainState, weights: Arrays) -> None:
        """A resume from weights that are not would be stuck for ever."""
        if not all(np.isfinite(array).all() for array in weights.values()):
            raise diverged(self._root, state.epoch, state.step)

    def _append_metrics(self, state: TrainState) -> None:
        """One line an epoch; lines that a resumed run trains again are replaced."""
        key = keys.metrics(self._root)
        old = self._store.get(key).decode().splitlines() if self._store.exists(key) else []
        lines = [json.loads(line) for line in old]
        kept = [ln for ln in lines if ln["attempt"] != state.attempt or ln["epoch"] < state.epoch]
        kept.append({"attempt": state.attempt, "step": state.step, **state.metrics, "epoch": state.epoch})
        self._store.put(key, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def _put_events(self, state: TrainState) -> None:
        for name, value in state.metrics.items():
            event = Event(step=state.step, wall_time=time.time(), summary=summary.scalar(name, value))
            self._events.write_event(event)
        self._events.flush()
        for file in Path(self._folder.name).iterdir():
            key = keys.events(self._root, state.attempt, file.name)
            self._store.put(key, file.read_bytes())

    def _put_log(self) -> None:
        """Of the writer and the heart one at a time: what the one has put is not what was there before."""
        with self._log_lock:
            self._lease.check()
            key = keys.log(self._root)
            if self._earlier_lines is None:
                self._earlier_lines = self._store.get(key) if self._store.exists(key) else b""
            self._store.put(key, self._earlier_lines + self._lines.text.encode())


class _Lines(logging.Handler):
    """Our log lines, for people who read them from the store."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += self.format(record) + "\n"


def diverged(root: str, epoch: int, step: int) -> RunError:
    remedy = "lower optimizer.learning_rate or optimizer.clip_norm, then --resume"
    return RunError("loss-not-finite", run=root, epoch=epoch, step=step, remedy=remedy)
