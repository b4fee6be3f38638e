"""Waiting for a job over a connection that breaks, and past the head that knew it."""

from __future__ import annotations

from typing import Any, cast

import pytest

from lungseg.errors import ConfigError
from lungseg.submit import jobs
from lungseg.submit.jobs import Job


def job(state: str, exit_code: int | None = None, began: float = 1.0) -> Job:
    return Job("train-r", "train", "r", state, began, exit_code=exit_code)


class Heads:
    """Answers one after the other; a code for a connection that is lost."""

    def __init__(self, *answers: Job | str | None) -> None:
        self._answers = list(answers)

    def find(self, verb: str, name: str) -> Job | None:
        answer = self._answers.pop(0)
        if isinstance(answer, str):
            raise ConfigError(answer, remedy="wait")
        return answer

    def logs(self, job: Job) -> str:
        return "a line\nanother\n"[: 7 if len(self._answers) > 1 else None]


def wait(heads: Heads, outcomes: tuple[int | None, ...] = (), show: Any = None) -> int:
    left = list(outcomes)
    return jobs.wait(cast("jobs.Cluster", heads), "train", "r", lambda: left.pop(0), show)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(jobs, "_NEW_HEAD_SECONDS", 0.0025)


def test_the_code_is_that_of_the_job_whatever_the_connection_did_meanwhile() -> None:
    away = jobs.UNREACHABLE
    assert wait(Heads(job("RUNNING"), away, away, job("RUNNING"), job("SUCCEEDED", 0))) == 0
    assert wait(Heads(job("FAILED", 3))) == 3
    assert wait(Heads(job("FAILED"))) == 1
    assert wait(Heads(job("FAILED", -9))) == 1
    assert wait(Heads(job("STOPPED", 130))) == 130
    with pytest.raises(ConfigError, match="cluster-refused"):
        wait(Heads("cluster-refused"))


def test_of_a_job_that_a_new_head_does_not_know_the_store_tells() -> None:
    assert wait(Heads(job("RUNNING"), jobs.UNREACHABLE, None, None), outcomes=(None, 0)) == 0


def test_a_new_head_is_given_time_until_somebody_submits_the_job_again() -> None:
    assert wait(Heads(job("RUNNING"), None, None, job("SUCCEEDED")), outcomes=(jobs.LOST,) * 2) == 0
    assert wait(Heads(job("RUNNING"), None, None, None), outcomes=(jobs.LOST,) * 3) == jobs.LOST
    assert wait(Heads(job("RUNNING"), None, job("FAILED", 3)), outcomes=(130,)) == 3
    assert wait(Heads(None), outcomes=(jobs.LOST,)) == jobs.LOST


def test_each_line_of_its_log_is_shown_once() -> None:
    shown: list[str] = []
    wait(Heads(job("RUNNING"), job("RUNNING"), job("RUNNING"), job("SUCCEEDED")), show=shown.append)
    assert "".join(shown) == "a line\nanother\n"
    again = Heads(job("RUNNING"), job("RUNNING", began=2.0), job("SUCCEEDED", began=2.0))
    shown.clear()
    wait(again, show=shown.append)
    assert "".join(shown) == "a line\na line\nanother\n"
