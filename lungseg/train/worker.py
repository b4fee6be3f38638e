"""What runs in the processes of Ray Train's workers: meeting the peers, the training, and leaving."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

from lungseg.errors import RunError
from lungseg.exporter import pushing
from lungseg.storage.base import DISK_FULL
from lungseg.telemetry import WORKER_METRICS, log, log_wait, quiet_tensorflow
from lungseg.train.job import DRAINS, LEFT, Job, Session
from lungseg.train.notice import heed_sigterm, was_asked
from lungseg.train.stop import clear_mark, is_marked, set_mark, watch_for_stop

IMPORTS = ("lungseg.train.worker:import_tensorflow", "lungseg.train.worker:import_ray_train")
"""What a worker begins with where somebody imports it ahead, without Ray and with it."""
_held: list[socket.socket] = []
_REMEDY = "start the same command again, with --resume"


def backend_config() -> Any:
    """Names a worker's peers to TensorFlow, and lets it heed SIGTERM: signal handlers are for a process's
    main thread, where Ray runs this, and not the training.

    Ray's own TensorflowConfig does the first. But whoever imports it imports TensorFlow, and that would be
    the driver and Ray's controller, one after the other, before a worker starts.
    """
    import ray
    from ray.train.backend import Backend, BackendConfig

    class Peers(Backend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            addresses = worker_group.execute(address)
            each = range(len(addresses))
            ray.get([worker_group.execute_single_async(rank, _meet, addresses, rank) for rank in each])

        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(heed_sigterm)

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            clear_mark("training")

    class Config(BackendConfig):
        @property
        def backend_cls(self) -> Any:
            return Peers

    return Config()


def address() -> str:
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


def import_tensorflow() -> None:
    """What a worker needs of it; no device is looked at, for that does not outlive a fork."""
    if not log("train").isEnabledFor(logging.DEBUG):
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # what its errors lead to is raised as well
    # Of TensorFlow's own log the driver gets warnings and errors.
    logging.getLogger("tensorflow").setLevel(logging.WARNING)
    with quiet_tensorflow(told=False):
        import lungseg.train.loop  # noqa: F401


def import_ray_train() -> None:
    import ray.train
    import ray.train.v2._internal.execution.controller  # noqa: F401


def work(config: dict[str, Any]) -> None:
    """The body of a Ray Train worker."""
    if not log("train").isEnabledFor(logging.DEBUG):
        logging.getLogger().setLevel(logging.WARNING)  # Ray tells of each epoch, and boto3 where it looked
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    watch_for_stop()
    if context.get_world_rank() == 0 and "tensorflow" not in sys.modules:
        log_wait("importing TensorFlow", 10)
    import_tensorflow()
    from lungseg.train.loop import run_worker
    from lungseg.train.strategy import look_for_devices

    with quiet_tensorflow(told=False):
        look_for_devices()

    if is_marked("stop"):  # of a sweep, whose other trials have something to commit
        raise RunError(LEFT, message="no step was begun", remedy=_REMEDY)
    set_mark("training")
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
        with disk_has_room():
            run_worker(job, session)


@contextmanager
def disk_has_room() -> Iterator[None]:
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


def _leave(step: int) -> NoReturn:
    """End this worker, so that its group is started again, if need be elsewhere. A node that drains goes as
    soon as nobody works there, and whoever replaces it may come."""
    where = {"node": DRAINS} if _drain() is not None else {}
    raise RunError(LEFT, message=f"step {step} is committed", **where, remedy=_REMEDY)
