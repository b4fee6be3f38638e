"""What the store tells of a run, whoever has gone."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.balls import write_balls

from lungseg import cli
from lungseg.config import load_recipe
from lungseg.errors import RunError, StorageError
from lungseg.runs import progress
from lungseg.runs.lease import claim
from lungseg.runs.progress import Heart, Progress
from lungseg.runs.run import open_run
from lungseg.storage import FolderStore, Store, to_json
from lungseg.submit.jobs import Job, Waiting
from lungseg.submit.status import check_committed, status_of

TRAINING = Progress(
    claim=2, doing="training", epoch=3, epochs=100, step=57, steps=600,
    loss=0.25, seconds_per_step=0.5, left_seconds=7200, told=1000.0,
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = FolderStore(tmp_path)
    open_run(opened, "r", write_balls(opened), load_recipe(None, ["model.depth=3"]), "fresh")
    return opened


def tell(store: Store, word: Progress) -> None:
    store.put("runs/r/progress.json", to_json(asdict(word)))


def test_a_run_that_trains_is_told_with_its_pace_and_the_time_that_is_left(store: Store) -> None:
    assert status_of(store, "r").lines() == ["r (train on balls): begun"]
    for driver in ("a", "b"):
        claim(store, "runs/r", driver)
    tell(store, TRAINING)
    assert status_of(store, "r", now=1010.0).lines() == [
        "r (train on balls): training",
        "  epoch 3 of 100, step 57/600, loss 0.2500, 0.50 s a step, about 2.0 h left",
        "  workers were started 2 times",
    ]


def test_a_run_that_died_without_a_word_is_lost_and_one_that_said_so_is_not(store: Store) -> None:
    tell(store, TRAINING)
    found = status_of(store, "r", now=1500.0)
    assert found.state == "lost"
    assert found.lines()[-1] == "  no word for 8 min: the same command with --resume goes on"
    tell(store, replace(TRAINING, doing="stopped"))
    assert status_of(store, "r", now=1500.0).state == "stopped"
    tell(store, replace(TRAINING, doing="failed", error="loss-not-finite (run=r). Remedy: …"))
    assert status_of(store, "r", now=1500.0).lines()[-1] == "  loss-not-finite (run=r). Remedy: …"


JOB = Job("train-r", "train", "r", "RUNNING", began=900.0)
TOLD_AT = 1000.0  # TRAINING's
WAITS = Waiting("1 x 2 CPU", 1040.0)


@pytest.mark.parametrize(
    ("state", "job", "waits"),
    [
        ("training", JOB, None),
        ("starting", replace(JOB, began=1005.0), None),
        ("waiting", replace(JOB, began=1005.0), WAITS),
        ("lost", replace(JOB, state="FAILED", ended=1001.0, exit_code=-9), None),
        ("failed", replace(JOB, state="FAILED", ended=1001.0, exit_code=2, message="…\nwhy\n"), None),
        ("stopped", replace(JOB, state="STOPPED", ended=1001.0), None),
        ("training", replace(JOB, state="FAILED", began=100.0, ended=110.0), None),  # by others, since
    ],
)
def test_a_run_and_its_job_are_one_truth(store: Store, state: str, job: Job, waits: Waiting | None) -> None:
    tell(store, replace(TRAINING, told=TOLD_AT))
    found = status_of(store, "r", job, waits, now=1050.0)
    assert found.state == state
    assert ("  why" in found.lines()) == (state == "failed")


def test_a_job_that_has_not_begun_its_run_says_what_it_waits_for(store: Store) -> None:
    assert status_of(store, "new", replace(JOB, name="new", id="train-new"), WAITS, now=1050.0).lines() == [
        "new (train): waiting",
        "  job train-new: RUNNING for 2 min, waits for 1 x 2 CPU since 10 s",
    ]


def test_who_was_ended_in_mid_step_is_told_from_who_committed_it(store: Store) -> None:
    tell(store, TRAINING)
    trains = status_of(store, "r", now=1050.0)
    with pytest.raises(RunError, match="stopped-uncommitted"):
        check_committed(trains, trains)
    tell(store, replace(TRAINING, doing="stopped"))
    check_committed(trains, status_of(store, "r", now=1050.0))


def test_for_programs_it_is_json(store: FolderStore, capsys: pytest.CaptureFixture[str]) -> None:
    tell(store, TRAINING)
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", "--store", str(store.root), "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["state"], found["progress"]["step"]) == ("r", "lost", 57)


def test_a_heart_beats_while_its_writer_lives_and_never_over_the_word_of_who_took_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "BEAT_SECONDS", 0.01)
    heart = Heart(store, "runs/r", claim(store, "runs/r", "a").number)
    heart.start()
    heart.tell(doing="training", step=3)
    deadline = time.monotonic() + 30
    while (word := Progress.read(store, "runs/r")) is None or word.step != 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert time.time() - word.told < 30
    claim(store, "runs/r", "b")
    told = -1.0
    while told != (told := Progress.read(store, "runs/r").told):  # the beat under way may still come
        time.sleep(0.5)
    tell(store, replace(TRAINING, doing="training"))
    heart.end("failed", "run-taken-over")
    assert Progress.read(store, "runs/r") == TRAINING


def test_a_store_that_is_away_costs_a_heart_its_beats_only(store: FolderStore) -> None:
    class Away(FolderStore):
        def put(self, key: str, data: bytes | Path) -> None:
            raise StorageError("store-unreachable", remedy="wait")

    heart = Heart(Away(store.root), "runs/r", 1)
    heart.start()
    heart.end("ended")
    assert Progress.read(store, "runs/r") is None
