"""Waiting for a job over a connection that breaks, and past the head that knew it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from lungseg.errors import ConfigError
from lungseg.submit import jobs


@dataclass
class Info:
    """As much as is looked at of what Ray knows of a job."""

    state: str
    driver_exit_code: int | None = None

    @property
    def status(self) -> Any:
        from ray.job_submission import JobStatus

        return JobStatus(self.state)


class Heads:
    """Answers one after the other; "away" for a connection that is lost."""

    def __init__(self, *answers: Info | str | None) -> None:
        self._answers = list(answers)

    def info(self, job: str) -> Info | None:
        answer = self._answers.pop(0)
        if isinstance(answer, str):
            raise ConfigError(answer, remedy="wait")
        return answer

    def logs(self, job: str) -> str:
        return "a line\nanother\n"[: 7 if len(self._answers) > 1 else None]


def wait(heads: Heads, outcomes: tuple[int | None, ...] = (), show: Any = None) -> int:
    left = list(outcomes)
    return jobs.wait(cast("jobs.Cluster", heads), "train-r", lambda: left.pop(0), show)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_LOOK_SECONDS", 0.0)


def test_the_code_is_that_of_the_job_whatever_the_connection_did_meanwhile() -> None:
    away = jobs.UNREACHABLE
    assert wait(Heads(Info("RUNNING"), away, away, Info("RUNNING"), Info("SUCCEEDED", 0))) == 0
    assert wait(Heads(Info("FAILED", 3))) == 3
    assert wait(Heads(Info("FAILED"))) == 1
    assert wait(Heads(Info("STOPPED", 130))) == 130
    with pytest.raises(ConfigError, match="cluster-refused"):
        wait(Heads("cluster-refused"))


def test_of_a_job_that_a_new_head_does_not_know_the_store_tells() -> None:
    assert wait(Heads(Info("RUNNING"), jobs.UNREACHABLE, None, None), outcomes=(None, 0)) == 0


def test_each_line_of_its_log_is_shown_once() -> None:
    shown: list[str] = []
    wait(Heads(Info("RUNNING"), Info("RUNNING"), Info("RUNNING"), Info("SUCCEEDED")), show=shown.append)
    assert "".join(shown) == "a line\nanother\n"
