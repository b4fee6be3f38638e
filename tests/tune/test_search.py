"""A search over real Ray Train runs: more trials than places, of which some are stopped early."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import pytest
from helpers.balls import write_balls
from helpers.scraping import Endpoint

from lungseg.config import load_recipe
from lungseg.errors import RunError
from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.run import load_run, pull_best
from lungseg.storage import Store, open_store
from lungseg.tune.promote import Trial
from lungseg.tune.search import tune

TRIALS, EPOCHS = 3, 2
SETTINGS = [
    "model.depth=2",
    "train.global_batch=2",
    f"train.epochs={EPOCHS}",
    "train.cpus_per_worker=1",
    "train.precision=float32",
    "tune.width=[2, 3]",
    "train.steps_per_epoch=15",
    "optimizer.warmup_steps=2",
    "tune.learning_rate=[0.03, 0.1]",
    "tune.grace_epochs=1",
    "tune.reduction_factor=2",
]
RECIPE = load_recipe(None, SETTINGS)


@pytest.fixture(scope="module")
def searched(endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Trial]]:
    store = open_store(tmp_path_factory.mktemp("store"))
    write_balls(store, train=6, val=3)
    return store, tune(store, "balls", "search", load_recipe(None, [*SETTINGS, *endpoint.settings]), TRIALS)


@pytest.mark.slow
def test_every_trial_gets_its_turn_and_the_table_is_sorted(searched: tuple[Store, list[Trial]]) -> None:
    store, trials = searched
    assert len({trial.trial for trial in trials}) == TRIALS
    assert trials[0].val_dice > 0.3
    assert [t.val_dice for t in trials] == sorted((t.val_dice for t in trials), reverse=True)
    assert all(1 <= t.epochs <= EPOCHS for t in trials)
    assert max(t.epochs for t in trials) == EPOCHS
    for trial in trials:
        assert 0.03 <= trial.learning_rate <= 0.1
        assert trial.loss in RECIPE.tune.loss
        assert trial.width in RECIPE.tune.width
    assert store.get_json("runs/search/trials.json") == [asdict(trial) for trial in trials]


@pytest.mark.slow
def test_the_best_trials_checkpoint_is_the_best_of_the_run(
    searched: tuple[Store, list[Trial]], tmp_path: Any
) -> None:
    from lungseg.runs.export import load_best

    store, (won, *_) = searched
    best, trial = load_best(store, "search"), Checkpoints(store, f"runs/search/trials/{won.trial}")
    assert best.recipe.model.width == won.width
    assert best.recipe.loss.name == won.loss
    assert best.recipe.optimizer.learning_rate == won.learning_rate
    expected = trial.read_best()
    for variable in best.network.weights:
        assert variable.numpy().tobytes() == expected.weights[variable.path].tobytes()
    assert pull_best(store, "search", tmp_path / "out").val_dice == won.val_dice
    assert load_run(store, "search").kind == "tune"


@pytest.mark.slow
def test_prometheus_sees_each_trial_by_its_name(
    searched: tuple[Store, list[Trial]], endpoint: Endpoint
) -> None:
    found = endpoint.scrape()
    shown = {trial for name, run, trial, _ in found if (name, run) == ("lungseg_val_dice", "search")}
    assert shown == {trial.trial for trial in searched[1]}
    for trial in searched[1]:
        # Tune kills a trial that it stops, within the next epoch at the earliest.
        assert 15 <= found["lungseg_step_seconds_count", "search", trial.trial, "0"] <= 15 * EPOCHS
        assert found["lungseg_patches_total", "search", trial.trial, "0"] >= 30
        # What Tune stops may have ended one more epoch than the table tells of.
        last = found["lungseg_val_dice", "search", trial.trial, "0"]
        assert 0 <= last <= (trial.val_dice if trial.epochs == EPOCHS else 1)


@pytest.mark.slow
def test_all_cores_are_free_again(searched: tuple[Store, list[Trial]], ray_cluster: Any) -> None:
    """Also those of trials that were stopped; Ray counts a few seconds late."""
    for _ in range(100):
        if ray_cluster.available_resources().get("CPU") == ray_cluster.cluster_resources()["CPU"]:
            return
        time.sleep(0.2)
    raise AssertionError(ray_cluster.available_resources())


@pytest.mark.slow
def test_a_search_does_not_take_the_name_of_a_run(searched: tuple[Store, list[Trial]]) -> None:
    with pytest.raises(RunError, match="run-exists"):
        tune(searched[0], "balls", "search", RECIPE, 1)
