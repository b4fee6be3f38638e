"""A job's driver, which tells where a cluster has what belongs to the job.

python look_at_nodes.py workers|exporter|drain
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from helpers.train_watch import tell_ray_that_a_node_drains

from lungseg import cluster, nodes
from lungseg.config import load_recipe
from lungseg.exporter import start_exporter
from lungseg.train.worker import IMPORTS


class Worker:
    def look(self) -> tuple[bool, bool]:
        """Whether this process has what a worker imports, and whether a server has forked it."""
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text()
        return {"tensorflow", "ray.train", "lungseg.train.loop"} <= set(sys.modules), "lungseg.warm" in parent


def look_at_workers() -> None:
    cluster.warm_up(*IMPORTS)
    ray = cluster.connect()
    actor = ray.remote(num_cpus=1)(Worker)
    tell_of_servers(1)
    worker = actor.remote()
    print(*ray.get(worker.look.remote()))
    nodes._IDLE_SECONDS = 3  # not before: on a busy machine a worker needs longer to come
    time.sleep(8)
    tell_of_servers(1)
    del worker
    tell_of_servers(0)
    print(*ray.get(actor.remote().look.remote()))


def look_at_a_node_that_drains() -> None:
    """Its deadline is far, and it has a worker still."""
    cluster.warm_up(*IMPORTS)
    ray = cluster.connect()
    tell_of_servers(1)
    worker = ray.remote(num_cpus=1)(Worker).remote()
    print(*ray.get(worker.look.remote()))
    (node,) = [one["NodeID"] for one in ray.nodes() if one["Alive"] and one["Resources"].get("CPU")]
    tell_ray_that_a_node_drains(node, seconds=600)
    tell_of_servers(0)
    print(*ray.get(worker.look.remote()))


def tell_of_servers(wanted: int) -> None:
    """How many there are, as soon as there are so many, or after a minute."""
    name, deadline = cluster._warm_on_nodes[-1].partition("$")[0], time.monotonic() + 60
    while True:
        lines = Path("/proc/net/unix").read_text().splitlines()
        there = len({line.split()[-1] for line in lines if name in line})
        if there == wanted or time.monotonic() > deadline:
            return print(there, "served")
        time.sleep(0.1)


def look_at_exporter() -> None:
    """Each of five times anew, since chance may put it there."""
    cluster.warm_up(*IMPORTS)
    ray = cluster.connect()
    config = load_recipe(None, [f"telemetry.metrics_port={os.environ['METRICS_PORT']}"]).telemetry
    (head,) = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    for _ in range(5):
        exporter: Any = start_exporter(config)
        where = ray.get(exporter.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id()))
        print("on the head" if where == head else "elsewhere")
        ray.kill(exporter)


if __name__ == "__main__":
    {"workers": look_at_workers, "exporter": look_at_exporter, "drain": look_at_a_node_that_drains}[
        sys.argv[1]
    ]()
