"""A search over real Ray Train runs: its driver is killed, and another one ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.balls import write_balls
from helpers.scraping import Endpoint

from lungseg.config import load_recipe
from lungseg.errors import ConfigError, RunError
from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.run import load_run, pull_best
from lungseg.storage import Store, open_store
from lungseg.submit.status import status_of
from lungseg.train.stop import is_marked
from lungseg.tune.search import tune
from lungseg.tune.trials import Trial

TRIALS, EPOCHS, STEPS = 4, 2, 15
SETTINGS = [
    "model.depth=2",
    "train.global_batch=2",
    f"train.epochs={EPOCHS}",
    "train.cpus_per_worker=1",
    "train.precision=float32",
    f"train.steps_per_epoch={STEPS}",
    "optimizer.warmup_steps=2",
    "tune.space.model.width={choice: [2, 3]}",
    "tune.space.optimizer.learning_rate={log: [0.03, 0.1]}",
    "tune.space.loss.name={choice: [dice, dice_focal]}",
    "tune.space.loss.focal_gamma={range: [1, 3], when: {loss.name: dice_focal}}",
    "tune.grace_epochs=1",
    "tune.reduction_factor=2",
    "tune.concurrent_trials=1",
    "tune.keep_trials=2",
]
RECIPE = load_recipe(None, SETTINGS)


@pytest.fixture(scope="module")
def killed(
    ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, list[dict[str, Any]], float | None]:
    """A store with the sweep "search", killed with all its processes in its second trial; what its trials
    were then, and the Dice of what `pull` gave."""
    folder = tmp_path_factory.mktemp("sweep")
    store = open_store(folder / "store")
    write_balls(store, train=6, val=3)
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    command = [sys.executable, "-m", "lungseg.cli", "tune", "--store", store.uri, "--data", "balls"]
    command += ["--run", "search", "--trials", str(TRIALS), *settings]
    with (folder / "log").open("wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 400
        while not manifests_of_trial(store, "0001"):
            assert driver.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    said = (folder / "log").read_text()
    assert "trial 0001 begins" in said
    assert not re.search(r"Configuration for experiment|TensorBoard|Trial trial_", said)
    return store, rows(store), pull_best(store, "search", folder / "pulled").val_dice


def manifests_of_trial(store: Store, trial: str) -> bool:
    return any(item.key.endswith("/manifest.json") for item in store.find(f"runs/search/trials/{trial}/"))


def rows(store: Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.get("runs/search/trials.jsonl").decode().splitlines()]


@pytest.fixture(scope="module")
def searched(
    endpoint: Endpoint, killed: tuple[Store, list[dict[str, Any]], float | None]
) -> tuple[Store, list[Trial], list[dict[str, Any]]]:
    """The store, all trials of the sweep that went on, and those that its first driver left."""
    store, left, _ = killed
    recipe = load_recipe(None, [*SETTINGS, *endpoint.settings])
    return store, tune(store, "balls", "search", recipe, TRIALS, "resume"), left


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_at_the_very_step(ray_cluster: Any, tmp_path: Path) -> None:
    store, trial = open_store(tmp_path / "store"), "runs/stopped/trials/0000"
    write_balls(store, train=6, val=3)
    two = ("tune.scan_seconds=true", "tune.pruner=none")
    recipe = load_recipe(None, [*SETTINGS, "train.epochs=1", *two])

    def interrupt() -> None:
        while not is_marked("training"):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(RunError, match="trials under way: 1"):
        tune(store, "balls", "stopped", recipe, 1)
    assert status_of(store, "stopped").state == "stopped"
    left = Checkpoints(store, trial).newest(load_run(store, "stopped").attempt)
    assert left is not None
    assert 0 < left.state.step < STEPS
    (ended,) = tune(store, "balls", "stopped", recipe, 1, "resume")
    assert (ended.state, list(ended.curve)) == ("complete", [1])
    assert ended.scan_seconds == store.get_json(f"{trial}/scan-seconds.json") > 0
    assert f"from epoch 0, step {left.state.step}\n" in store.get(f"{trial}/log.txt").decode()


@pytest.mark.slow
def test_a_killed_sweep_has_its_ended_trial_and_a_best_that_can_be_pulled(
    killed: tuple[Store, list[dict[str, Any]], float | None],
) -> None:
    _, left, pulled = killed
    assert [row["state"] for row in left] == ["complete", "running"]
    assert pulled == left[0]["val_dice"]


@pytest.mark.slow
def test_the_next_driver_ends_it_with_the_trials_it_had(searched: Any) -> None:
    store, trials, left = searched
    assert len(trials) == len({json.dumps(trial.values) for trial in trials}) == TRIALS
    by_number = sorted(trials, key=lambda trial: trial.number)
    assert [trial.values for trial in by_number[:2]] == [row["values"] for row in left]
    assert by_number[0].val_dice == left[0]["val_dice"]
    # Workers outlive their driver by seconds, in which they may come to the end of their run.
    log = store.get("runs/search/trials/0001/log.txt").decode()
    assert by_number[1].state == "complete" or "from epoch 1" in log
    assert rows(store) == [json.loads(json.dumps(vars(trial))) for trial in by_number]
    told = status_of(store, "search")
    assert (told.state, told.starts, sum(told.trials.values())) == ("ended", 2, TRIALS)


@pytest.mark.slow
def test_every_trial_gets_its_turn_and_the_best_is_first(searched: Any) -> None:
    _, trials, _ = searched
    scores = [trial.val_dice for trial in trials]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.3
    for trial in trials:
        assert trial.state == ("complete" if max(trial.curve) == EPOCHS else "pruned")
        assert trial.seconds > 0
        assert 0.03 <= trial.values["optimizer.learning_rate"] <= 0.1
        assert trial.values["model.width"] in (2, 3)
        assert ("loss.focal_gamma" in trial.values) == (trial.values["loss.name"] == "dice_focal")


@pytest.mark.slow
def test_the_best_trials_checkpoint_is_the_best_of_the_run(searched: Any, tmp_path: Path) -> None:
    from lungseg.runs.export import load_best

    store, (won, *_), _ = searched
    best, trial = load_best(store, "search"), Checkpoints(store, f"runs/search/trials/{won.name}")
    assert best.recipe.model.width == won.values["model.width"]
    assert best.recipe.loss.name == won.values["loss.name"]
    assert best.recipe.optimizer.learning_rate == won.values["optimizer.learning_rate"]
    expected = trial.read_best()
    for variable in best.network.weights:
        assert variable.numpy().tobytes() == expected.weights[variable.path].tobytes()
    assert pull_best(store, "search", tmp_path / "out").val_dice == won.val_dice
    assert load_run(store, "search").kind == "tune"
    (tmp_path / "best.yaml").write_bytes(store.get("runs/search/best.yaml"))
    again = load_recipe(tmp_path / "best.yaml")
    assert (again.model, again.loss, again.optimizer) == (
        best.recipe.model, best.recipe.loss, best.recipe.optimizer,
    )  # fmt: skip
    assert "tune" not in yaml.safe_load((tmp_path / "best.yaml").read_text())


@pytest.mark.slow
def test_only_the_best_trials_keep_their_checkpoints(searched: Any) -> None:
    store, trials, _ = searched
    kept = {trial.name for trial in trials if manifests_of_trial(store, trial.name)}
    assert kept == {trial.name for trial in trials[: RECIPE.tune.keep_trials]}
    assert all(store.exists(f"runs/search/trials/{trial.name}/metrics.jsonl") for trial in trials)


@pytest.mark.slow
def test_prometheus_sees_each_trial_by_its_name(searched: Any, endpoint: Endpoint) -> None:
    """Those that ran on this session's cluster."""
    _, trials, left = searched
    found, here = endpoint.scrape(), [trial for trial in trials if trial.number >= len(left)]
    shown = {trial for name, run, trial, _ in found if (name, run) == ("lungseg_val_dice", "search")}
    assert shown - {"0001"} == {trial.name for trial in here}
    for trial in here:
        # Tune kills a trial that it stops, within the next epoch at the earliest.
        assert STEPS <= found["lungseg_step_seconds_count", "search", trial.name, "0"] <= STEPS * EPOCHS
        assert found["lungseg_patches_total", "search", trial.name, "0"] >= 2 * STEPS


@pytest.mark.slow
def test_all_cores_are_free_again(searched: Any, ray_cluster: Any) -> None:
    """Also those of trials that were stopped; Ray counts a few seconds late."""
    for _ in range(100):
        if ray_cluster.available_resources().get("CPU") == ray_cluster.cluster_resources()["CPU"]:
            return
        time.sleep(0.2)
    raise AssertionError(ray_cluster.available_resources())


@pytest.mark.slow
def test_a_sweep_is_neither_taken_for_another_nor_begun_with_what_cannot_be_searched(searched: Any) -> None:
    store = searched[0]
    with pytest.raises(RunError, match="run-exists"):
        tune(store, "balls", "search", RECIPE, 1)
    wider = load_recipe(None, [*SETTINGS, "tune.space.model.width={choice: [2, 3, 4]}"])
    with pytest.raises(RunError, match="run-differs"):
        tune(store, "balls", "search", wider, 1, "resume")
    unknown = load_recipe(None, [*SETTINGS, "tune.space.model.widht={choice: [2]}"])
    with pytest.raises(ConfigError, match="field-unknown"):
        tune(store, "balls", "other", unknown, 1)
    assert not store.exists("runs/other/run.json")
