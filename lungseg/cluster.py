"""Reaching Ray: the cluster of the job we run in, or a local one that listens on 127.0.0.1 only; and tasks on
it, one a scan or shard."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from lungseg.errors import ConfigError, LungsegError, StorageError
from lungseg.nodes import keep_warm, on_its_node
from lungseg.show import duration
from lungseg.telemetry import Progress, Relay, log, waiting
from lungseg.warm import Server, executable, server_name
from lungseg.worker_setup import ARGUMENT

# Read when Ray is imported. Under `uv run`, Ray would ship the working folder and build a second
# virtual environment for its workers; ours have the same one already.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# That no node can take a task "yet" is told for every task that merely waits.
os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# A local Ray would begin with a worker a core, none of which is started as ours are, nor ever used.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Ctrl-C must end `lungseg tune` as it ends every verb, not make a result of what is there.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Its other reporter says of a sweep what it was asked to: nothing, since lungseg tells of each trial itself.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

_OBJECT_STORE_BYTES = 1 << 30
_ANSWER_SECONDS = 12.0
_LOOK_SECONDS, _TELL_SECONDS = 2.0, 20.0
worker_lines = ExitStack()
"""Shows what workers on this machine log; closed at the end, or earlier by who wants the last word."""
atexit.register(worker_lines.close)
_relays: list[Relay] = []
_warm: list[Server] = []
_warm_on_nodes: list[str] = []
"""The name of the server on each node of the cluster that was joined, where Ray can be told of it."""


def show_worker_lines() -> None:
    """Show now what workers on this machine have logged till now."""
    for one in _relays:
        one.catch_up()


def on_a_cluster() -> bool:
    """Whether Ray is one that others have started, as in every job: what is not there now may come."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def await_store(check: Callable[[], None], minutes: float) -> None:
    """On a cluster, which may start its store together with its jobs, return once the store answers. Raises
    what `check` raises. Elsewhere whoever reads first is told."""
    if not on_a_cluster():
        return
    began = told = time.monotonic()
    while True:
        try:
            return check()
        except StorageError as error:
            spent = time.monotonic() - began
            if error.code != "store-unreachable" or spent > minutes * 60:
                raise
            if told == began or time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                log("cluster").info("waiting for the store, %s: %s", duration(spent), error.message)
        time.sleep(_LOOK_SECONDS)


def warm_up(first: str, with_ray: str) -> None:
    """Begin to import what Ray's workers will need, as `Server.preload` has it, on this machine or on every
    node of a cluster, while the driver is busy with other things. Raises what `connect` raises."""
    if not on_a_cluster():
        _server().preload(first, with_ray)
        return
    ray = connect()
    if _warm_on_nodes:
        keep_warm(ray, _warm_on_nodes[-1], first, with_ray)


def _server() -> Server:
    """The server by which the present local Ray starts its workers, or the next one will."""
    runs = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if _warm and _warm[0].taken and not runs:
        _warm.pop().close()
    if not _warm:
        _warm.append(Server(server_name()))
    return _warm[0]


@contextmanager
def _rays_folder() -> Iterator[str]:
    """Where Ray has its sockets: what goes wrong there is the folder's fault, and told as such."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    try:
        yield folder
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:  # also of a path too long for a socket, which has 107 bytes
        remedy = "set RAY_TMPDIR to a short path, such as /tmp, that this user may write to"
        raise ConfigError("ray-folder", folder=folder, message=str(error), remedy=remedy) from error


def connect() -> Any:
    """Ray itself, initialised: with RAY_ADDRESS set (as in every `ray job submit`) on that cluster,
    else on a fresh local one. Calling it again is free.

    Raises ConfigError("cluster-address", "cluster-unreachable", "ray-folder").
    """
    import ray

    if ray.is_initialized():
        return ray
    with _sigterm_kept():
        if on_a_cluster():
            _join(ray, os.environ["RAY_ADDRESS"])
        else:
            _start(ray)
    return ray


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray would end this process with code 15."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _start(ray: Any) -> None:
    # The workers' own output is a flood of TensorFlow's and Ray's notices; it stays in Ray's session
    # folder unless `-v` asks for it, and our log lines come here by a file of their own.
    # No cloud takes a node of it away, and the process that would look for that costs each run seconds.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    log("cluster")  # our own logger is bound to standard error before the variable is set for the workers
    handle, path = tempfile.mkstemp(prefix="lungseg-", suffix=".log")
    os.close(handle)
    _relays.append(Relay(path).start())
    worker_lines.callback(_relays[-1].end)
    os.environ["LUNGSEG_LOG_FILE"] = path
    try:
        with waiting("starting Ray", 10):
            _start_local(ray)
    finally:
        del os.environ["LUNGSEG_LOG_FILE"]


def _join(ray: Any, address: str) -> None:
    try:
        with waiting("waiting for Ray", 5):
            _wait_for_answer(address)
            ray.init(logging_level=logging.WARNING, log_to_driver=True, runtime_env=_nodes_environment())
    except ValueError as error:
        remedy = "set it to HOST:6379, or to auto on a node of the cluster; http:// is for `ray job submit`"
        raise ConfigError("cluster-address", RAY_ADDRESS=address, remedy=remedy) from error
    except OSError as error:
        remedy = "start that Ray cluster, or unset RAY_ADDRESS to use this machine"
        raise ConfigError(
            "cluster-unreachable", RAY_ADDRESS=address, message=str(error), remedy=remedy
        ) from error


def _nodes_environment() -> dict[str, str] | None:
    """What has Ray start this job's workers by the servers of `warm_up`, where there are any."""
    mine = "py_executable" in os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
    if mine or os.environ["RAY_ADDRESS"].startswith("ray://"):
        return None
    _warm_on_nodes.append(on_its_node(server_name()))
    return {"py_executable": executable(_warm_on_nodes[-1])}


def _wait_for_answer(address: str) -> None:
    """Return once somebody listens there: Ray itself would ask for a quarter of an hour. A head that is being
    replaced has some seconds. Raises OSError, ValueError."""
    from ray._private.services import canonicalize_bootstrap_address

    if address.startswith("ray://"):  # a proxy, which answers at once or never
        return
    if "://" in address:
        raise ValueError(address)
    found = canonicalize_bootstrap_address(address)
    if found is None:
        raise ConnectionError("no Ray runs on this machine")
    host, _, port = found.rpartition(":")
    until = time.monotonic() + _ANSWER_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(0.5)


def _start_local(ray: Any) -> None:
    """A busy machine may need longer than the 30 s that Ray grants its node to start: then try again."""
    # Where Ray has no token it would write one to the home folder, which need not be there, nor be writable.
    if not os.path.isfile(os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    server = _server()
    server.taken = True
    for attempt in (1, 2, 3):
        try:
            with _rays_folder(), _loopback_stays(), _little_to_start(), _whole_or_nothing():
                ray.init(
                    address="local",
                    _node_ip_address="127.0.0.1",
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    logging_level=logging.ERROR,
                    log_to_driver=log("cluster").isEnabledFor(logging.DEBUG),
                    runtime_env={"py_executable": executable(server.name)},
                )
            return
        except Exception as error:
            if attempt == 3 or type(error) is not Exception:  # which Ray raises for just that
                raise
            log("cluster").warning("Ray did not start in time, trying again: %s", error)
            ray.shutdown()


@contextmanager
def _whole_or_nothing() -> Iterator[None]:
    """A start that fails leaves none of Ray's processes, which would slow down the next."""
    before = _children()
    try:
        yield
    except Exception:
        for process in _children() - before:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        raise


def _children() -> set[int]:
    found: set[int] = set()
    for thread in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # of a thread that has just ended
            found.update(map(int, thread.read_text().split()))
    return found


@contextmanager
def _loopback_stays() -> Iterator[None]:
    """Ray takes 127.0.0.1 for this machine's address in its network, and its processes then listen there to
    everybody: where the loopback address is asked for, it is meant."""
    from ray._private import services

    with _replaced(services, "resolve_ip_for_localhost", lambda host: host):
        yield


@contextmanager
def _little_to_start() -> Iterator[None]:
    """Without those of Ray's processes that serve other nodes, a browser and a terminal: each imports for
    seconds while the first worker waits for a core. Those that read logs stay where their lines are shown.
    And workers go straight to our server, not by Ray's setup of them, which imports all of Ray to do so."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    idle = ["start_monitor", "start_api_server"]
    if not log("cluster").isEnabledFor(logging.DEBUG):
        idle.append("start_log_monitor")
    update = RayParams.update_if_absent

    def with_our_setup(self: RayParams, **absent: Any) -> None:
        update(self, **absent | ({"setup_worker_path": ARGUMENT} if "setup_worker_path" in absent else {}))

    with ExitStack() as stack:
        for name in idle:
            stack.enter_context(_replaced(Node, name, lambda self, **settings: None))
        stack.enter_context(_replaced(RayParams, "update_if_absent", with_our_setup))
        yield


@contextmanager
def _replaced(owner: Any, name: str, other: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def run_tasks(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    memory_bytes: int,
    progress: Progress = lambda done, total: None,
    on_result: Callable[[Any], None] = lambda result: None,
    gpus: bool = False,
) -> list[Any]:
    """The results of Ray tasks in the order of `tasks`, each handed to `on_result` as it comes; a task
    whose worker dies is done again. With `gpus` each has a GPU, where the cluster has any.

    What a task raises is raised as it is; those that wait are then given up.
    """
    ray = connect()
    # A task that asks for more than any node has would wait for ever.
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    memory = int(min(memory_bytes, max(node.get("memory", 0) for node in nodes)))
    gpu = int(gpus and any(node.get("GPU", 0) >= 1 for node in nodes))
    remote = ray.remote(num_cpus=1, num_gpus=gpu, memory=memory, max_retries=3)(function)
    all_of_them = pending = [remote.remote(*arguments) for arguments in tasks]
    progress(0, len(tasks))
    try:
        while pending:
            ready, pending = ray.wait(pending)
            for result in ray.get(ready):
                on_result(result)
            progress(len(tasks) - len(pending), len(tasks))
        results: list[Any] = ray.get(all_of_them)
    except Exception as error:
        raise LungsegError.find_in(error) or error from None
    finally:
        for reference in pending:
            ray.cancel(reference)
    return results
