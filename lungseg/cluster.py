"""Reaching Ray: the cluster of the job we run in, or a local one that listens on 127.0.0.1 only."""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
from contextlib import ExitStack
from typing import Any

from lungseg.errors import ConfigError
from lungseg.telemetry import log, relay, waiting

# Read when Ray is imported. Under `uv run`, Ray would ship the working folder and build a second
# virtual environment for its workers; ours have the same one already.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Ctrl-C must end `lungseg tune` as it ends every verb, not make a result of what is there.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

_OBJECT_STORE_BYTES = 1 << 30
worker_lines = ExitStack()
"""Shows what workers on this machine log; closed at the end, or earlier by who wants the last word."""
atexit.register(worker_lines.close)


def connect() -> Any:
    """Ray itself, initialised: with RAY_ADDRESS set (as in every `ray job submit`) on that cluster,
    else on a fresh local one. Calling it again is free.

    Raises ConfigError("cluster-unreachable").
    """
    import ray

    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            with waiting("waiting for Ray", 5):
                ray.init(logging_level=logging.WARNING, log_to_driver=True)
        except (ConnectionError, TimeoutError) as error:
            remedy = "start that Ray cluster, or unset RAY_ADDRESS to use this machine"
            raise ConfigError("cluster-unreachable", RAY_ADDRESS=address, remedy=remedy) from error
        return ray
    # The workers' own output is a flood of TensorFlow's and Ray's notices; it stays in Ray's session
    # folder unless `-v` asks for it, and our log lines come here by a file of their own.
    # No cloud takes a node of it away, and the process that would look for that costs each run seconds.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    log("cluster")  # our own logger is bound to standard error before the variable is set for the workers
    handle, path = tempfile.mkstemp(prefix="lungseg-", suffix=".log")
    os.close(handle)
    worker_lines.callback(relay(path))
    os.environ["LUNGSEG_LOG_FILE"] = path
    try:
        with waiting("starting Ray", 10):
            _start_local(ray)
    finally:
        del os.environ["LUNGSEG_LOG_FILE"]
    return ray


def _start_local(ray: Any) -> None:
    """A busy machine may need longer than the 30 s that Ray grants its node to start: then try again."""
    for attempt in (1, 2, 3):
        try:
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=log("cluster").isEnabledFor(logging.DEBUG),
            )
            return
        except Exception as error:
            if attempt == 3 or "timed out during startup" not in str(error):
                raise
            log("cluster").warning("Ray did not start in time, trying again: %s", error)
            ray.shutdown()
