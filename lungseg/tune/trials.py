"""A sweep's trials, as Optuna's study has them and as the store keeps them."""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from lungseg.config import Recipe
from lungseg.errors import ConfigError, LungsegError
from lungseg.runs.lease import claim
from lungseg.runs.progress import Heart
from lungseg.storage import Store, keys
from lungseg.tune.space import draw, with_values

optuna.logging.set_verbosity(optuna.logging.WARNING)
_DRAWS, _CURVE = 100, "curve"


@dataclass(frozen=True)
class Trial:
    """One trial: `values` are its settings, `seed` the one that it trains with.

    `state` is waiting (to be repeated with another seed), running, complete, pruned (stopped early), fail, or
    earlier: of another sweep, whose trial `error` names.
    `curve` is the validation Dice of each epoch it had, `val_dice` the best of them, None before the first.
    `seconds` were spent by its workers, and its network takes `scan_seconds` for a scan where that is an
    objective; `error` says why it failed.
    """

    number: int
    state: str
    values: dict[str, Any]
    seed: int
    repeats: bool = False
    val_dice: float | None = None
    seconds: float = 0.0
    scan_seconds: float | None = None
    error: str = ""
    curve: dict[int, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its checkpoints lie below."""
        return f"{self.number:04d}"

    @property
    def ended(self) -> bool:
        return self.state in ("complete", "pruned")


class Trials:
    """The trials of the sweep below `root`. Optuna's journal, a file of JSON lines, is their only record.

    It is written through to the store at each change, so that a sweep goes on wherever its driver starts
    again; `trials.jsonl`, for people and scripts, is made from it. `folder` holds the working copy. Whoever
    opens a sweep takes it over: an earlier driver's next write raises RunError("run-taken-over"). Its `heart`
    tells that it lives.
    """

    def __init__(self, store: Store, root: str, recipe: Recipe, folder: Path) -> None:
        self._store, self._root, self._recipe = store, root, recipe
        self._lease = claim(store, root, secrets.token_hex(8))
        self.heart = Heart(store, root, self._lease.number)
        self._journal = folder / "journal"
        if store.exists(keys.sweep_journal(root)):
            self._journal.write_bytes(store.get(keys.sweep_journal(root)))
        self._study = optuna.create_study(
            study_name=root,
            storage=JournalStorage(JournalFileBackend(str(self._journal))),
            # A sweep that goes on draws anew: with the seed of its first start it would draw the same again.
            sampler=_sampler(recipe, self._lease.number),
            pruner=_pruner(recipe),
            directions=["maximize", "minimize"] if recipe.tune.scan_seconds else ["maximize"],
            load_if_exists=True,
        )
        waits = [t for t in self._frozen() if t.state == TrialState.RUNNING]
        self._interrupted = [optuna.Trial(self._study, t._trial_id) for t in waits]
        self._live: dict[int, optuna.Trial] = {}

    def learn(self, earlier: Sequence[FrozenTrial]) -> None:
        """Take trials of other sweeps for known; a sweep that goes on has done so already."""
        if not self._frozen():
            self._study.add_trials(earlier)
            self._write()

    def all(self) -> list[Trial]:
        return [_read(trial, self._recipe.train.seed) for trial in self._frozen()]

    def to_come(self, trials: int) -> int:
        """How many of a budget are still to end: what failed, or repeats another trial, does not count."""
        return max(0, trials - sum(trial.ended and not trial.repeats for trial in self.all()))

    def begin(self, check: Callable[[Recipe], None]) -> Trial:
        """The next trial: one that was interrupted, a repetition, or else a new draw from the space.

        `check` refuses recipes that cannot train by a LungsegError; such draws are kept as failed, and the
        next is taken. Raises ConfigError("space-untrainable") after 100 of them.
        """
        reason = ""
        for _ in range(_DRAWS):
            trial = self._interrupted.pop(0) if self._interrupted else self._study.ask()
            try:
                values = trial.user_attrs.get("values") or draw(trial, self._recipe)
                check(with_values(self._recipe, values))
            except LungsegError as error:
                reason = str(error)
                trial.set_user_attr("error", reason)
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            trial.set_user_attr("values", values)
            self._live[trial.number] = trial
            self._catch_up(trial)
            self._write()
            return self.all()[trial.number]
        remedy = "leave out what does not go together, or say with `when` where it does"
        raise ConfigError("space-untrainable", draws=_DRAWS, message=reason, remedy=remedy)

    def _catch_up(self, trial: optuna.Trial) -> None:
        """Epochs that were committed, and that the driver did not live to hear of."""
        key = keys.metrics(keys.trial_root(self._root, f"{trial.number:04d}"))
        lines = self._store.get(key).splitlines() if self._store.exists(key) else []
        known = self.all()[trial.number].curve
        for epoch in map(json.loads, lines):
            if epoch["epoch"] not in known:
                self._keep(trial, epoch["epoch"], epoch["val_dice"])
                trial.set_user_attr("seconds", epoch["seconds"])

    def _keep(self, trial: optuna.Trial, epoch: int, val_dice: float) -> None:
        """Optuna takes no score of an epoch where there are two objectives."""
        if self._recipe.tune.scan_seconds:
            trial.set_user_attr(_CURVE, {**trial.user_attrs.get(_CURVE, {}), str(epoch): val_dice})
        else:
            trial.report(val_dice, epoch)

    def live(self) -> list[int]:
        """Trials that this driver began and has not ended."""
        return list(self._live)

    def report(self, number: int, epoch: int, val_dice: float, seconds: float) -> bool:
        """Keep the score of an epoch; whether the trial is worth another. A run that has ended says its last
        epoch again when it is started again."""
        trial = self._live[number]
        if epoch not in self.all()[number].curve:
            self._keep(trial, epoch, val_dice)
        trial.set_user_attr("seconds", seconds)
        self._write()
        if self._recipe.tune.scan_seconds or trial.user_attrs.get("repeats", False):
            return True
        return not trial.should_prune()

    def end(self, number: int, state: str, error: str = "") -> Trial:
        """`state` is complete, pruned or fail. A trial that has no epoch has failed whatever is said."""
        trial, curve = self._live.pop(number), self.all()[number].curve
        if error:
            trial.set_user_attr("error", error)
        told = TrialState[state.upper()] if curve else TrialState.FAIL
        values = [max(curve.values())] if told == TrialState.COMPLETE else None
        if values and self._recipe.tune.scan_seconds:
            key = keys.scan_seconds(keys.trial_root(self._root, f"{number:04d}"))
            values.append(self._store.get_json(key))
            trial.set_user_attr("scan_seconds", values[1])
        self._study.tell(trial, values, told)
        self._write()
        return self.all()[number]

    def repeat_best(self) -> int:
        """Queue repetitions of the best trials with further seeds; how many are waiting now."""
        config, all_trials = self._recipe.tune, self.all()
        first = [t for t in all_trials if t.state == "complete" and not t.repeats]
        for best in sorted(first, key=by_score)[: config.seeds_best]:
            for seed in range(best.seed + 1, best.seed + config.seeds):
                same = [t for t in all_trials if t.repeats and (t.values, t.seed) == (best.values, seed)]
                if not any(t.state != "fail" for t in same):
                    attributes = {"values": best.values, "seed": seed, "repeats": True}
                    self._study.enqueue_trial(self._frozen()[best.number].params, user_attrs=attributes)
        self._write()
        return sum(t.state in ("waiting", "running") and t.repeats for t in self.all())

    def importances(self) -> dict[str, float]:
        """How much each setting matters, as shares of 1, by PED-ANOVA; {} while too little is known."""
        ended = [t for t in self._frozen() if t.state == TrialState.COMPLETE]
        if len(ended) < 4:
            return {}
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        # Told what to look at, it takes the lowest for the best, and warns of that each time.
        target = (lambda trial: -trial.values[0]) if self._recipe.tune.scan_seconds else None
        with warnings.catch_warnings(action="ignore"):
            return get_param_importances(self._study, evaluator=PedAnovaImportanceEvaluator(), target=target)

    def _frozen(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _write(self) -> None:
        self._lease.check()
        self._store.put(keys.sweep_journal(self._root), self._journal.read_bytes())
        lines = [json.dumps(asdict(trial), sort_keys=True) + "\n" for trial in self.all()]
        self._store.put(keys.trials(self._root), "".join(lines).encode())


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Those that none beats in both objectives (Pareto), the quickest first; none where there is only one."""
    found: list[Trial] = []
    ended = [trial for trial in trials if trial.state == "complete" and trial.scan_seconds is not None]
    for trial in sorted(ended, key=lambda trial: (trial.scan_seconds, by_score(trial))):
        if not found or by_score(trial)[0] < by_score(found[-1])[0]:
            found.append(trial)
    return found


def by_score(trial: Trial) -> tuple[float, int]:
    """To sort by: the best first, of equals the first."""
    return 1.0 if trial.val_dice is None else -trial.val_dice, trial.number


def _read(trial: FrozenTrial, seed: int) -> Trial:
    attributes = trial.user_attrs
    curve = trial.intermediate_values or {
        int(epoch): dice for epoch, dice in attributes.get(_CURVE, {}).items()
    }
    return Trial(
        number=trial.number,
        state="earlier" if "earlier" in attributes else trial.state.name.lower(),
        values=attributes.get("values", {}),
        seed=attributes.get("seed", seed),
        repeats=attributes.get("repeats", False),
        val_dice=max(curve.values(), default=None),
        seconds=attributes.get("seconds", 0.0),
        scan_seconds=attributes.get("scan_seconds"),
        error=attributes.get("error", attributes.get("earlier", "")),
        curve=dict(curve),
    )


def _sampler(recipe: Recipe, start: int) -> optuna.samplers.BaseSampler:
    seed = recipe.train.seed + start
    kind = {
        "random": optuna.samplers.RandomSampler,
        "gp": optuna.samplers.GPSampler,
        "cmaes": optuna.samplers.CmaEsSampler,
        "tpe": optuna.samplers.TPESampler,
    }[recipe.tune.sampler]
    return kind(seed=seed)


def _pruner(recipe: Recipe) -> optuna.pruners.BasePruner:
    config = recipe.tune
    if config.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(config.grace_epochs, config.reduction_factor)
    if config.pruner == "median":
        return optuna.pruners.MedianPruner(n_warmup_steps=config.grace_epochs - 1)
    return optuna.pruners.NopPruner()
