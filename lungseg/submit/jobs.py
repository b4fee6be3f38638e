"""Jobs of a Ray cluster, reached through its dashboard: submitted and watched."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lungseg.errors import ConfigError
from lungseg.telemetry import log

_LOOK_SECONDS = 2.0
_EXIT_CODES = {"SUCCEEDED": 0, "STOPPED": 130}
UNREACHABLE = "cluster-unreachable"
_log = log("submit")


class Cluster:
    """Raises ConfigError("cluster-address", "cluster-unreachable", "cluster-refused"). Token and TLS are
    Ray's own variables (RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_TLS_…)."""

    def __init__(self, address: str | None) -> None:
        found = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
        if not found.startswith(("http://", "https://")):
            remedy = "give --address or RAY_API_SERVER_ADDRESS the dashboard's, such as http://127.0.0.1:8265"
            raise ConfigError("cluster-address", address=found or "none", remedy=remedy)
        from ray.job_submission import JobSubmissionClient

        self.address = found
        with self._answering():
            self._client = JobSubmissionClient(found)

    def submit(self, job: str, words: Sequence[str]) -> bool:
        """Start `lungseg` with these words; False where a job of this name runs already. One that has ended
        makes room."""
        if self.running(job):
            return False
        with self._answering():
            if self.info(job) is not None:
                self._client.delete_job(job)
            try:
                entrypoint = shlex.join(["python", "-m", "lungseg.cli", *words])
                self._client.submit_job(entrypoint=entrypoint, submission_id=job)
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                return False  # somebody was quicker
        return True

    def running(self, job: str) -> bool:
        there = self.info(job)
        return there is not None and not there.status.is_terminal()

    def info(self, job: str) -> Any | None:
        """What Ray knows of a job; None where its head knows none of this name."""
        with self._answering():
            try:
                return self._client.get_job_info(job)
            except RuntimeError as error:
                if "404" not in str(error):
                    raise
                return None

    def logs(self, job: str) -> str:
        """All lines so far; none where the job's node has none yet, or no more."""
        with self._answering():
            try:
                return str(self._client.get_job_logs(job))
            except RuntimeError as error:
                _log.debug("no log of %s: %s", job, error)
                return ""

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


def job_name(verb: str, name: str) -> str:
    """One job for each verb and run (or, of `prepare`, data set): so the same is not submitted twice."""
    return f"{verb}-{name}"


def wait(
    cluster: Cluster, job: str, outcome: Callable[[], int | None], show: Callable[[str], None] | None = None
) -> int:
    """The exit code of a job, once it has ended; `show` gets what its log gains meanwhile.

    A connection that is lost is taken up again. A head that was replaced knows the job no more: then
    `outcome` is asked, which tells from the store, or has no answer yet.
    """
    shown, away = 0, False
    while True:
        try:
            info = cluster.info(job)
            if show and info is not None:
                text = cluster.logs(job)
                show(text[shown:])
                shown = max(shown, len(text))
            away = False
        except ConfigError as error:
            if error.code != UNREACHABLE:
                raise
            if not away:
                _log.warning("the cluster does not answer, and is asked again: %s", error)
            away = True
        else:
            if info is None:
                code = outcome()
                if code is not None:
                    return code
            elif info.status.is_terminal():
                return _EXIT_CODES.get(info.status.value, info.driver_exit_code or 1)
        time.sleep(_LOOK_SECONDS)
