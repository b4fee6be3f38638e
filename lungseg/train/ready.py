"""Waiting, on a cluster, until its nodes are there and free for the workers of a run."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lungseg.cluster import connect, on_a_cluster
from lungseg.config import Recipe, TrainConfig
from lungseg.errors import ConfigError, RunError
from lungseg.exporter import Source, pushing, start_exporter
from lungseg.show import duration
from lungseg.telemetry import GROUP_METRICS, MISSING_WORKERS, log
from lungseg.train.resources import Node, planned_nodes, worker_resources, workers_there

_LOOK_SECONDS = 1.0
_TELL_SECONDS = 20.0


def ready_workers(recipe: Recipe, source: Source) -> dict[str, int]:
    """What each worker is given, once the nodes that are alive have it free; `train.wait_minutes` at most.

    A node may come late: after a head was replaced, or from an autoscaler, which sees what is asked for.
    Where the chart has said what nodes there can be, what neither those nor the present ones can give is
    refused at once; on this machine's own Ray, whatever is not there now. Where after the wait there are
    fewer nodes than planned, but enough to train on, they are taken.

    Raises ConfigError("gpus-missing", "too-few-cpus"), RunError("cluster-busy").
    """
    config, ray = recipe.train, connect()
    if not on_a_cluster():
        return worker_resources(config, ray.nodes())
    planned = planned_nodes(os.environ.get("LUNGSEG_NODE_GROUPS"))
    if planned and not _can_hold(config, planned):
        if not _can_hold(config, ray.nodes()):
            worker_resources(config, planned)
        planned = []  # somebody has added nodes
    with _asked_for(config, planned) as free:
        if found := free():
            return found
        exporter, minutes = start_exporter(recipe.telemetry), config.wait_minutes
        with pushing(exporter, source, GROUP_METRICS, recipe.telemetry.push_seconds), _told() as tell:
            until = time.monotonic() + minutes * 60
            while time.monotonic() < until:
                tell(config.workers, workers_there(config, ray.nodes(), planned))
                time.sleep(_LOOK_SECONDS)
                if found := free():
                    return found
    resources = worker_resources(config, ray.nodes())
    if workers_there(config, ray.nodes(), planned) == config.workers:
        remedy = "end what else runs there (`ray job list`), or raise train.wait_minutes"
        raise RunError("cluster-busy", message=f"no room for the workers in {minutes:g} min", remedy=remedy)
    log("train").warning("after %g min fewer nodes than planned are there: going on with these", minutes)
    return resources


@contextmanager
def missing_nodes_told(config: TrainConfig, resources: dict[str, int]) -> Iterator[None]:
    """In the block, on a cluster, it is told whenever there are too few nodes for workers of these resources,
    as after one has died."""
    over = threading.Event()
    settled = config.model_copy(update={"cpus_per_worker": resources["CPU"]})
    thread = threading.Thread(target=_tell_missing, args=(settled, over), name="lungseg-nodes", daemon=True)
    if on_a_cluster():
        thread.start()
    try:
        yield
    finally:
        over.set()


def _tell_missing(config: TrainConfig, over: threading.Event) -> None:
    ray = connect()
    while not over.wait(_LOOK_SECONDS):
        with _told() as tell:
            while (there := workers_there(config, ray.nodes(), ())) < config.workers:
                tell(config.workers, there)
                if over.wait(_LOOK_SECONDS):
                    break


def _can_hold(config: TrainConfig, nodes: list[Node]) -> bool:
    try:
        return bool(worker_resources(config, nodes))
    except ConfigError:
        return False


@contextmanager
def _asked_for(config: TrainConfig, planned: list[Node]) -> Iterator[Any]:
    """In the block Ray, and its autoscaler, know what is wanted; yields a function that returns what each
    worker is given, or None as long as that is not free.

    A placement group is what Ray Train will ask for too; it is given back at the end of the block.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

    least = {"CPU": config.cpus_per_worker or 1}
    least |= {"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}
    asked: list[tuple[dict[str, int], PlacementGroup]] = []

    def free() -> dict[str, int] | None:
        nodes = ray.nodes()
        known = planned or nodes
        wanted = worker_resources(config, known) if _can_hold(config, known) else least
        if not asked or asked[-1][0] != wanted:
            give_back()
            asked.append((wanted, placement_group([wanted] * config.workers, strategy="SPREAD")))
        enough = workers_there(config, nodes, planned) == config.workers
        return wanted if enough and asked[-1][1].wait(_LOOK_SECONDS) else None

    def give_back() -> None:
        for _, group in asked:
            remove_placement_group(group)
        asked.clear()

    try:
        yield free
    finally:
        give_back()


@contextmanager
def _told() -> Iterator[Any]:
    """Yields a function that tells how many of the workers wanted are there: as a metric, and in a line
    whenever that has changed, or some time has passed."""
    began, last = time.monotonic(), (-1, -_TELL_SECONDS)

    def tell(wanted: int, there: int) -> None:
        nonlocal last
        MISSING_WORKERS.set(wanted - there)
        spent = time.monotonic() - began
        if there != last[0] or spent - last[1] >= _TELL_SECONDS:
            last = there, spent
            are = "is" if there == 1 else "are"
            have = "whose nodes are busy" if there == wanted else f"{there} {are} there"
            plural = "" if wanted == 1 else "s"
            log("train").info("waiting for %d worker%s, %s, %s", wanted, plural, have, duration(spent))

    try:
        yield tell
    finally:
        MISSING_WORKERS.set(0)
