"""Starting a run through Ray Train: one worker a node, restarted as a group when one dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

from lungseg.cluster import connect
from lungseg.config import Recipe
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.errors import LungsegError, RunError, StorageError
from lungseg.exporter import Source, count_restart, pushing, start_exporter
from lungseg.runs.best import Best
from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.fit import check_fit, on_data
from lungseg.runs.run import Mode, load_run, open_run, refuse_taken, run_exists
from lungseg.storage import Store, keys
from lungseg.storage.base import DISK_FULL
from lungseg.telemetry import GROUP_METRICS, WORKER_METRICS, lean_keras, log, log_wait
from lungseg.train.job import Job, Session
from lungseg.train.notice import heed_sigterm, was_asked
from lungseg.train.resources import worker_resources

_LEFT = "worker-asked-to-leave"
_held: list[socket.socket] = []


def train(store: Store, data: str, run: str, recipe: Recipe, mode: Mode = "fresh") -> Best:
    """Train to the end and return the pointer to the run's published checkpoint.

    Raises DataError("data-missing"), RunError("run-exists", "run-differs"), ConfigError("gpus-missing",
    "too-few-cpus"), and what a worker raised after `train.max_failures` restarts.
    """
    manifest = load_manifest(store, data)
    recipe = on_data(recipe, manifest)
    refuse_taken(store, run, mode)
    ended = _ended(store, run, manifest, recipe) if mode == "resume" else None
    if ended:
        return ended
    check_fit(manifest, recipe, "train")  # told before Ray takes its seconds
    worker_resources(recipe.train, connect().nodes())  # a run that cannot start must not claim the name
    opened = open_run(store, run, manifest, recipe, mode)
    fit(store, keys.run_root(run), opened.attempt, manifest, recipe, init=opened.init)
    best = Checkpoints(store, keys.run_root(run)).best()
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
) -> None:
    """Run the workers below the prefix `root` of the store; also the body of every tuning trial.

    Where there are `callbacks`, every epoch is committed before they hear of it.
    """
    ray = connect()
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    resources = worker_resources(recipe.train, ray.nodes())
    exporter, source = start_exporter(recipe.telemetry), _source(root)
    with (
        tempfile.TemporaryDirectory(prefix="lungseg-ray-", ignore_cleanup_errors=True) as scratch,
        pushing(exporter, source, GROUP_METRICS, recipe.telemetry.push_seconds),
    ):
        trainer = _trainer_class()(
            _worker,
            train_loop_config={
                "job": Job(store, root, attempt, manifest, recipe, init),
                "threads": resources["CPU"],
                "settled": bool(callbacks),
                "metrics": (exporter, source),
            },
            backend_config=_backend_config(),
            scaling_config=ScalingConfig(
                num_workers=recipe.train.workers,
                use_gpu="GPU" in resources,
                resources_per_worker=resources,
                placement_strategy="SPREAD",
            ),
            # Ray's own snapshots are not used: what a run resumes from is our newest valid checkpoint.
            run_config=RunConfig(
                name="train",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=recipe.train.max_failures),
                callbacks=[_watcher(recipe.train.max_failures, exporter, source), *callbacks],
            ),
        )
        try:
            log_wait("starting the workers", 10)
            with _interruptible():
                trainer.fit()
        except Exception as error:
            ours = LungsegError.find_in(error)
            if ours:
                raise ours from error
            raise


def _trainer_class() -> Any:
    """Ray's trainer without two helpers, each a process that imports pandas for seconds and has no work here.

    One hands out data sets of Ray Data. The other frees the placement group of a controller that died, for
    which it asks the dashboard, and a local Ray, which has none, dies with its driver.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    local = not os.environ.get("RAY_ADDRESS")
    idle = DatasetsCallback | PlacementGroupCleanerCallback if local else DatasetsCallback

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if not isinstance(one, idle)]

    return Trainer


def _backend_config() -> Any:
    """Names a worker's peers to TensorFlow, and lets it heed SIGTERM: signal handlers are for a process's
    main thread, where Ray runs this, and not the training.

    Ray's own TensorflowConfig does the first. But whoever imports it imports TensorFlow, and that would be
    the driver and Ray's controller, one after the other, before a worker starts.
    """
    import ray
    from ray.train.backend import Backend, BackendConfig

    class Peers(Backend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            addresses = worker_group.execute(_address)
            each = range(len(addresses))
            ray.get([worker_group.execute_single_async(rank, _meet, addresses, rank) for rank in each])

        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(heed_sigterm)

    class Config(BackendConfig):
        @property
        def backend_cls(self) -> Any:
            return Peers

    return Config()


def _address() -> str:
    """Where the peers of this worker's TensorFlow will reach it.

    TensorFlow takes seconds to start, and meanwhile a port that is merely free may go to somebody else. So it
    stays bound here, until this process ends, and TensorFlow's server shares it.
    """
    from ray.util import get_node_ip_address

    host = get_node_ip_address()
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind((host, 0))
    _held.append(held)
    os.environ["TF_GRPC_REUSE_PORT"] = "true"
    port = held.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _meet(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    )


def _source(root: str) -> Source:
    """The labels of the metrics of "runs/NAME" or "runs/NAME/trials/TRIAL"."""
    return Source(*keys.run_and_trial(root))


def _watcher(max_failures: int, exporter: Any | None, source: Source) -> Any:
    """A callback of Ray Train that tells why workers failed, counts their restarts, and ends the run for
    what no restart cures: our own errors, but for a store that may come back and a notice to leave."""
    from ray.train import UserCallback

    class Watcher(UserCallback):
        failures = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for rank, error in worker_exceptions.items():
                # Of a remote traceback the last line names the error.
                log("train").warning("worker %d failed: %s", rank, str(error).strip().rpartition("\n")[2])
                ours = LungsegError.find_in(error)
                if ours and not _may_pass(ours):
                    raise ours
            self.failures += 1
            if self.failures <= max_failures:
                count_restart(exporter, source)

    return Watcher()


def _may_pass(error: LungsegError) -> bool:
    """Whether starting the workers again may help."""
    return error.code == _LEFT or (isinstance(error, StorageError) and error.code != "store-full")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train answers Ctrl-C by ending the process as if all were well, and leaves that handler behind:
    here it raises KeyboardInterrupt, and the handler goes."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stopped:
        raise KeyboardInterrupt from stopped
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _worker(config: dict[str, Any]) -> None:
    """The body of a Ray Train worker. TensorFlow is first imported here, in its own process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        log_wait("importing TensorFlow", 10)
    with lean_keras():
        from lungseg.train.loop import run_worker

    group = ray.get_runtime_context().get_placement_group_id()  # of all workers; tuning frees it
    job: Job = config["job"]
    rank = context.get_world_rank()
    exporter, source = config["metrics"]
    source = replace(source, rank=str(rank))
    with pushing(exporter, source, WORKER_METRICS, job.recipe.telemetry.push_seconds) as push:

        def report(metrics: dict[str, float]) -> None:
            push()
            ray.train.report({**metrics, "placement_group": group})

        session = Session(
            rank=rank,
            world_size=context.get_world_size(),
            threads=config["threads"],
            share=broadcast_from_rank_zero,
            report=report,
            asked=lambda: was_asked() or _drain() is not None,
            leave=_leave,
            settled=config["settled"],
        )
        with _disk_has_room():
            run_worker(job, session)


@contextmanager
def _disk_has_room() -> Iterator[None]:
    """Raises RunError("disk-full") for a disk of this node's own that is full: no restart cures that."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        remedy = "free space on that disk, or set TMPDIR to another, then --resume"
        raise RunError("disk-full", message=str(error), remedy=remedy) from error


def _drain() -> Any:
    """Ray Train's notice that the node of a worker is about to go, or None.

    Kubernetes deletes a pod by SIGTERM to `ray start`, which marks its node as draining and waits for
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S (30 s) before it ends the node's processes. Ray's public function
    for this, get_preemption_info, is a barrier over all workers: too slow for every step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def _leave() -> NoReturn:
    """End this worker, so that its group is started again, if need be elsewhere.

    On a node that drains it waits for Ray to end it: only so does Ray not count this as a failure.
    """
    notice = _drain()
    if notice is not None:
        until = (notice.deadline_ms or 0) / 1000 or time.time() + 120  # as long as Ray itself waits
        time.sleep(max(0.0, until - time.time()) + 10)
    remedy = "start the same command again, with --resume"
    raise RunError(_LEFT, message="its state is committed", remedy=remedy)
