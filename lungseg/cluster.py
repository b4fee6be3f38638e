"""Reaching Ray: the cluster of the job we run in, or a local one that listens on 127.0.0.1 only."""

from __future__ import annotations

import logging
import os
import tempfile
from typing import Any

from lungseg.telemetry import log, relay

# Read when Ray is imported. Under `uv run`, Ray would ship the working folder and build a second
# virtual environment for its workers; ours have the same one already.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

_OBJECT_STORE_BYTES = 1 << 30


def connect() -> Any:
    """Ray itself, initialised: with RAY_ADDRESS set (as in every `ray job submit`) on that cluster,
    else on a fresh local one. Calling it again is free."""
    import ray

    if ray.is_initialized():
        return ray
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, log_to_driver=True)
        return ray
    # The workers' own output is a flood of TensorFlow's and Ray's notices; it stays in Ray's session
    # folder, and our log lines come here by a file of their own.
    log("cluster")
    handle, path = tempfile.mkstemp(prefix="lungseg-", suffix=".log")
    os.close(handle)
    os.environ["LUNGSEG_LOG_FILE"] = path
    relay(path)
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    return ray
