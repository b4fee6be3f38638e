"""Starting a run through Ray Train: one worker a node, restarted as a group when one dies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from logging import DEBUG
from typing import Any

from lungseg.cluster import await_store, connect, warm_up
from lungseg.config import Recipe
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.errors import LungsegError, RunError
from lungseg.exporter import Source, count_restart, pushing, start_exporter
from lungseg.runs.best import Best
from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.fit import check_fit, on_data
from lungseg.runs.run import Mode, load_run, open_run, refuse_taken, run_exists
from lungseg.storage import Store, keys
from lungseg.telemetry import GROUP_METRICS, log, log_wait
from lungseg.train.failure import cause_of, failure_of, last_line, may_pass, node_was_taken
from lungseg.train.job import LEFT, Job
from lungseg.train.ready import missing_nodes_told, ready_workers
from lungseg.train.resources import worker_resources
from lungseg.train.stop import heed_signals, is_marked, unmarked
from lungseg.train.worker import IMPORTS, backend_config, work


def train(store: Store, data: str, run: str, recipe: Recipe, mode: Mode = "fresh") -> Best:
    """Train to the end and return the pointer to the run's published checkpoint.

    Raises DataError("data-missing"), RunError("run-exists", "run-differs"), ConfigError("gpus-missing",
    "too-few-cpus"), and what a worker raised after `train.max_failures` restarts.
    """
    await_store(store.check, recipe.train.wait_minutes)
    manifest = load_manifest(store, data)
    recipe = on_data(recipe, manifest)
    refuse_taken(store, run, mode)
    ended = _ended(store, run, manifest, recipe) if mode == "resume" else None
    if ended:
        return ended
    check_fit(manifest, recipe, "train")  # told before Ray takes its seconds
    warm_up(*IMPORTS)
    # A run that cannot start must not claim the name.
    resources = ready_workers(recipe, source_of(keys.run_root(run)))
    opened, root = open_run(store, run, manifest, recipe, mode), keys.run_root(run)
    connect()
    with unmarked():
        fit(store, root, opened.attempt, manifest, recipe, init=opened.init, resources=resources)
    best = Checkpoints(store, root).best()
    assert best is not None  # every epoch that ends commits one
    return best


def _ended(store: Store, run: str, manifest: Manifest, recipe: Recipe) -> Best | None:
    """The best pointer of a run that has nothing left to do: no reason to start Ray and TensorFlow."""
    if not run_exists(store, run):
        return None
    old, checkpoints = load_run(store, run), Checkpoints(store, keys.run_root(run))
    newest = checkpoints.newest(old.attempt) if old.fits(manifest, recipe, "train") else None
    if newest is None or not newest.state.ended(recipe.train):
        return None
    log("train").info("the run %s has ended after epoch %d: nothing to resume", run, newest.state.epoch)
    return checkpoints.best()


def fit(
    store: Store,
    root: str,
    attempt: str,
    manifest: Manifest,
    recipe: Recipe,
    callbacks: Sequence[Any] = (),
    init: str = "",
    resources: dict[str, int] | None = None,
) -> None:
    """Run the workers below the prefix `root` of the store; also the body of every tuning trial. Each worker
    is given `resources`, by default what the nodes have for it now.

    Where there are `callbacks`, every epoch is committed before they hear of it.
    """
    ray = connect()
    from ray.train import ScalingConfig
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig

    resources = resources or worker_resources(recipe.train, ray.nodes())
    exporter, source = start_exporter(recipe.telemetry), source_of(root)
    with (
        tempfile.TemporaryDirectory(prefix="lungseg-ray-", ignore_cleanup_errors=True) as scratch,
        pushing(exporter, source, GROUP_METRICS, recipe.telemetry.push_seconds),
        missing_nodes_told(recipe.train, resources),
    ):
        trainer = _trainer_class()(
            work,
            train_loop_config={
                "job": Job(store, root, attempt, manifest, recipe, init),
                "threads": resources["CPU"],
                "settled": bool(callbacks),
                "metrics": (exporter, source),
            },
            backend_config=backend_config(),
            scaling_config=ScalingConfig(
                num_workers=recipe.train.workers,
                use_gpu="GPU" in resources,
                resources_per_worker=resources,
                placement_strategy="SPREAD",
            ),
            # Ray's own snapshots are not used: what a run resumes from is our newest valid checkpoint.
            run_config=RunConfig(
                name="train",
                # Ray tells of each failure in pages, twice; what became of it is told by our own lines.
                logging_config=LoggingConfig("INFO" if log("train").isEnabledFor(DEBUG) else "CRITICAL"),
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=-1),  # we count them ourselves
                callbacks=[_watcher(recipe.train.max_failures, exporter, source), *callbacks],
            ),
        )
        try:
            log_wait("starting the workers", 10)
            _run(trainer)
        except Exception as error:
            cause = cause_of(error)
            if cause is error:
                raise
            raise cause from error


def _run(trainer: Any) -> None:
    """Raises RunError("stopped") once what a signal interrupted is committed, KeyboardInterrupt where nothing
    had begun."""
    try:
        trainer.fit()
        if is_marked("stop"):  # too late for the workers, and not for what the command does next
            raise KeyboardInterrupt
    except Exception as error:
        if not is_marked("stop"):
            raise
        ours = LungsegError.find_in(error)
        if ours is None:  # Ray's controller was ended before any worker trained
            raise KeyboardInterrupt from error
        if ours.code != LEFT:
            raise
        remedy = "the same command with --resume goes on from there"
        raise RunError("stopped", message=ours.message, remedy=remedy) from error


def _trainer_class() -> Any:
    """Ray's trainer with our handlers of signals, since its own answers Ctrl-C by ending workers and process
    as if all were well; and without two helpers, each a process that imports pandas for seconds and has no
    work here.

    One hands out data sets of Ray Data. The other frees the placement group of a controller that died, which
    Ray does anyway when its job ends, and tuning for a trial.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    # How often the controller asks its workers, by default every two seconds: it hears so much later that
    # they are done, or dead.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

    idle = DatasetsCallback | PlacementGroupCleanerCallback

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if not isinstance(one, idle)]

        def _register_sigint_handler(self, controller: Any) -> None:
            heed_signals(controller.abort.remote)

    return Trainer


def source_of(root: str) -> Source:
    """The labels of the metrics of "runs/NAME" or "runs/NAME/trials/TRIAL"."""
    return Source(*keys.run_and_trial(root))


def _watcher(max_failures: int, exporter: Any | None, source: Source) -> Any:
    """A callback of Ray Train that tells why workers failed, counts their restarts, and ends the run after
    too many, and for what no restart cures: our own errors, but for a store that may come back and a notice
    to leave. That a node was taken away counts as no failure."""
    from ray.train import UserCallback

    class Watcher(UserCallback):
        failures = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            # Tune has ended a trial that it frees the workers of: they are not to be started again.
            stopped = is_marked("stop") or (source.trial and is_marked("stop", source.trial))
            taken = any(node_was_taken(error) for error in worker_exceptions.values())
            known = {rank: failure_of(rank, error) for rank, error in worker_exceptions.items()}
            for rank, ours in known.items():
                if not ((stopped or taken) and ours and ours.code == LEFT):
                    log("train").warning(
                        "worker %d failed: %s", rank, ours or last_line(worker_exceptions[rank])
                    )
                if ours and (not may_pass(ours) or stopped):
                    raise ours
            if stopped:
                remedy = "the same command with --resume goes on from the newest checkpoint"
                raise RunError("stopped-uncommitted", message="a worker failed meanwhile", remedy=remedy)
            self.failures += not taken
            if self.failures > max_failures:
                raise next((one for one in known.values() if one), next(iter(worker_exceptions.values())))
            count_restart(exporter, source)

    return Watcher()
