"""What the last line says of workers that died, from what Ray says of them."""

from __future__ import annotations

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from lungseg.errors import RunError, StorageError
from lungseg.train.failure import cause_of, failure_of, may_pass

RAY_SAYS = """1 worker(s) were killed due to the node running low on memory. 
Memory on the node (IP: 10.0.0.7, ID: 41c3) was 1.52GB used / 1.56GB limit (0.974359), which exceeds the"""
DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"""


def unhealthy(cause: Exception) -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("A worker health check failed.", cause)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_worker_without_memory_is_told_with_its_limit_and_what_to_change(wrapped: bool) -> None:
    error = OutOfMemoryError(RAY_SAYS)
    found = failure_of(1, unhealthy(error) if wrapped else error)
    assert isinstance(found, RunError)
    assert found.code == "worker-out-of-memory"
    assert found.where == {"worker": 1, "node": "10.0.0.7", "used": "1.52GB", "limit": "1.56GB"}
    assert "train.global_batch" in found.remedy
    assert may_pass(found)  # another trial may have taken it


def test_a_worker_that_just_died_is_told_with_where_to_look() -> None:
    found = failure_of(0, unhealthy(RuntimeError(DIED)))
    assert isinstance(found, RunError)
    assert (found.code, found.message) == ("worker-died", DIED.splitlines()[-1])
    assert "OOMKilled" in found.remedy


def test_the_cause_of_a_group_is_ours_where_there_is_one_and_else_the_first_workers() -> None:
    ours, theirs = StorageError("store-full", remedy="free space"), ValueError("shapes differ")
    assert cause_of(WorkerGroupError("pages", {0: theirs, 1: ours})) is ours
    assert cause_of(WorkerGroupError("pages", {0: theirs})) is theirs
    assert cause_of(theirs) is theirs


def test_ray_may_end_its_controller_rather_than_a_worker() -> None:
    found = cause_of(OutOfMemoryError(RAY_SAYS))
    assert isinstance(found, RunError)
    assert (found.code, found.where["worker"]) == ("worker-out-of-memory", "controller")
