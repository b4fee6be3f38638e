"""What the workers of a run are given of a cluster's nodes. Needs no Ray: nodes in, answer out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lungseg.config import TrainConfig
from lungseg.errors import ConfigError


def worker_resources(config: TrainConfig, nodes: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What each worker is given: "CPU", the cores of the smallest node that takes workers, shared by those
    that must share it, and "GPU" where the recipe asks for any. `nodes` are as Ray lists them.

    Raises ConfigError("gpus-missing", "too-few-cpus") rather than let Ray wait for ever for what no node has.
    """
    there = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = [int(node.get("GPU", 0)) for node in there]
    asked, workers = config.gpus_per_worker, config.workers
    takes = [count // asked if asked else workers for count in gpus]  # workers, for all its GPUs
    if asked and sum(takes) < workers:
        raise ConfigError(
            "gpus-missing",
            workers=workers,
            gpus_per_worker=asked,
            cluster_gpus=sum(gpus),
            most_on_a_node=max(gpus, default=0),
            remedy="lower train.workers or train.gpus_per_worker, add nodes, or train on CPUs with 0",
        )
    able = [(int(node.get("CPU", 0)), most) for node, most in zip(there, takes, strict=True)]
    able = [(cores, most) for cores, most in able if cores and most] or [(0, 0)]
    per_node = -(-workers // len(able))
    wanted = config.cpus_per_worker or min(cores for cores, _ in able) // per_node
    if wanted < 1 or sum(min(cores // wanted, most) for cores, most in able) < workers:
        raise ConfigError(
            "too-few-cpus",
            workers=workers,
            cpus_per_worker=config.cpus_per_worker or 1,
            cluster_cpus=sum(cores for cores, _ in able),
            remedy="lower train.workers or train.cpus_per_worker, or add nodes",
        )
    return {"CPU": wanted} | ({"GPU": asked} if asked else {})
