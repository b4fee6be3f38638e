"""Hyper-parameter search: Ray Tune over `train`, each trial a Ray Train run of its own.

What to try and when to stop is Optuna's, through `Trials`, which keeps all of it in the store; Ray Tune
places trials, watches them and starts again what failed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lungseg.cluster import await_store, connect, warm_up
from lungseg.config import Recipe
from lungseg.config.stored import stored_recipe
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.errors import LungsegError, RunError
from lungseg.runs.fit import check_fit, on_data
from lungseg.runs.run import Mode, load_run, open_run, refuse_taken, run_exists
from lungseg.storage import Store, keys
from lungseg.telemetry import log
from lungseg.train.launch import fit, source_of
from lungseg.train.ready import ready_workers
from lungseg.train.resources import trial_resources
from lungseg.train.stop import heed_signals, is_marked, set_mark, unmarked
from lungseg.train.worker import IMPORTS
from lungseg.tune.earlier import earlier_trials
from lungseg.tune.pace import measure_pace
from lungseg.tune.page import render
from lungseg.tune.promote import drop_losers, promote, winner
from lungseg.tune.space import check_space, with_values
from lungseg.tune.table import live
from lungseg.tune.trials import Trial, Trials, by_score

_log = log("tune")
_AS_MANY_AS_FIT = 1_000_000


def tune(
    store: Store,
    data: str,
    run: str,
    recipe: Recipe,
    trials: int | None,
    mode: Mode = "fresh",
    minutes: float | None = None,
    warm_start: str | None = None,
) -> list[Trial]:
    """Search until `trials` have ended or `minutes` are over, repeat the best with `tune.seeds`, and return
    all trials, best first. The best one's checkpoint is the run's best from its end on. What the sweep
    `warm_start` has found is known from the begin.

    "resume" goes on with a sweep: interrupted trials from their newest checkpoint, then new ones. Raises what
    `train`, `check_space` and `earlier_trials` raise, RunError("no-trial"), and RunError("run-differs") for
    another space.
    """
    await_store(store.check, recipe.train.wait_minutes)
    manifest = load_manifest(store, data)
    recipe = on_data(recipe, manifest)
    refuse_taken(store, run, mode)
    _refuse_other_space(store, run, recipe, mode)
    check_fit(manifest, recipe, "tune")
    check_space(recipe)
    earlier = earlier_trials(store, warm_start, manifest, recipe) if warm_start else []
    root = keys.run_root(run)
    warm_up(*IMPORTS)
    ready_workers(recipe, source_of(root))  # a run that cannot start must not claim the name
    attempt = open_run(store, run, manifest, recipe, mode, kind="tune").attempt
    with tempfile.TemporaryDirectory(prefix="lungseg-tune-", ignore_cleanup_errors=True) as folder:
        sweep = _Sweep(store, root, attempt, manifest, recipe, Path(folder))
        with sweep.trials.heart.beating("searching"), live(sys.stderr) as sweep.show:
            sweep.trials.learn(earlier)
            sweep.run(sweep.trials.to_come(trials or _AS_MANY_AS_FIT), minutes)
            if recipe.tune.seeds > 1:
                sweep.run(sweep.trials.repeat_best(), None)
            found = sorted((t for t in sweep.trials.all() if t.state != "earlier"), key=by_score)
            if winner(found) is None:
                raise sweep.error or _no_trial(run)
    return found


def _no_trial(run: str) -> RunError:
    remedy = "read the errors above; try the recipe with `lungseg train` first"
    return RunError("no-trial", run=run, message="no trial finished an epoch", remedy=remedy)


def _stopped(trials: int) -> RunError:
    remedy = "the same command with --resume goes on from the steps they committed"
    return RunError("stopped", message=f"trials under way: {trials}", remedy=remedy)


def _refuse_other_space(store: Store, run: str, recipe: Recipe, mode: Mode) -> None:
    if mode != "resume" or not run_exists(store, run):
        return
    before, now = stored_recipe(load_run(store, run).recipe).tune, recipe.tune
    for field in ("space", "scan_seconds"):
        if getattr(before, field) != getattr(now, field):
            message = f"the sweep has another {field}"
            remedy = "give the same as before, or choose another --run name"
            raise RunError("run-differs", run=run, message=message, remedy=remedy)


class _Sweep:
    """One driver's part in a sweep."""

    def __init__(
        self, store: Store, root: str, attempt: str, manifest: Manifest, recipe: Recipe, folder: Path
    ) -> None:
        self.store, self.root, self.attempt = store, root, attempt
        self.manifest, self.recipe = manifest, recipe
        self.trials = Trials(store, root, recipe, folder)
        self.error: LungsegError | None = None
        self._published: Trial | None = None
        self.show: Callable[[Sequence[Trial]], None] = lambda trials: None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Tune writes away what it would go on from, with locks in it; a sweep goes on from the store."""
        return object, ()

    def run(self, count: int, minutes: float | None) -> None:
        """Run so many trials, if need be fewer in the minutes given."""
        if count == 0:
            return
        ray = connect()
        from ray import tune as ray_tune

        config, train = self.recipe.tune, self.recipe.train
        each, at_once = trial_resources(train, ray.nodes(), config.concurrent_trials)
        suggest, prune, record = _for_ray(self)
        with tempfile.TemporaryDirectory(prefix="lungseg-tune-", ignore_cleanup_errors=True) as scratch:
            tuner = ray_tune.Tuner(
                # The trial only waits for its workers, which hold the cores; Tune wants it to ask for more.
                ray_tune.with_resources(self._trial(each), {"CPU": 0, "memory": 1 << 20}),
                # It is told of no metric: a trial that leaves before its first epoch has none to show.
                tune_config=ray_tune.TuneConfig(
                    num_samples=count,
                    search_alg=suggest,
                    scheduler=prune,
                    max_concurrent_trials=at_once,
                    time_budget_s=None if minutes is None else 60 * minutes,
                ),
                run_config=ray_tune.RunConfig(
                    name="tune",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[record],
                    failure_config=ray_tune.FailureConfig(max_failures=config.retries),
                ),
            )
            try:
                with unmarked():
                    heed_signals(lambda: _log.info("stopping: no trial has begun a step"))
                    results = tuner.fit()
                    if is_marked("stop"):
                        raise _stopped(len(self.trials.live()))
            except Exception as error:
                ours = LungsegError.find_in(error)
                if ours:
                    raise ours from error
                raise
        for number in self.trials.live() if minutes is not None else ():
            self.end(number, "pruned")  # the minutes are over
        for failure in results.errors:
            # One trial may diverge or run out of memory: that is a result, unless there is no other.
            self.error = self.error or LungsegError.find_in(failure)

    def _trial(self, resources: dict[str, int]) -> Any:
        """What a trial's own process runs, with `resources` for each of its workers; the driver's part of the
        sweep stays here."""
        store, root, attempt = self.store, self.root, self.attempt
        manifest, recipe = self.manifest, self.recipe

        def trial(choice: dict[str, str]) -> None:
            from ray.tune.integration.ray_train import TuneReportCallback

            chosen = with_values(recipe, json.loads(choice["values"]))
            below = keys.trial_root(root, choice["trial"])
            try:
                if recipe.tune.scan_seconds:
                    measure_pace(store, below, chosen, resources)
                fit(
                    store,
                    below,
                    attempt,
                    manifest,
                    chosen,
                    [TuneReportCallback()],
                    resources=resources,
                )
            except (Exception, KeyboardInterrupt) as error:
                if not is_marked("stop"):
                    raise
                _log.info("trial %s: %s", choice["trial"], LungsegError.find_in(error) or "no step was begun")

        return trial

    def begin(self) -> dict[str, str]:
        """The next trial, as Tune hands it to its process."""
        trial = self.trials.begin(lambda recipe: check_fit(self.manifest, recipe, "tune"))
        self.show(self.trials.all())
        shown = ", ".join(f"{name} {value}" for name, value in trial.values.items())
        _log.info("trial %s begins: %s", trial.name, shown)
        return {"trial": trial.name, "values": json.dumps({**trial.values, "train.seed": trial.seed})}

    def end(self, number: int, state: str, error: str = "") -> None:
        """Keep how a trial ended, publish the best so far, and drop what no longer counts."""
        trial, everything = self.trials.end(number, state, error), self.trials.all()
        self.show(everything)
        best = winner(everything)
        dice = "no epoch" if trial.val_dice is None else f"val Dice {trial.val_dice:.4f}"
        leads = f"; best: trial {best.name}, {best.val_dice:.4f}" if best else ""
        _log.info("trial %s %s after epoch %d: %s%s", trial.name, trial.state, len(trial.curve), dice, leads)
        if error:
            _log.warning("trial %s failed: %s", trial.name, error)
        if best and best != self._published:
            promote(self.store, self.root, self.recipe, best)
            self._published = best
        drop_losers(self.store, self.root, everything, self.recipe.tune.keep_trials)
        run, _ = keys.run_and_trial(self.root)
        page = render(run, self.recipe.tune.space, everything, self.trials.importances())
        self.store.put(keys.sweep_page(self.root), page.encode())


def _for_ray(sweep: _Sweep) -> tuple[Any, Any, Any]:
    """What Ray Tune asks: for the next trial, whether one goes on, and whom to tell of an end."""
    from ray.tune import Callback
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    stopped: set[int] = set()

    class Suggest(Searcher):
        def suggest(self, trial_id: str) -> Any:
            return Searcher.FINISHED if is_marked("stop") else sweep.begin()

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """`Record` is told with the trial itself."""

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).touch()  # the sweep's state is in the store

    class Prune(FIFOScheduler):
        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            epoch = int(result["epoch"])
            on = sweep.trials.report(_number(trial), epoch, result["val_dice"], result["seconds"])
            sweep.show(sweep.trials.all())
            if on or epoch >= sweep.recipe.train.epochs:
                return self.CONTINUE
            stopped.add(_number(trial))
            return self.STOP

    class Record(Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            pruned = _number(trial) in stopped
            if pruned or not is_marked("stop"):  # else the next driver goes on with it
                _free(trial)
                sweep.end(_number(trial), "pruned" if pruned else "complete")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _free(trial)
            error = trial.get_pickled_error() or trial.get_error()
            sweep.end(_number(trial), "fail", str(LungsegError.find_in(error) or error))

    return Suggest(), Prune(), Record()


def _number(trial: Any) -> int:
    return int(trial.config["trial"])


def _free(trial: Any) -> None:
    """Give a trial's cores back when Tune stops it: it kills the trial's driver, and Ray Train's own cleaner
    works only beside a dashboard."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    group = (trial.last_result or {}).get("placement_group")
    if group:
        set_mark("stop", trial.config["trial"])
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
