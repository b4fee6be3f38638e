"""What a sweep has learnt, as one HTML page: sweep.html beside its trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from lungseg.config.tune import Dimension
from lungseg.show import page
from lungseg.tune.promote import winner
from lungseg.tune.trials import Trial, by_score, front

Point = tuple[float, float]


def render(
    run: str, space: Mapping[str, Dimension], trials: Sequence[Trial], importances: Mapping[str, float]
) -> str:
    """One page that needs no other file, no script and no network.

    `importances` are shares of 1, by PED-ANOVA (Watanabe et al., 2023): how far the settings of the better
    half of the trials differ from those of all.
    """
    scored = [trial for trial in trials if trial.ended and trial.val_dice is not None]
    top = max((trial.val_dice or 0.0 for trial in scored), default=1.0) or 1.0
    return page.render(
        "lungseg.tune",
        "sweep.html.j2",
        {},
        run=run,
        names=list(space),
        trials=sorted(trials, key=by_score),
        best=winner(trials),
        top=top,
        history=history(scored, top),
        curves=[(trial, curve(trial, trials, top)) for trial in scored],
        slices=[
            (name, ends(space[name]), slice_of(name, space[name], scored, top), importances.get(name))
            for name in space
        ],
        parallel=[
            (trial, parallel(trial, space, top)) for trial in sorted(scored, key=by_score, reverse=True)
        ],
        seeds=over_seeds(scored),
        paces=paces(scored, top),
        front=front(trials),
        slowest=max((trial.scan_seconds or 0.0 for trial in scored), default=0.0),
    )


def paces(scored: Sequence[Trial], top: float) -> tuple[list[Point], list[Point]]:
    """Each trial's score over the seconds that its network takes for a scan, and the front of those that none
    beats in both; x is 1 at the slowest."""
    slowest = max((trial.scan_seconds or 0.0 for trial in scored), default=0.0) or 1.0

    def points(trials: Sequence[Trial]) -> list[Point]:
        known = [(trial.scan_seconds, trial.val_dice or 0.0) for trial in trials]
        return [(seconds / slowest, dice / top) for seconds, dice in known if seconds is not None]

    return points(scored), points(front(scored))


def history(scored: Sequence[Trial], top: float) -> tuple[list[Point], list[Point]]:
    """The score of each trial in the order of their numbers, and the best so far. x and y from 0 to 1."""
    last, best, points, steps = max(1, len(scored) - 1), 0.0, [], []
    for place, trial in enumerate(sorted(scored, key=lambda trial: trial.number)):
        score = trial.val_dice or 0.0
        best = max(best, score)
        points.append((place / last, score / top))
        steps.append((place / last, best / top))
    return points, steps


def curve(trial: Trial, trials: Sequence[Trial], top: float) -> list[Point]:
    """The validation Dice of a trial after each epoch; x is 1 at the longest trial's last."""
    last = max(max(one.curve, default=1) for one in trials)
    return [(epoch / last, max(0.0, dice) / top) for epoch, dice in sorted(trial.curve.items())]


def slice_of(name: str, dimension: Dimension, scored: Sequence[Trial], top: float) -> list[Point]:
    """Each trial's score over its value of one setting."""
    with_it = [trial for trial in scored if name in trial.values]
    return [(fraction(dimension, t.values[name]), (t.val_dice or 0.0) / top) for t in with_it]


def parallel(trial: Trial, space: Mapping[str, Dimension], top: float) -> list[Point]:
    """A trial's value of each setting that it has, and last its score; x counts the settings."""
    points = [
        (float(place), fraction(dimension, trial.values[name]))
        for place, (name, dimension) in enumerate(space.items())
        if name in trial.values
    ]
    return [*points, (float(len(space)), (trial.val_dice or 0.0) / top)]


def fraction(dimension: Dimension, value: Any) -> float:
    """Where a value lies in a dimension, from 0 to 1; choices stand at equal distances, in their order."""
    if dimension.choice:
        choices = [list(one) if isinstance(one, tuple) else one for one in dimension.choice]
        return (choices.index(value) + 0.5) / len(choices)
    low, high = dimension.ends
    if dimension.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def ends(dimension: Dimension) -> list[str]:
    """What stands below a dimension's axis: all choices, or the lowest and the highest value."""
    return [f"{one:g}" if isinstance(one, float) else str(one) for one in dimension.ends]


def over_seeds(scored: Sequence[Trial]) -> list[tuple[Trial, int, float, float]]:
    """Of settings that were repeated: their first trial, how many trials, mean and standard deviation."""
    rows = []
    for first in (trial for trial in scored if not trial.repeats):
        same = [trial.val_dice or 0.0 for trial in scored if trial.values == first.values]
        if len(same) > 1:
            rows.append((first, len(same), fmean(same), stdev(same)))
    return sorted(rows, key=lambda row: -row[2])
