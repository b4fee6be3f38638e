"""What became of a run, as far as the store knows: it needs no cluster, and outlives one."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.progress import Progress
from lungseg.runs.run import load_run
from lungseg.show import duration, val_dice_text
from lungseg.storage import Store, keys

LOST_SECONDS = 120.0
"""Without a word for so long, a run has died: the store may be away for as long, and clocks differ."""


@dataclass(frozen=True)
class Status:
    """`state` is Progress.doing, or "lost" where the last word is old, "begun" where there is none yet.
    `committed_step` is that of the newest checkpoint, from which `--resume` goes on; `starts` counts the
    starts of its workers."""

    run: str
    kind: str
    data: str
    state: str
    progress: Progress | None
    committed_step: int | None
    starts: int
    best_epoch: int | None
    best_val_dice: float | None
    silent_seconds: float | None

    def lines(self) -> list[str]:
        """For people."""
        now, told = self.progress, [f"{self.run} ({self.kind} on {self.data}): {self.state}"]
        if now and now.steps:
            pace = f", {now.seconds_per_step:.2f} s a step" if now.seconds_per_step else ""
            loss = f", loss {now.loss:.4f}" if now.loss is not None else ""
            told += [f"epoch {now.epoch} of {now.epochs}, step {now.step}/{now.steps}{loss}{pace}"]
        if now and self.state == "training" and now.left_seconds is not None:
            told[-1] += f", about {duration(now.left_seconds)} left"
        if self.best_epoch is not None:
            told += [f"best: {val_dice_text(self.best_val_dice)} after epoch {self.best_epoch}"]
        if self.committed_step is not None:
            told += [f"committed: step {self.committed_step}"]
        if self.state == "lost" and self.silent_seconds is not None:
            told += [f"no word for {duration(self.silent_seconds)}: the same command with --resume goes on"]
        if self.starts > 1:
            told += [f"workers were started {self.starts} times"]
        if now and now.error and self.state == "failed":
            told += [now.error]
        return [told[0], *(f"  {line}" for line in told[1:])]


def status_of(store: Store, name: str, now: float | None = None) -> Status:
    """Raises RunError("run-missing")."""
    run, root = load_run(store, name), keys.run_root(name)
    checkpoints, progress = Checkpoints(store, root), Progress.read(store, root)
    committed, best = checkpoints.committed(run.attempt), checkpoints.best()
    silent = None if progress is None else max(0.0, (now or time.time()) - progress.told)
    return Status(
        run=name,
        kind=run.kind,
        data=run.data,
        state=_state(progress, silent or 0.0),
        progress=progress,
        committed_step=checkpoints.state(committed[0].name).step if committed else None,
        starts=sum(1 for _ in store.find(keys.claims(root))),
        best_epoch=best.epoch if best else None,
        best_val_dice=best.val_dice if best else None,
        silent_seconds=silent,
    )


def _state(progress: Progress | None, silent_seconds: float) -> str:
    if progress is None:
        return "begun"
    over = progress.doing in ("ended", "stopped", "failed")
    return progress.doing if over or silent_seconds < LOST_SECONDS else "lost"


def outcome(store: Store, name: str) -> int | None:
    """The exit code of a run whose job nobody remembers; None as long as it may go on."""
    found = status_of(store, name)
    return {"ended": 0, "stopped": 130, "failed": 2, "lost": 1}.get(found.state)


def stored_log(store: Store, name: str) -> str:
    """What the workers of a run have logged. Raises RunError("run-missing")."""
    key = keys.log(keys.run_root(load_run(store, name).name))
    return store.get(key).decode() if store.exists(key) else ""
