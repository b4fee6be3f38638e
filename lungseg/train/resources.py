"""What the workers of a run are given of a cluster's nodes. Needs no Ray: nodes in, answer out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from lungseg.config import TrainConfig
from lungseg.errors import ConfigError

Node = dict[str, Any]
"""As Ray lists it: "Alive", and "Resources" with "CPU" and "GPU"."""


def planned_nodes(text: str | None) -> list[Node]:
    """The nodes that a cluster has when all of them are there, of LUNGSEG_NODE_GROUPS, which the chart sets:
    [{"nodes": 2, "CPU": "500m", "GPU": 0}], with Kubernetes' quantities. Ray rounds a fraction of a core up.
    """
    groups = json.loads(text or "[]")
    return [
        {"Alive": True, "Resources": {"CPU": _cores(str(group["CPU"])), "GPU": group["GPU"]}}
        for group in groups
        for _ in range(group["nodes"])
    ]


def _cores(quantity: str) -> int:
    return math.ceil(float(quantity.removesuffix("m")) / (1000 if quantity.endswith("m") else 1))


def worker_resources(config: TrainConfig, nodes: Sequence[Node]) -> dict[str, int]:
    """What each worker is given: "CPU", as many cores as the nodes that will hold the workers have for each,
    one worker a node where there are enough, and "GPU" where the recipe asks for any.

    Raises ConfigError("gpus-missing", "too-few-cpus") for what these nodes cannot give.
    """
    asked, workers = config.gpus_per_worker, config.workers
    if asked and _places(config, nodes, 0) < workers:
        gpus = [gpu for _, gpu in _alive(nodes)]
        raise ConfigError(
            "gpus-missing",
            workers=workers,
            gpus_per_worker=asked,
            cluster_gpus=sum(gpus),
            most_on_a_node=max(gpus, default=0),
            remedy="lower train.workers or train.gpus_per_worker, add nodes, or train on CPUs with 0",
        )
    chosen = config.cpus_per_worker
    largest = max((cores for cores, _ in _alive(nodes)), default=0)
    most = workers if chosen else _fewest_on_a_node(config, nodes)
    for wanted in [chosen] if chosen else range(largest, 0, -1):
        if _places(config, nodes, wanted, most) >= workers:
            return {"CPU": wanted} | ({"GPU": asked} if asked else {})
    raise ConfigError(
        "too-few-cpus",
        workers=workers,
        cpus_per_worker=chosen or 1,
        cluster_cpus=sum(cores for cores, _ in _alive(nodes)),
        remedy="lower train.workers or train.cpus_per_worker, or add nodes",
    )


def trial_resources(
    config: TrainConfig, nodes: Sequence[Node], trials: int | None = None
) -> tuple[dict[str, int], int]:
    """What each worker of a sweep's trial is given, and how many trials run at once: `trials`, or as many as
    there is room for.

    Beside GPUs, or where the trials are given, and no `cpus_per_worker` is, the cores are shared out evenly:
    one that took all cores of its node would leave the node's other GPUs idle. Raises what `worker_resources`
    raises.
    """
    each, workers = worker_resources(config, nodes), config.workers
    if config.cpus_per_worker is None and (config.gpus_per_worker or trials):
        wanted = workers * (trials or _places(config, nodes, 1) // workers)
        shares = (cores for cores in range(each["CPU"], 0, -1) if _places(config, nodes, cores) >= wanted)
        each["CPU"] = next(shares, 1)
    return each, trials or max(1, _places(config, nodes, each["CPU"]) // workers)


def workers_there(config: TrainConfig, nodes: Sequence[Node], planned: Sequence[Node]) -> int:
    """How many of the workers these nodes can hold, spread as over the planned ones."""
    workers, cores, most = config.workers, config.cpus_per_worker or 1, config.workers
    if planned:
        cores, spread = worker_resources(config, planned)["CPU"], _fewest_on_a_node(config, planned)
        most = spread if _places(config, planned, cores, spread) >= workers else workers
    return min(workers, _places(config, nodes, cores, most))


def _fewest_on_a_node(config: TrainConfig, nodes: Sequence[Node]) -> int:
    """Workers are spread: one a node, where as many nodes can take one."""
    able = _places(config, nodes, config.cpus_per_worker or 1, 1)
    return -(-config.workers // max(able, 1))


def _places(config: TrainConfig, nodes: Sequence[Node], cores: int, most: int | None = None) -> int:
    """For how many workers of so many cores each there is room, with at most `most` on a node."""
    found = 0
    for cpu, gpu in _alive(nodes):
        limits = [] if most is None else [most]
        limits += [cpu // cores] if cores else []
        limits += [gpu // config.gpus_per_worker] if config.gpus_per_worker else []
        found += min(limits)
    return found


def _alive(nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """Cores and GPUs of each node."""
    there = [node["Resources"] for node in nodes if node["Alive"]]
    return [(int(one.get("CPU", 0)), int(one.get("GPU", 0))) for one in there]
