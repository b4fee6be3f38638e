"""Hyper-parameter search: Ray Tune over `train`, each trial a Ray Train run of its own."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from typing import Any

from lungseg.cluster import connect
from lungseg.config import Recipe, parse_recipe
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.errors import LungsegError, RunError
from lungseg.runs.fit import check_fit, on_data
from lungseg.runs.run import open_run, refuse_taken
from lungseg.storage import Store, keys
from lungseg.telemetry import log
from lungseg.train.launch import fit
from lungseg.train.resources import worker_resources
from lungseg.tune.promote import Trial, promote, ranked


def tune(store: Store, data: str, run: str, recipe: Recipe, trials: int) -> list[Trial]:
    """Search and return the trials, best first; the best one's checkpoint becomes the run's best.

    The table is also kept as runs/<run>/trials.json. Raises what `train` raises, RunError("no-trial").
    """
    manifest = load_manifest(store, data)
    recipe = on_data(recipe, manifest)
    refuse_taken(store, run, "fresh")
    check_fit(manifest, recipe, "tune")
    worker_resources(recipe.train, connect().nodes())  # a run that cannot start must not claim the name
    attempt = open_run(store, run, manifest, recipe, "fresh", kind="tune").attempt
    root = keys.run_root(run)
    done = _search(store, root, attempt, manifest, recipe, trials)
    if not done:
        remedy = "read the errors above; try the recipe with `lungseg train` first"
        raise RunError("no-trial", run=run, message="no trial finished an epoch", remedy=remedy)
    store.put_json(keys.trials(root), [asdict(trial) for trial in done])
    promote(store, root, done[0])
    return done


def _search(
    store: Store, root: str, attempt: str, manifest: Manifest, recipe: Recipe, trials: int
) -> list[Trial]:
    ray = connect()
    from ray import tune as ray_tune
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    space, epochs = recipe.tune, recipe.train.epochs
    each, there = worker_resources(recipe.train, ray.nodes()), ray.cluster_resources()
    fits = min(int(there.get(kind, 0)) // (recipe.train.workers * count) for kind, count in each.items())
    concurrent = space.concurrent_trials or max(1, fits)

    def trial(choice: dict[str, Any]) -> None:
        name = ray_tune.get_context().get_trial_id()
        fit(
            store,
            keys.trial_root(root, name),
            attempt,
            manifest,
            _with(recipe, choice),
            [TuneReportCallback()],
        )

    with tempfile.TemporaryDirectory(prefix="lungseg-tune-", ignore_cleanup_errors=True) as scratch:
        results = ray_tune.Tuner(
            # The trial only waits for its workers, which hold the cores; Tune wants it to ask for something.
            ray_tune.with_resources(trial, {"CPU": 0, "memory": 1 << 20}),
            param_space={
                "learning_rate": ray_tune.loguniform(*space.learning_rate),
                "loss": ray_tune.choice(list(space.loss)),
                "width": ray_tune.choice(list(space.width)),
            },
            tune_config=ray_tune.TuneConfig(
                metric="val_dice",
                mode="max",
                num_samples=trials,
                # Tune ignores its own max_concurrent_trials beside this generator.
                search_alg=BasicVariantGenerator(max_concurrent=concurrent, random_state=recipe.train.seed),
                scheduler=ASHAScheduler(
                    time_attr="epoch",
                    max_t=epochs,
                    grace_period=min(space.grace_epochs, epochs),
                    reduction_factor=space.reduction_factor,
                ),
            ),
            run_config=ray_tune.RunConfig(
                name="tune", storage_path=scratch, verbose=0, callbacks=[_releaser()]
            ),
        ).fit()
    finished = [results[i] for i in range(len(results)) if "val_dice" in (results[i].metrics or {})]
    for error in results.errors:
        # One trial may diverge or run out of memory: that is a result, unless there is no other.
        ours = LungsegError.find_in(error)
        if ours and not finished:
            raise ours from error
        log("tune").warning("a trial failed: %s", ours or error)
    return ranked(store, root, finished)


def _releaser() -> Any:
    """A callback of Tune that gives a trial's cores back when Tune stops it: it kills the trial's driver,
    and Ray Train's own cleaner works only beside a dashboard."""
    import ray
    from ray.tune import Callback
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    class Releaser(Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            group = (trial.last_result or {}).get("placement_group")
            if group:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))

    return Releaser()


def _with(recipe: Recipe, choice: dict[str, Any]) -> Recipe:
    tree = recipe.model_dump(mode="json")
    tree["optimizer"]["learning_rate"] = choice["learning_rate"]
    tree["loss"]["name"] = choice["loss"]
    tree["model"]["width"] = choice["width"]
    return parse_recipe(tree)
