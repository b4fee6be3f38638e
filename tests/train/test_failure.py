"""What the last line says of workers that died, from what Ray says of them."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from lungseg.errors import RunError, StorageError
from lungseg.exporter import Source
from lungseg.train.failure import cause_of, failure_of, may_pass, node_was_taken
from lungseg.train.job import DRAINS, LEFT
from lungseg.train.launch import _watcher
from lungseg.train.worker import _leave

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


def test_a_node_that_is_taken_away_costs_no_failure_and_workers_that_die_do_till_there_are_too_many() -> None:
    watcher = _watcher(1, None, Source("r", "", ""))
    left = RunError(LEFT, message="step 3 is committed", node=DRAINS, remedy="--resume")
    died = unhealthy(RuntimeError(DIED))
    taken = unhealthy(ActorDiedError())
    taken.health_check_failure._preempted = True
    for error in (left, taken, left, died, left):
        watcher.after_exception(None, {0: error})
    with pytest.raises(RunError, match="worker-died"):
        watcher.after_exception(None, {0: ValueError("a peer is gone"), 1: died})
    theirs = ValueError("shapes differ")
    with pytest.raises(ValueError, match="shapes differ"):
        _watcher(0, None, Source("r", "", "")).after_exception(None, {0: theirs})
    assert cause_of(ControllerError(theirs)) is theirs


def test_a_worker_leaves_a_node_that_drains_at_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for drain, where in (
        (None, {}),
        (PreemptionInfo(deadline_ms=2**62, preempted_node_to_ranks={"n": [0]}), {"node": DRAINS}),
    ):
        monkeypatch.setattr("lungseg.train.worker._drain", lambda drain=drain: drain)
        with pytest.raises(RunError, match="step 3 is committed") as caught:
            _leave(3)
        assert caught.value.where == where
        assert node_was_taken(caught.value) == bool(where)


def test_ray_may_end_its_controller_rather_than_a_worker() -> None:
    found = cause_of(OutOfMemoryError(RAY_SAYS))
    assert isinstance(found, RunError)
    assert (found.code, found.where["worker"]) == ("worker-out-of-memory", "controller")
