"""Nodules: what a network is sure of, and how sure."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.chests import geometry

from lungseg.config import SegmentConfig
from lungseg.segment.candidates import find_candidates
from lungseg.segment.nodules import confidences, find_nodules
from lungseg.segment.postprocess import components

BY_MAX = SegmentConfig(candidate_score="max")


@pytest.fixture
def probability() -> np.ndarray:
    """Two summits in one nodule, one nodule beside it, and a candidate that is no nodule."""
    made = np.zeros((7, 7, 40), np.float32)
    for x, p in ((5, 0.7), (9, 0.9), (20, 0.6), (34, 0.4)):
        made[2:5, 2:5, x - 1 : x + 2] = p
    made[3, 3, 7] = 0.52  # a valley between the first two
    return made


def test_the_confidence_is_that_of_the_best_candidate_in_a_nodule(probability: np.ndarray) -> None:
    labels = components(probability, BY_MAX, (1, 1, 1))
    assert labels.max() == 2
    searched = confidences(labels, probability, geometry(probability.shape), BY_MAX)
    assert searched == {1: pytest.approx(0.9), 2: pytest.approx(0.6)}
    _, all_candidates = find_candidates(probability, geometry(probability.shape), BY_MAX)
    assert sorted(one.max for one in all_candidates) == pytest.approx([0.4, 0.6, 0.7, 0.9])


@pytest.mark.parametrize(("side", "expected"), [(40, {1: pytest.approx(0.9)}), (60, {})])
def test_what_runs_together_over_more_than_a_litre_is_not_searched(
    side: int, expected: dict[int, object]
) -> None:
    """Voxels of 4.9 mm3, all of them above `candidate_threshold`, as of a network that has learnt nothing."""
    probability = np.full((side,) * 3, 0.12, np.float32)
    probability[18:22, 18:22, 18:22] = 0.9
    labels = (probability > 0.5).astype(np.int32)
    assert confidences(labels, probability, geometry(probability.shape), BY_MAX) == expected
    surest = BY_MAX.model_copy(update={"min_score": 0.99, "min_volume_mm3": 0.0})
    kept, _ = find_nodules(probability, geometry(probability.shape), surest)
    assert kept.max() == (0 if expected else 1), "what has no confidence is not called unsure"


def test_nodules_below_the_lowest_score_go_and_the_others_are_numbered_anew(probability: np.ndarray) -> None:
    """A decoy as bright in its middle as the nodules, and larger, but with a wide rim of 0.2."""
    grid = geometry(probability.shape)
    probability[:, :, 13:29] = np.maximum(probability[:, :, 13:29], 0.2)
    probability[2:5, 2:5, 14:27] = 0.95
    config = SegmentConfig(candidate_score="mean")
    every, unsure = find_nodules(probability, grid, config.model_copy(update={"min_score": 0.0}))
    assert (every[3, 3, 20], every[3, 3, 5]) == (1, 2)
    assert unsure[1] < 0.5 < unsure[2]
    labels, sure = find_nodules(probability, grid, config.model_copy(update={"min_score": 0.5}))
    np.testing.assert_array_equal(labels, (every == 2) * 1)
    assert sure == {1: unsure[2]}
    none, nothing = find_nodules(probability, grid, config.model_copy(update={"min_score": 0.99}))
    assert (none.max(), nothing) == (0, {})


def test_nodules_below_the_threshold_of_candidates_have_no_confidence_and_stay(
    probability: np.ndarray,
) -> None:
    config = SegmentConfig(candidate_threshold=0.95, min_score=0.5)
    labels, confidence = find_nodules(probability, geometry(probability.shape), config)
    assert (labels.max(), confidence) == (2, {})
