"""Why a worker failed, in one line that says what to change. Needs no Ray: its errors in, ours out."""

from __future__ import annotations

import re

from lungseg.errors import LungsegError, RunError, StorageError
from lungseg.train.job import DRAINS, LEFT

_NODE_FULL = re.compile(
    r"Memory on the node \(IP: (?P<node>[^,)]+).*? was (?P<used>\S+) used / (?P<limit>\S+) limit"
)
_LESS = "or lower train.global_batch, model.width or data.patch_shape"


def may_pass(error: LungsegError) -> bool:
    """Whether starting the workers again may help."""
    gone = error.code in (LEFT, "worker-died", "worker-out-of-memory")
    return gone or (isinstance(error, StorageError) and error.code != "store-full")


def node_was_taken(error: BaseException) -> bool:
    """Whether the worker left, or died, because its node was to go: on Kubernetes, its pod was deleted."""
    ours = LungsegError.find_in(error)
    died = getattr(error, "health_check_failure", error)
    return ours.where.get("node") == DRAINS if ours else getattr(died, "preempted", False)


def failure_of(rank: int | str, error: BaseException) -> LungsegError | None:
    """What is known of a worker's end as an error of ours, or None for an error of the training's own code.

    Ray ends a worker whose node has no memory left and says so; whoever else kills a process, as Linux does
    at a container's limit, leaves no more than the end of its connection.
    """
    ours = LungsegError.find_in(error)
    if ours:
        return ours
    told = str(getattr(error, "health_check_failure", None) or error)
    full = _NODE_FULL.search(told)
    if full:
        remedy = f"give the workers' nodes or pods more memory (workers[].memory in the chart), {_LESS}"
        where = {"worker": rank, "node": full["node"], "used": full["used"], "limit": full["limit"]}
        return RunError("worker-out-of-memory", message="Ray ended it at its limit", **where, remedy=remedy)
    if type(error).__name__ == "ResourceExhaustedError":
        remedy = f"train on GPUs with more memory, {_LESS}"
        return RunError("gpu-out-of-memory", worker=rank, message=_first_line(told), remedy=remedy)
    if hasattr(error, "health_check_failure"):
        remedy = (
            "see whether its pod is gone or was OOMKilled (kubectl describe pod): if so, give it more memory"
        )
        return RunError("worker-died", worker=rank, message=_reason(told), remedy=f"{remedy}, {_LESS}")
    return None


def _reason(told: str) -> str:
    """Of what Ray says of a dead actor the line that tells why."""
    lines = [line.strip() for line in told.splitlines()]
    telling = [
        line for line in lines if line.startswith(("The actor", "The node", "Worker exit", "The leased"))
    ]
    return (telling or lines)[-1][:200]


def cause_of(error: BaseException) -> BaseException:
    """What ended a training, among what Ray wrapped around it: an error of ours, else the first worker's."""
    workers: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    ours = [failure_of(rank, one) for rank, one in workers.items()]
    raised = getattr(error, "controller_failure", None)  # by our own callback
    known = [one for one in (*ours, LungsegError.find_in(error), *workers.values(), raised) if one]
    return known[0] if known else failure_of("controller", error) or error


def last_line(error: BaseException) -> str:
    """Of a remote traceback it names the error."""
    return str(error).strip().rpartition("\n")[2]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]
