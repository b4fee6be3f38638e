"""Calibration by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from lungseg.evaluate.calibration import BINS, reliability
from lungseg.evaluate.froc import MISSED, Hits


def test_a_few_candidates_have_the_figures_computed_by_hand() -> None:
    scans = [Hits(np.array([0.95, MISSED]), np.array([0.15, 0.91])), Hits(np.array([1.0]), np.empty(0))]
    found = reliability(scans)
    assert found.candidates.tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 3]
    assert found.mean_score[[1, 9]] == pytest.approx([0.15, 2.86 / 3])
    assert found.nodule_share[[1, 9]] == pytest.approx([0, 2 / 3])
    assert found.ece == pytest.approx((0.15 + abs(2.86 - 2)) / 4)
    assert found.brier == pytest.approx((0.05**2 + 0.15**2 + 0.91**2 + 0) / 4)


def test_without_candidates_there_is_no_figure() -> None:
    for scans in ([], [Hits(np.array([MISSED]), np.empty(0))]):
        found = reliability(scans)
        assert found.ece is found.brier is None
        assert found.candidates.sum() == 0
        assert np.isnan(found.mean_score).all()


@settings(deadline=None)
@given(st.integers(0, 1 << 32))
def test_bins_and_brier_are_those_of_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    found, wrong = (random.random(random.integers(1, 60)) for _ in range(2))
    mine = reliability([Hits(found, wrong)])
    truth, scores = np.repeat([1, 0], [len(found), len(wrong)]), np.concatenate([found, wrong])
    share, mean = calibration_curve(truth, scores, n_bins=BINS)
    filled = mine.candidates > 0
    np.testing.assert_allclose(mine.nodule_share[filled], share)
    np.testing.assert_allclose(mine.mean_score[filled], mean)
    assert mine.brier == pytest.approx(brier_score_loss(truth, scores))
