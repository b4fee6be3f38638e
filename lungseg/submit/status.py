"""What became of a run: by the store, which outlives any cluster, and by Ray where that answers."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass

from lungseg.errors import RunError
from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.progress import BEAT_SECONDS, Progress
from lungseg.runs.run import load_run, run_exists
from lungseg.show import duration, val_dice_text
from lungseg.storage import Store, keys
from lungseg.submit.jobs import LOST, Job, Waiting

LOST_SECONDS = 120.0
"""Without a word for so long, a run has died: the store may be away for as long, and clocks differ."""


@dataclass(frozen=True)
class Status:
    """`state` is Progress.doing; "begun" where no worker has had a word yet, "lost" where the last is old, or
    its job has died since; "waiting" where a job `waits` for resources. `job` is the newest one of this run.
    `committed_step` is that of the newest checkpoint, from which `--resume` goes on; `starts` counts the
    starts of its workers, of a sweep those of its driver; `trials` a sweep's trials by their state."""

    run: str
    kind: str
    data: str
    state: str
    progress: Progress | None
    committed_step: int | None
    starts: int
    trials: dict[str, int]
    best_epoch: int | None
    best_val_dice: float | None
    silent_seconds: float | None
    job: Job | None = None
    waits: Waiting | None = None
    asked: float = 0.0

    def lines(self) -> list[str]:
        """For people."""
        on = f" on {self.data}" if self.data else ""
        now, told = self.progress, [f"{self.run} ({self.kind}{on}): {self.state}"]
        told += self._of_job()
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
        if self.trials:
            told += ["trials: " + ", ".join(f"{count} {state}" for state, count in self.trials.items())]
        if self.starts > 1:
            told += [f"{'workers were' if self.kind == 'train' else 'it was'} started {self.starts} times"]
        if now and now.error and self.state == "failed":
            told += [now.error]
        elif self.job and self.state == "failed":
            told += [self.job.message.strip().rpartition("\n")[2]]
        return [told[0], *(f"  {line}" for line in told[1:])]

    def _of_job(self) -> list[str]:
        if self.job is None:
            return []
        for_long = duration(self.asked - (self.job.ended or self.job.began))
        told = f"job {self.job.id}: {self.job.state} for {for_long}"
        if self.waits:
            told += f", waits for {self.waits.wanted} since {duration(self.asked - self.waits.since)}"
        return [told]


def status_of(
    store: Store, name: str, job: Job | None = None, waits: Waiting | None = None, now: float | None = None
) -> Status:
    """Raises RunError("run-missing") where there is no `job` of that name either."""
    now, root = now or time.time(), keys.run_root(name)
    if job and not run_exists(store, name):
        state = _state(None, 0.0, job, waits)
        return Status(name, job.verb, "", state, None, None, 0, {}, None, None, None, job, waits, now)
    run = load_run(store, name)
    checkpoints, progress = Checkpoints(store, root), Progress.read(store, root)
    committed, best = checkpoints.committed(run.attempt) if run.kind == "train" else [], checkpoints.best()
    silent = None if progress is None else max(0.0, now - progress.told)
    return Status(
        run=name,
        kind=run.kind,
        data=run.data,
        state=_state(progress, silent or 0.0, job, waits),
        progress=progress,
        committed_step=checkpoints.state(committed[0].name).step if committed else None,
        starts=sum(1 for _ in store.find(keys.claims(root))),
        trials=_trials(store, root),
        best_epoch=best.epoch if best else None,
        best_val_dice=best.val_dice if best else None,
        silent_seconds=silent,
        job=job,
        waits=waits,
        asked=now,
    )


def _trials(store: Store, root: str) -> dict[str, int]:
    lines = store.get(keys.trials(root)).splitlines() if store.exists(keys.trials(root)) else []
    return dict(Counter(json.loads(line)["state"] for line in lines))


def _state(progress: Progress | None, silent_seconds: float, job: Job | None, waits: Waiting | None) -> str:
    by_store: str = progress.doing if progress else "begun"
    over = by_store in ("ended", "stopped", "failed")
    if not over and silent_seconds >= LOST_SECONDS:
        by_store = "lost"
    told = progress.told if progress else 0.0
    if job is None or (over and told > job.began):
        return by_store
    if not job.over:
        begins = told < job.began or by_store == "lost"
        return "waiting" if waits else "starting" if begins else by_store
    if told > (job.ended or job.began) + BEAT_SECONDS:
        return by_store  # others have gone on with the run since
    if job.died:
        return "lost"
    return {"SUCCEEDED": "ended", "STOPPED": "stopped"}.get(job.state, "failed")


def outcome(store: Store, name: str) -> int | None:
    """The exit code of a run whose job nobody remembers; None as long as it may go on."""
    found = status_of(store, name)
    return {"ended": 0, "stopped": 130, "failed": 2, "lost": LOST}.get(found.state)


def stored_log(store: Store, name: str) -> str:
    """What the workers of a run have logged. Raises RunError("run-missing")."""
    key = keys.log(keys.run_root(load_run(store, name).name))
    return store.get(key).decode() if store.exists(key) else ""


def check_committed(before: Status, after: Status) -> None:
    """Raises RunError("stopped-uncommitted") for a run that trained and was ended without a last word."""
    trained = before.state in ("training", "validating")
    word = after.progress.doing if after.progress else ""
    if trained and word not in ("ended", "stopped", "failed"):
        remedy = "give the cluster's head RAY_JOB_STOP_SIGNAL=SIGINT and a longer RAY_JOB_STOP_WAIT_TIME_S"
        message = "the job was ended before it had committed the step it was at"
        raise RunError("stopped-uncommitted", message=message, run=after.run, remedy=remedy)
