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
    servers = _Servers(ray, (name, first, with_ray))
    threading.Thread(target=servers.keep, name="lungseg-warm", daemon=True).start()


class _Servers:
    """An actor holds each. Any actor counts as work: an autoscaler would not take an idle node away, and one
    that drains would stay until its deadline. So there the server goes, and does not come back."""

    def __init__(self, ray: Any, arguments: tuple[str, str, str]) -> None:
        self._ray, self._arguments = ray, arguments
        self._actor = ray.remote(num_cpus=0)(WarmServer)
        self._actors: dict[str, Any] = {}  # by node; None where it has gone
        self._used: dict[str, float] = {}

    def keep(self) -> None:
        with suppress(Exception):  # Ray has been shut down, or its head has gone: then the driver hears of it
            while self._ray.is_initialized():
                self.look()
                time.sleep(_LOOK_SECONDS)

    def look(self) -> None:
        from ray._private.state import available_resources_per_node, state

        free, draining, now = available_resources_per_node(), state.get_draining_nodes(), time.monotonic()
        for node in self._ray.nodes():
            key, total = node["NodeID"], node["Resources"]
            if not node["Alive"] or total.get("CPU", 0) < 1:
                continue
            if key not in self._actors:
                self._begin(key)
            kinds = {"CPU", "GPU"} & total.keys()
            if key not in self._used or any(free.get(key, total).get(kind) != total[kind] for kind in kinds):
                self._used[key] = now
            if key in draining or now - self._used[key] > _IDLE_SECONDS:
                self._end(key)

    def _begin(self, node: str) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

        there = self._actor.options(scheduling_strategy=OnNode(node, soft=False))
        self._actors[node] = there.remote(*self._arguments)

    def _end(self, node: str) -> None:
        actor, self._actors[node] = self._actors[node], None
        if actor is not None:
            self._ray.kill(actor)


class WarmServer:
    """The actor that holds a node's server. Processes that were forked from it outlive it."""

    def __init__(self, name: str, first: str, with_ray: str) -> None:
        from lungseg.warm import Server

        self._server = Server(os.path.expandvars(name))
        self._server.preload(first, with_ray)
