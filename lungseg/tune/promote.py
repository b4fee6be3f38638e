"""What a sweep has found so far: its best trial as the run's best, and what of the others is kept."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import yaml

from lungseg.config import CheckpointConfig, Recipe
from lungseg.runs.checkpoint import Checkpoints
from lungseg.storage import Store, keys
from lungseg.tune.space import with_values
from lungseg.tune.trials import Trial, by_score, front


def winner(trials: Sequence[Trial]) -> Trial | None:
    """The best trial. Where trials were repeated with other seeds, that of the settings with the best mean;
    of those the best one."""
    scored = sorted((trial for trial in trials if trial.ended and trial.val_dice is not None), key=by_score)
    repeated = [trial.values for trial in scored if trial.repeats]

    def of(values: dict[str, object]) -> list[Trial]:
        return [trial for trial in scored if trial.values == values]

    if repeated:
        scored = max((of(values) for values in repeated), key=mean_dice)
    return scored[0] if scored else None


def mean_dice(trials: Sequence[Trial]) -> float:
    return statistics.fmean(trial.val_dice or 0.0 for trial in trials)


def promote(store: Store, root: str, recipe: Recipe, best: Trial) -> None:
    """Copy a trial's best checkpoint to the run, so that every verb finds it as any run's, and write down its
    settings as a recipe of their own."""
    trial_root = keys.trial_root(root, best.name)
    pointer = Checkpoints(store, trial_root).require_best()
    won = Checkpoints(store, trial_root).read(pointer.checkpoint)
    run = Checkpoints(store, root)
    name = run.commit(won.state, won.weights, won.optimizer)
    run.publish_best(name, won.state, store.get(keys.best_model(trial_root)))
    run.retain(won.state.attempt, CheckpointConfig(keep_latest=1, keep_best=1))
    store.put(keys.best_recipe(root), _as_yaml(recipe, root, won.state.data, best).encode())


def _as_yaml(recipe: Recipe, root: str, data: str, best: Trial) -> str:
    """Without the settings of `data`, which the data set itself brings."""
    run, _ = keys.run_and_trial(root)
    chosen = with_values(recipe, {**best.values, "train.seed": best.seed})
    tree = chosen.model_dump(mode="json", exclude_defaults=True, exclude={"tune", "data", "telemetry"})
    head = (
        f"# Trial {best.name} of the sweep {run}, its best: val Dice {best.val_dice:.4f}.\n"
        f"#   lungseg train --data {data} --run NAME --recipe best.yaml\n"
    )
    return head + yaml.safe_dump(tree, sort_keys=False)


def drop_losers(store: Store, root: str, trials: Sequence[Trial], keep: int) -> None:
    """Delete checkpoints and models of ended trials but the `keep` best and the front's. Metrics and logs
    stay."""
    ended, kept = sorted((trial for trial in trials if trial.ended), key=by_score), front(trials)
    for trial in (trial for trial in ended[keep:] if trial not in kept):
        below = keys.trial_root(root, trial.name)
        for prefix in (keys.best(below), keys.best_model(below), keys.checkpoints(below)):
            store.delete([item.key for item in store.find(prefix)])
