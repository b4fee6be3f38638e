"""Servers of warm processes on the nodes of a cluster, each for as long as its node works for this job."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import Any

_LOOK_SECONDS = 2.0
_IDLE_SECONDS = 300.0


def on_its_node(name: str) -> str:
    """The name of a job's server, which is another on each node even where two nodes are one machine."""
    return f"{name}-$RAY_RAYLET_PID"


def keep_warm(ray: Any, name: str, first: str, with_ray: str) -> None:
    """Have a server, named `on_its_node`, on every node with cores, also on those that come later, with the
    imports of `Server.preload`; all end with this driver."""
    arguments = (ray, name, first, with_ray)
    threading.Thread(target=_keep, args=arguments, name="lungseg-warm", daemon=True).start()


def _keep(ray: Any, name: str, first: str, with_ray: str) -> None:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

    actor = ray.remote(num_cpus=0)(WarmServer)
    served: dict[str, Any] = {}
    used: dict[str, float] = {}
    with suppress(Exception):  # Ray has been shut down, or its head has gone: then the driver hears of it
        while ray.is_initialized():
            for node in _with_cores(ray):
                key = node["NodeID"]
                if key not in served:
                    there = actor.options(scheduling_strategy=OnNode(key, soft=False))
                    served[key] = there.remote(name, first, with_ray)
                    used[key] = time.monotonic()
            _let_idle_ones_go(ray, served, used)
            time.sleep(_LOOK_SECONDS)


def _with_cores(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]


def _let_idle_ones_go(ray: Any, served: dict[str, Any], used: dict[str, float]) -> None:
    """An autoscaler takes away what nobody works on, and any actor counts as work."""
    from ray._private.state import available_resources_per_node

    free, now = available_resources_per_node(), time.monotonic()
    for node in _with_cores(ray):
        key, total = node["NodeID"], node["Resources"]
        if any(free.get(key, total).get(kind) != total[kind] for kind in ("CPU", "GPU") if kind in total):
            used[key] = now
        elif served[key] is not None and now - used[key] > _IDLE_SECONDS:
            ray.kill(served[key])
            served[key] = None


class WarmServer:
    """The actor that holds a node's server."""

    def __init__(self, name: str, first: str, with_ray: str) -> None:
        from lungseg.warm import Server

        self._server = Server(os.path.expandvars(name))
        self._server.preload(first, with_ray)
