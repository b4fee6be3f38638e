"""Which checkpoint is the published one, when attempts on several data sets share a run's name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.balls import write_balls

from lungseg.config import load_recipe
from lungseg.runs.best import Best
from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.run import load_run_data, open_run
from lungseg.runs.state import TrainState
from lungseg.storage import Store, open_store

STATE = TrainState("a", 10, 1, "aa" * 32, {}, metrics={"val_dice": 0.5}, data="old")
BEST = Best.of("00000010-aa", STATE, b"network")


def scored(val_dice: float | None, manifest_sha256: str = STATE.manifest_sha256) -> TrainState:
    metrics = {} if val_dice is None else {"val_dice": val_dice}
    return replace(STATE, metrics=metrics, manifest_sha256=manifest_sha256)


def test_on_one_data_set_the_higher_dice_is_better() -> None:
    assert BEST.beaten_by(scored(0.51))
    assert not BEST.beaten_by(scored(0.5))
    assert not BEST.beaten_by(scored(None))


def test_on_other_data_any_dice_takes_the_place() -> None:
    """0.5 on other patients says nothing: they may be those that this network was trained on."""
    assert BEST.beaten_by(scored(0.01, "bb" * 32))
    assert not BEST.beaten_by(scored(None, "bb" * 32))


def test_a_network_that_nobody_validated_is_beaten_by_any_dice() -> None:
    assert replace(BEST, val_dice=None).beaten_by(scored(0.0))


def test_a_pointer_of_format_1_says_minus_one_of_what_nobody_validated() -> None:
    tree = {**vars(BEST), "val_dice": -1}
    del tree["data"]
    found = Best.from_json(tree)
    assert (found.val_dice, found.data) == (None, "")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path)


def test_a_run_begun_anew_on_other_data_is_evaluated_on_the_data_of_its_best(store: Store) -> None:
    """Else a network would be scored on the patients that it was trained on, or on the wrong grid."""
    recipe = load_recipe(None, ["model.depth=3"])
    old, new = write_balls(store, "old"), write_balls(store, "new", train=9, val=3)
    attempt = open_run(store, "r", old, recipe, "fresh").attempt
    checkpoints = Checkpoints(store, "runs/r")

    def publish(state: TrainState) -> None:
        name = checkpoints.commit(state, {"w": np.zeros(3, np.float32)}, {})
        checkpoints.publish_best(name, state, b"network")

    metrics = {"val_dice": 0.9}
    publish(TrainState(attempt, 3, 1, old.sha256, {}, metrics=metrics, data="old"))
    attempt = open_run(store, "r", new, recipe, "new").attempt
    assert load_run_data(store, "r") == old
    state = TrainState(attempt, 3, 1, new.sha256, {}, metrics={"val_dice": 0.1}, data="new")
    best = checkpoints.best()
    assert best is not None
    assert best.beaten_by(state)
    publish(state)
    assert load_run_data(store, "r") == new
