"""A sweep's record without Ray: what it draws, keeps and takes up again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from helpers.balls import write_balls

from lungseg.config import Recipe, load_recipe
from lungseg.errors import ConfigError, RunError
from lungseg.runs.run import open_run
from lungseg.storage import FolderStore
from lungseg.tune.earlier import earlier_trials
from lungseg.tune.promote import drop_losers, winner
from lungseg.tune.trials import Trials, front

ROOT = "runs/sweep"
SETTINGS = (
    "tune.space.model.width={range: [2, 64]}",
    "tune.space.model.depth={choice: [2, 3]}",
    "tune.grace_epochs=1",
    "tune.reduction_factor=2",
)


def opened(folder: Path, *settings: str) -> Trials:
    """A driver's view of the sweep, with a working folder of its own."""
    work = folder / f"driver{len(list(folder.iterdir()))}"
    work.mkdir()
    return Trials(FolderStore(folder / "store"), ROOT, load_recipe(None, [*SETTINGS, *settings]), work)


def fine(recipe: Recipe) -> None:
    """A check that takes any recipe."""


def run(trials: Trials, *dices: float) -> int:
    """A trial with these scores after its epochs, which ends where it is told to."""
    number = trials.begin(fine).number
    for epoch, dice in enumerate(dices, 1):
        if not trials.report(number, epoch, dice, epoch * 60.0):
            trials.end(number, "pruned")
            return number
    trials.end(number, "complete")
    return number


def test_the_next_driver_goes_on_with_the_interrupted_trial_and_knows_the_others(tmp_path: Path) -> None:
    first = opened(tmp_path)
    done = run(first, 0.1, 0.4)
    failed = first.begin(fine)
    first.end(failed.number, "fail", "loss-not-finite")
    interrupted = first.begin(fine)
    first.report(interrupted.number, 1, 0.3, 60.0)
    second = opened(tmp_path)
    assert second.all() == first.all()
    assert second.to_come(3) == 2
    epochs = [{"epoch": n, "val_dice": dice, "seconds": 60.0 * n} for n, dice in ((1, 0.3), (2, 0.35))]
    unheard = "".join(json.dumps(epoch) + "\n" for epoch in epochs)
    trial_root = f"{ROOT}/trials/{interrupted.name}"
    FolderStore(tmp_path / "store").put(f"{trial_root}/metrics.jsonl", unheard.encode())
    again = second.begin(fine)
    assert (again.number, again.values) == (interrupted.number, interrupted.values)
    assert (again.curve, again.seconds) == ({1: 0.3, 2: 0.35}, 120.0)
    with warnings.catch_warnings(action="error"):
        second.report(again.number, 2, 0.35, 120.0)  # by a run that had ended, and is started again
    assert second.begin(fine).values not in [trial.values for trial in first.all()]
    lines = (tmp_path / "store" / ROOT / "trials.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [row["state"] for row in kept] == ["complete", "fail", "running", "running"]
    assert (kept[done]["val_dice"], kept[done]["seconds"]) == (0.4, 120.0)
    assert kept[failed.number]["error"] == "loss-not-finite"
    with pytest.raises(RunError, match="run-taken-over"):
        first.report(interrupted.number, 2, 0.5, 120.0)


def test_a_trial_that_others_have_left_behind_is_stopped_also_by_the_next_driver(tmp_path: Path) -> None:
    first = opened(tmp_path)
    for _ in range(3):
        run(first, 0.5, 0.6)
    second = opened(tmp_path)
    number = run(second, 0.1, 0.9)
    assert (second.all()[number].state, second.all()[number].curve) == ("pruned", {1: 0.1})
    unstopped = opened(tmp_path, "tune.pruner=none")
    number = run(unstopped, 0.1, 0.2)
    assert unstopped.all()[number].state == "complete"


def test_draws_that_cannot_train_are_kept_with_the_reason_and_cost_no_trial(tmp_path: Path) -> None:
    trials = opened(tmp_path)

    def shallow(recipe: Recipe) -> None:
        if recipe.model.depth == 3:
            raise ConfigError("patch-shape", remedy="lower model.depth")

    for _ in range(8):
        assert trials.begin(shallow).values["model.depth"] == 2
    refused = [trial for trial in trials.all() if trial.state == "fail"]
    assert refused
    assert all("patch-shape" in trial.error for trial in refused)

    def never(recipe: Recipe) -> None:
        raise ConfigError("patch-shape", remedy="lower model.depth")

    with pytest.raises(ConfigError, match=r"space-untrainable.*lower model\.depth"):
        trials.begin(never)


def test_the_best_are_repeated_with_other_seeds_and_the_best_mean_wins(tmp_path: Path) -> None:
    trials = opened(tmp_path, "tune.seeds=3", "tune.seeds_best=2", "tune.pruner=none")
    lucky, steady, poor = (run(trials, dice) for dice in (0.9, 0.8, 0.1))
    assert winner(trials.all()) == trials.all()[lucky]
    assert trials.repeat_best() == 4
    later = opened(tmp_path, "tune.seeds=3", "tune.seeds_best=2", "tune.pruner=none")
    assert later.repeat_best() == 4  # none is queued twice
    for _ in range(4):
        trial = later.begin(fine)
        of = next(t for t in later.all() if t.values == trial.values and not t.repeats)
        assert trial.repeats
        assert of.number in (lucky, steady)
        later.report(trial.number, 1, 0.2 if of.number == lucky else 0.79, 60.0)
        later.end(trial.number, "complete")
    seeds = {(t.values["model.width"], t.seed) for t in later.all() if t.values != later.all()[poor].values}
    assert len(seeds) == 6
    assert later.repeat_best() == 0
    assert later.to_come(3) == 0
    assert winner(later.all()) == later.all()[steady]


def test_cma_es_draws_from_what_it_has_seen(tmp_path: Path) -> None:
    """After its first population the draws gather where the scores are high."""
    space = "tune.space={loss.focal_gamma: {range: [0.0, 5.0]}, optimizer.power: {range: [0.1, 2.0]}}"
    trials = opened(tmp_path, space, "tune.sampler=cmaes", "tune.pruner=none")
    for _ in range(36):
        trial = trials.begin(fine)
        away = abs(trial.values["loss.focal_gamma"] - 2.0) + abs(trial.values["optimizer.power"] - 1.0)
        trials.report(trial.number, 1, 1.0 - away / 10, 60.0)
        trials.end(trial.number, "complete")
    dices = [trial.val_dice or 0.0 for trial in trials.all()]
    assert sum(dices[-12:]) > sum(dices[:12])


def test_with_two_objectives_none_is_stopped_and_the_front_is_what_none_beats_in_both(tmp_path: Path) -> None:
    two = ("tune.scan_seconds=true", "tune.pruner=none")
    trials, store = opened(tmp_path, *two), FolderStore(tmp_path / "store")
    for dice, seconds in ((0.6, 9.0), (0.5, 3.0), (0.4, 5.0), (0.7, 9.0), (0.2, 1.0), (0.5, 3.0)):
        number = len(trials.all())
        store.put_json(f"{ROOT}/trials/{number:04d}/scan-seconds.json", seconds)
        assert run(trials, dice / 2, dice) == number
    trials.begin(fine)  # has no answer yet
    assert [trial.number for trial in front(trials.all())] == [4, 1, 3]
    assert [trial.scan_seconds for trial in front(trials.all())] == [1.0, 3.0, 9.0]
    assert winner(trials.all()) == trials.all()[3]
    assert trials.all()[3].curve == {1: 0.35, 2: 0.7}
    with warnings.catch_warnings(action="error"):
        assert trials.importances().keys() == {"model.width", "model.depth"}
    assert opened(tmp_path, *two).all() == trials.all()
    for number in range(6):
        store.put(f"{ROOT}/trials/{number:04d}/checkpoints/a", b"weights")
    drop_losers(store, ROOT, trials.all(), keep=1)
    kept = [item.key for item in store.find(f"{ROOT}/trials/") if item.key.endswith("/checkpoints/a")]
    assert [key.split("/")[-3] for key in kept] == ["0001", "0003", "0004"]


@pytest.mark.parametrize("setting", ["tune.pruner=asha", "tune.sampler=cmaes"])
def test_a_second_objective_is_refused_where_optuna_has_none(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"second objective, scan_seconds"):
        load_recipe(None, ["tune.scan_seconds=true", "tune.pruner=none", setting])


def test_a_sweep_begins_with_what_an_earlier_one_has_found(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = write_balls(store)
    open_run(store, "sweep", manifest, load_recipe(None, [*SETTINGS, "model.depth=2"]), "fresh", kind="tune")
    old = opened(tmp_path, "tune.pruner=none")
    for dice in (0.1, 0.2, 0.3, 0.4):
        run(old, dice)
    failed = old.begin(fine)
    old.end(failed.number, "fail", "loss-not-finite")
    inside = [t for t in old.all() if t.ended and t.values["model.depth"] == 2]
    recipe = load_recipe(None, [*SETTINGS, "tune.space.model.depth={choice: [2, 4]}"])
    known = earlier_trials(store, "sweep", manifest, recipe)
    assert [trial.user_attrs["values"] for trial in known] == [trial.values for trial in inside]
    (tmp_path / "work").mkdir()
    new = Trials(store, "runs/new", recipe, tmp_path / "work")
    new.learn(known)
    new.learn(known)  # as by --resume
    assert [(t.state, t.val_dice) for t in new.all()] == [("earlier", t.val_dice) for t in inside]
    assert (winner(new.all()), new.to_come(3), new.repeat_best()) == (None, 3, 0)
    assert new.begin(fine).number == len(inside)
    for other in (
        "tune.space={loss.focal_gamma: {range: [1, 2]}}",
        "tune.space.model.width={range: [65, 66]}",
    ):
        with pytest.raises(RunError, match=r"warm-start-differs.*none of its 5 trials"):
            earlier_trials(store, "sweep", manifest, load_recipe(None, [*SETTINGS[1:], other]))
    with pytest.raises(RunError, match=r"warm-start-differs.*searched on balls"):
        earlier_trials(store, "sweep", write_balls(store, train=6), recipe)
