"""The page of a sweep: what stands in it, and that each chart shows the trials."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lungseg.config.tune import Dimension
from lungseg.tune.page import curve, fraction, history, over_seeds, paces, render
from lungseg.tune.trials import Trial

SPACE = {
    "optimizer.learning_rate": Dimension(log=(1e-4, 1e-2)),
    "loss.name": Dimension(choice=("dice", "focal")),
    "loss.focal_gamma": Dimension(range=(1, 3), when={"loss.name": "focal"}),
}
DICE = {"optimizer.learning_rate": 1e-3, "loss.name": "dice"}
FOCAL = {"optimizer.learning_rate": 1e-2, "loss.name": "focal", "loss.focal_gamma": 2}
TRIALS = [
    Trial(0, "complete", DICE, 0, val_dice=0.4, seconds=60, curve={1: 0.2, 2: 0.4}),
    Trial(1, "pruned", FOCAL, 0, val_dice=0.1, seconds=30, curve={1: 0.1}),
    Trial(2, "fail", {}, 0, error="patch-shape <b>"),
    Trial(3, "complete", DICE, 1, repeats=True, val_dice=0.8, seconds=60, curve={1: 0.7, 2: 0.8}),
]


@pytest.mark.parametrize(
    ("dimension", "value", "expected"),
    [
        (SPACE["optimizer.learning_rate"], 1e-3, 0.5),
        (SPACE["loss.focal_gamma"], 1.5, 0.25),
        (SPACE["loss.name"], "focal", 0.75),
        (Dimension(choice=((1, 2), (3, 4))), [1, 2], 0.25),
    ],
)
def test_a_value_stands_where_it_lies_in_its_dimension(
    dimension: Dimension, value: object, expected: float
) -> None:
    assert fraction(dimension, value) == pytest.approx(expected)


def test_charts_are_fractions_of_the_best_and_the_longest() -> None:
    scored = [TRIALS[0], TRIALS[1], TRIALS[3]]
    assert history(scored, 0.8) == (
        [(0.0, 0.5), (0.5, 0.125), (1.0, 1.0)],
        [(0.0, 0.5), (0.5, 0.5), (1.0, 1.0)],
    )
    assert curve(TRIALS[1], TRIALS, 0.8) == [(0.5, 0.125)]
    [(first, count, mean, deviation)] = over_seeds(scored)
    assert (first.number, count) == (0, 2)
    assert (mean, deviation) == (pytest.approx(0.6), pytest.approx(0.2 * 2**0.5))


def test_a_second_objective_has_its_chart_and_its_column() -> None:
    quick = [replace(trial, scan_seconds=float(trial.number + 1)) for trial in TRIALS]
    scored = [trial for trial in quick if trial.val_dice is not None]
    assert paces(scored, 0.8) == ([(0.25, 0.5), (0.5, 0.125), (1.0, 1.0)], [(0.25, 0.5), (1.0, 1.0)])
    page = render("search", SPACE, quick, {})
    assert "trial 0000 (0.4000 in 1.0 s), trial 0003 (0.8000 in 4.0 s)." in page
    assert "<th>s a scan</th>" in page
    assert "a scan" not in render("search", SPACE, TRIALS, {})


def test_the_page_has_every_trial_and_needs_nothing_else() -> None:
    page = render("search", SPACE, TRIALS, {"loss.name": 0.25})
    table = page[page.index('id="trials"') :]
    assert re.findall(r"<td>(000\d)</td>", table) == ["0003", "0000", "0001", "0002"]
    assert "loss.name (25%)" in page
    assert "patch-shape &lt;b&gt;" in page
    assert len(re.findall("<polyline", page[page.index('id="parallel"') :])) == 3
    assert not re.search(r"<script|<link|https?://|url\(", page)
    assert render("empty", SPACE, [TRIALS[2]], {})
