"""What tests see of a run through Ray from outside: its workers, its objects, where it ended."""

from __future__ import annotations

import json
import time
from typing import Any


def manifests(balls: Any, run: str) -> list[str]:
    return [item.key for item in balls.store.find(f"runs/{run}/") if item.key.endswith("/manifest.json")]


def actors(below: int | None = None) -> dict[int, str]:
    """Class of each actor by its process, below this process or another: other sessions have theirs."""
    import ray  # noqa: F401  # whose copy it is
    import psutil  # isort: skip

    found = {}
    for process in psutil.Process(below).children(recursive=True):
        try:
            # Ray names a busy actor Class.method, an idle one Class.
            kind, _, name = process.cmdline()[0].partition("::")
        except (psutil.Error, IndexError):
            continue  # it ended while we looked
        if kind == "ray":
            found[process.pid] = name.partition(".")[0]
    return found


def train_workers(below: int | None = None) -> set[int]:
    return {pid for pid, name in actors(below).items() if name == "RayTrainWorker"}


def tell_ray_that_a_node_drains(node: str, seconds: int) -> None:
    """As its autoscaler would: the node is to be gone in so many seconds."""
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = (time.time_ns() // 1_000_000) + 1000 * seconds
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why = gcs.drain_node(node, reason, "a test", deadline_ms)
    assert accepted, why


def assert_same_end(balls: Any, run: str, undisturbed: str) -> None:
    """Bit for bit: a resumed run restores weights, optimiser and place, and draws by (seed, step, row)."""
    expected, found = balls.final(undisturbed), balls.final(run)
    assert found.state.epoch == expected.state.epoch
    for part in ("weights", "optimizer"):
        wanted, got = getattr(expected, part), getattr(found, part)
        assert wanted.keys() == got.keys()
        assert [path for path in wanted if wanted[path].tobytes() != got[path].tobytes()] == []
    assert [line["epoch"] for line in lines(balls, run)] == [1, 2, 3, 4]
    losses = [[line["loss"] for line in lines(balls, name)] for name in (run, undisturbed)]
    assert losses[0] == losses[1]


def lines(balls: Any, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in balls.store.get(f"runs/{run}/metrics.jsonl").decode().splitlines()]
