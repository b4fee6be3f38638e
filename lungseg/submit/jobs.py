"""Jobs of a Ray cluster, reached through its dashboard: submitted, watched and stopped."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lungseg.errors import ConfigError
from lungseg.telemetry import log

VERBS = ("train", "tune", "fit-post", "evaluate", "prepare")
ADDRESS = "RAY_API_SERVER_ADDRESS"
UNREACHABLE = "cluster-unreachable"
LOST = 1
"""The exit code of who waits for what died without a word."""
_NEW_HEAD_SECONDS = 120.0
_LOOK_SECONDS = 2.0
_ANSWER_SECONDS = 60
_ENTRY = re.compile(rf"(?:lungseg(?:\.cli)?(?:\s+-\w+)*\s+|jobs/)({'|'.join(VERBS)})\b")
_log = log("submit")


@dataclass(frozen=True)
class Waiting:
    """What a job waits for, and since when (Unix time)."""

    wanted: str
    since: float


@dataclass(frozen=True)
class Job:
    """What Ray knows of a job. `state` is PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; `began` and `ended`
    are Unix times; `name` is a run's, or of `prepare` a data set's; `ray_id` its driver's, once there is one;
    `message` is Ray's, which of a failed job ends with the last lines of its log."""

    id: str
    verb: str
    name: str
    state: str
    began: float
    ended: float | None = None
    exit_code: int | None = None
    message: str = ""
    ray_id: str | None = None

    @property
    def over(self) -> bool:
        return self.state in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def died(self) -> bool:
        """Whether its command was killed, with the head or by itself: it had no code of its own to leave."""
        return self.state == "FAILED" and not (self.exit_code and self.exit_code > 0)

    @property
    def code(self) -> int:
        """The exit code of who waits for it."""
        own = LOST if self.died else self.exit_code or 1
        return {"SUCCEEDED": 0, "STOPPED": 130}.get(self.state, own)


class Cluster:
    """Token and TLS are Ray's own variables: RAY_AUTH_MODE, RAY_AUTH_TOKEN; RAY_TLS_CA_CERT for https.

    Raises ConfigError("cluster-address", "cluster-certificate", "cluster-unreachable", "cluster-refused").
    """

    def __init__(self, address: str | None) -> None:
        found = address or os.environ.get(ADDRESS) or os.environ.get("RAY_ADDRESS") or ""
        if not found.startswith(("http://", "https://")):
            remedy = f"give --address or {ADDRESS} the dashboard's, such as http://127.0.0.1:8265"
            raise ConfigError("cluster-address", address=found or "none", remedy=remedy)
        self.address = os.environ[ADDRESS] = found.rstrip("/")  # by which Ray overrules what it is given
        verify = os.environ.get("RAY_TLS_CA_CERT") or True
        with self._answering():
            self._client = _client_class()(found, verify=verify)

    @property
    def ray_version(self) -> str:
        return str(self._told("/api/version")["ray_version"])

    @property
    def asks_for_token(self) -> bool:
        return bool(self._told("/api/authentication_mode")["authentication_mode"] == "token")

    def _told(self, endpoint: str) -> Any:
        with self._answering():
            return self._client._do_request("GET", endpoint).json()

    def submit(self, verb: str, name: str, words: Sequence[str]) -> str | None:
        """Start `lungseg` with these words; the job's id, or None where such a job runs already.

        Ids are counted, and Ray gives each once: of two who submit at the same moment one gets it.
        """
        same = [job for job in self.jobs() if (job.verb, job.name) == (verb, name)]
        if any(not job.over for job in same):
            return None
        entrypoint, job_id = shlex.join(["python", "-m", "lungseg.cli", *words]), _id(verb, name, same)
        try:
            with self._answering():
                return str(self._client.submit_job(entrypoint=entrypoint, submission_id=job_id))
        except (RuntimeError, ConfigError):  # somebody was quicker, or only the answer was lost
            there = self.find(verb, name)
            if there is None or there.over:
                raise
            return None

    def jobs(self) -> list[Job]:
        """All that run one of `VERBS`, however they were submitted, in the order in which they began."""
        with self._answering():
            told = self._client.list_jobs()
        found = (_job(details) for details in told if details.submission_id)
        return sorted((job for job in found if job), key=lambda job: job.began)

    def find(self, verb: str, name: str) -> Job | None:
        """The newest; None where the head knows none of this name, as one that was replaced."""
        return next((job for job in reversed(self.jobs()) if (job.verb, job.name) == (verb, name)), None)

    def stop(self, job: Job) -> None:
        """Ask it to end, as `ray job stop` does."""
        with self._answering():
            self._client.stop_job(job.id)

    def logs(self, job: Job) -> str:
        """All lines so far; none where the job's node has none yet, or no more."""
        with self._answering():
            try:
                return str(self._client.get_job_logs(job.id))
            except RuntimeError as error:
                _log.debug("no log of %s: %s", job.id, error)
                return ""

    def waits(self, job: Job) -> Waiting | None:
        """What a job's workers are not given yet, or the job itself."""
        if job.state == "PENDING":
            return Waiting("its start", job.began)
        if job.over or job.ray_id is None:
            return None
        from ray.util.state import list_placement_groups
        from ray.util.state.exception import RayStateApiException

        pending: list[Any] = [("state", "!=", "REMOVED"), ("state", "!=", "CREATED")]
        mine = [("creator_job_id", "=", job.ray_id), *pending]
        try:
            groups = list_placement_groups(self.address, filters=mine, detail=True, timeout=_ANSWER_SECONDS)
        except (RayStateApiException, OSError) as error:
            _log.debug("Ray does not tell what %s waits for: %s", job.id, error)
            return None
        if not groups:
            return None
        bundles = [_resources(bundle["unit_resources"]) for bundle in groups[0].bundles or []]
        wanted = ", ".join(f"{bundles.count(one)} x {one}" for one in dict.fromkeys(bundles))
        since = int((groups[0].stats or {}).get("creation_request_received_ns", 0)) / 1e9
        return Waiting(wanted, since or job.began)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError
        from requests import RequestException

        try:
            yield
        except AuthenticationError as error:
            remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's"
            raise ConfigError("cluster-refused", address=self.address, remedy=remedy) from error
        except (RequestException, ConnectionError) as error:
            remedy = "see that the cluster runs, and that a port-forward to its port 8265 does"
            raise ConfigError(UNREACHABLE, address=self.address, remedy=remedy) from error
        except FileNotFoundError as error:
            remedy = "let RAY_TLS_CA_CERT name the certificate of the cluster's authority"
            raise ConfigError("cluster-certificate", message=str(error), remedy=remedy) from error
        except RuntimeError as error:
            if "status code 5" not in str(error):
                raise
            remedy = "its head may have just begun: try again in a minute"
            raise ConfigError(UNREACHABLE, address=self.address, remedy=remedy) from error


def _client_class() -> Any:
    """Ray's own, which would wait for ever for a connection that is cut without a word."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **keywords: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=_ANSWER_SECONDS, **keywords)

    return Client


def _id(verb: str, name: str, earlier: Sequence[Job]) -> str:
    """No name has a colon: so these are nobody else's."""
    return f"{verb}-{name}" + (f":{len(earlier) + 1}" if earlier else "")


def _job(details: Any) -> Job | None:
    """None for a job that is none of ours. Several runs have one name, as those who evaluate them say it."""
    from lungseg.runs.ensemble import ensemble_name

    verb = _ENTRY.search(details.entrypoint)
    words = [word.strip("'\"") for word in re.split(r"[\s=]+", details.entrypoint)]
    flag = "--data" if verb and verb[1] == "prepare" else "--run"
    names = [name for word, name in pairwise(words) if word == flag]
    if verb is None or not names:
        return None
    return Job(
        id=details.submission_id,
        verb=verb[1],
        name=ensemble_name(names),
        state=details.status.value,
        began=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        message=details.message or "",
        ray_id=details.job_id,
    )


def _resources(unit: dict[str, float]) -> str:
    return " ".join(f"{amount:g} {kind}" for kind, amount in sorted(unit.items()))


def wait(
    cluster: Cluster,
    verb: str,
    name: str,
    outcome: Callable[[], int | None],
    show: Callable[[str], None] | None = None,
) -> int:
    """The exit code of a job, once it has ended; `show` gets what its log gains meanwhile.

    A connection that is lost is taken up again. A head that was replaced knows the job no more: then
    `outcome` is asked, which tells from the store, or has no answer yet. That a run came to no good end is
    believed once nobody has submitted it to the new head for a while: the word may be of an earlier job.
    """
    seen, away, unknown_seconds = False, False, 0.0
    follow = _Log(cluster, show)
    while True:
        try:
            job = cluster.find(verb, name)
            if job:
                follow(job)
            away = False
        except ConfigError as error:
            if error.code != UNREACHABLE:
                raise
            if not away:
                _log.warning("the cluster does not answer, and is asked again: %s", error)
            away = True
        else:
            seen, unknown_seconds = seen or job is not None, 0.0 if job else unknown_seconds + _LOOK_SECONDS
            code = outcome() if job is None else job.code if job.over else None
            may_come = job is None and seen and code != 0 and unknown_seconds < _NEW_HEAD_SECONDS
            if code is not None and not may_come:
                return code
        time.sleep(_LOOK_SECONDS)


class _Log:
    """Shows each line of a job once, of the next job of the same name from its first."""

    def __init__(self, cluster: Cluster, show: Callable[[str], None] | None) -> None:
        self._cluster, self._show = cluster, show
        self._of, self._shown = ("", 0.0), 0

    def __call__(self, job: Job) -> None:
        if self._show is None:
            return
        text = self._cluster.logs(job)
        shown = self._shown if (job.id, job.began) == self._of else 0
        self._show(text[shown:])
        self._of, self._shown = (job.id, job.began), max(shown, len(text))
