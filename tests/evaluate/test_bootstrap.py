"""Intervals, ranks and tests against closed forms, SciPy's own and published examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lungseg.evaluate.bootstrap import (
    by_patient,
    difference,
    holm,
    interval,
    rank_shares,
    ratio,
    resample,
    wilcoxon,
)


def test_scans_of_one_patient_come_and_go_together() -> None:
    weights = resample(["b", "a", "b", "c"], replicates=500, seed=1)
    assert weights.shape == (500, 4)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(4), abs=0.15)
    assert (weights == resample(["b", "a", "b", "c"], replicates=500, seed=1)).all()
    assert (weights != resample(["b", "a", "b", "c"], replicates=500, seed=2)).any()


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).normal(3, 2, 60)
    patients = [str(number) for number in range(60)]
    mine = interval(ratio(values, np.ones(60)), patients, resample(patients, 20_000))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    assert mine.value == pytest.approx(values.mean())
    assert mine.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert mine.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)
    assert not mine.means_little


def test_more_scans_of_the_same_patients_do_not_narrow_the_interval() -> None:
    values, patients = np.arange(12.0), [str(number) for number in range(12)]
    once = interval(ratio(values, np.ones(12)), patients, resample(patients))
    twice = interval(ratio(np.tile(values, 2), np.ones(24)), patients * 2, resample(patients * 2))
    assert twice == once
    assert interval(ratio(values[:9], np.ones(9)), patients[:9], resample(patients[:9])).means_little


def test_a_rate_counts_what_the_drawn_scans_hold() -> None:
    """3 of 4 nodules in one scan, none of 2 in another: draws give 3/4, 3/6 or 0."""
    patients = ["a", "b"]
    found = ratio([3, 0], [4, 2])
    assert set(found(resample(patients))) == {0.75, 0.5, 0.0}
    assert interval(found, patients, resample(patients)).value == 0.5
    without = interval(ratio([0, 0], [0, 0]), patients, resample(patients))
    assert (without.value, without.low, without.high, without.patients) == (None, None, None, 2)
    some = interval(ratio([3, 0], [4, 0]), patients, resample(patients))
    assert (some.value, some.low, some.high) == (0.75, 0.75, 0.75)


def test_what_is_hard_for_both_cancels_out_of_a_difference() -> None:
    random = np.random.default_rng(0)
    base, patients = random.normal(0, 10, 40), [str(number) for number in range(40)]
    a, b = ratio(base, np.ones(40)), ratio(base + 0.5 + random.normal(0, 0.1, 40), np.ones(40))
    weights = resample(patients)
    paired = interval(difference(a, b), patients, weights)
    assert paired.value == pytest.approx(0.5, abs=0.05)
    assert paired.low is not None
    assert 0.4 < paired.low < paired.high < 0.6
    single = interval(a, patients, weights)
    assert single.high - single.low > 4
    assert interval(difference(a, a), patients, weights).high == 0


def test_ranks_are_shared_out_over_draws() -> None:
    """Of two patients, the first run is better on one and the second on the other, the third never: draws
    are aa, ab (ties) and bb with chances 1/4, 1/2, 1/4."""
    runs = [ratio(values, [1, 1]) for values in ([2, 0], [0, 2], [-1, -1])]
    shares = rank_shares(runs, resample(["a", "b"], 20_000))
    assert shares == pytest.approx(np.array([[0.75, 0.25, 0], [0.75, 0.25, 0], [0, 0, 1]]), abs=0.02)
    lower = rank_shares(runs, resample(["a", "b"], 20_000), higher_is_better=False)
    assert lower[2].tolist() == [1, 0, 0]
    assert rank_shares([ratio([1], [0])] * 2, np.ones((5, 1), int)).tolist() == [[0, 0], [0, 0]]


def test_a_patient_has_the_figure_of_its_own_scans() -> None:
    figures = by_patient(ratio([1, 0, 3, 7, 0], [1, 0, 2, 1, 0]), ["b", "b", "b", "a", "c"])
    assert figures[:2].tolist() == [7, 4 / 3]
    assert math.isnan(figures[2])


def test_wilcoxon_gives_the_example_of_its_textbook() -> None:
    """Darwin's maize, 15 pairs, as in SciPy's documentation: p = 0.041."""
    heights = [6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]
    assert wilcoxon(np.zeros(16), np.array([*heights, np.nan])) == pytest.approx(0.04126, abs=1e-5)
    assert wilcoxon(np.ones(3), np.array([1.0, 1 + 3e-16, 1 - 2e-16])) == 1
    assert wilcoxon(np.full(2, np.nan), np.ones(2)) is None


def test_holm_gives_the_values_of_r() -> None:
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
