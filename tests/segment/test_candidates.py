"""Candidates: touching nodules come apart, noise parts nothing, and scores are those computed by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import ndimage

from lungseg.config import SegmentConfig
from lungseg.scan.volume import Geometry
from lungseg.segment.candidates import find_candidates, split
from lungseg.segment.postprocess import components

CONFIG = SegmentConfig(min_volume_mm3=0)
UPRIGHT = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
SIDE = 40


def grid(shape: tuple[int, ...], spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Geometry:
    z, y, x = shape
    return Geometry((z, y, x), spacing_mm, (-100.0, 50.0, 7.0), UPRIGHT)


def blurred_balls(balls: Sequence[tuple[np.ndarray, float]], random: np.random.Generator) -> np.ndarray:
    """float32, as a network might give: balls (centre, radius) that are blurred, dimmed and noisy."""
    index = np.moveaxis(np.indices((SIDE,) * 3), 0, -1)
    truth = np.zeros((SIDE,) * 3)
    for centre, radius in balls:
        truth[np.linalg.norm(index - centre, axis=-1) <= radius] = 1
    noise = ndimage.gaussian_filter(random.normal(size=truth.shape), 1)
    blurred = ndimage.gaussian_filter(truth, 1.2) * random.uniform(0.6, 1)
    return np.clip(blurred + 0.06 * noise / noise.std() * (blurred > 0.02), 0, 1).astype(np.float32)


def test_neighbours_that_run_together_are_parted_and_single_nodules_are_not() -> None:
    """50 pairs of balls at most 2.5 voxels apart, and 50 oblong ones."""
    random = np.random.default_rng(0)
    low = CONFIG.model_copy(update={"threshold": CONFIG.candidate_threshold})
    parted = {"by the low threshold": 0, "by the final threshold": 0, "by summits": 0}
    cut = 0
    for _ in range(50):
        one, two = random.uniform(2, 6, 2)
        axis = random.normal(size=3)
        axis *= (one + two + random.uniform(0, 2.5)) / 2 / np.linalg.norm(axis)
        centres = SIDE / 2 - axis, SIDE / 2 + axis
        pair = blurred_balls(list(zip(centres, (one, two), strict=True)), random)
        merged = components(pair, low, (1.0, 1.0, 1.0))
        ways = merged, components(pair, CONFIG, (1.0, 1.0, 1.0)), split(merged, pair)
        for name, labels in zip(parted, ways, strict=True):
            a, b = (labels[tuple(np.rint(centre).astype(int))] for centre in centres)
            parted[name] += bool(a and b and a != b)
        oblong = blurred_balls([(SIDE / 2 - axis / 4, one), (SIDE / 2 + axis / 4, one)], random)
        single = components(oblong, low, (1.0, 1.0, 1.0))
        cut += int(split(single, oblong).max() > single.max())
    print(f"pairs parted, of 50: {parted}; single nodules cut, of 50: {cut}")
    assert parted["by the low threshold"] <= 2
    assert parted["by summits"] >= 40 > parted["by the final threshold"]
    assert cut <= 1


def test_the_parts_of_a_component_cover_it_and_no_other() -> None:
    probability = np.zeros((3, 3, 9), np.float32)
    probability[1, 1] = [0.9, 0.8, 0.3, 0.2, 0.7, 0.8, 0, 0.6, 0.6]
    labels = np.array(np.zeros(probability.shape), np.int32)
    labels[1, 1] = [1, 1, 1, 1, 1, 1, 0, 2, 2]
    parts = split(labels, probability)[1, 1].tolist()
    assert parts[:3] in ([1, 1, 1], [3, 3, 3])
    assert parts[4:] == [4 - parts[0], 4 - parts[0], 0, 2, 2]
    assert parts[3] in (1, 3)  # the bottom of the valley may go to either side
    assert (split(labels, probability, saddle_depth=0.65) == labels).all()  # 0.8 is 0.6 above 0.2
    assert labels[1, 1, 4] == 1  # the argument is left as it was


def test_what_is_too_large_for_a_nodule_sheds_its_rim_but_never_vanishes() -> None:
    """A vessel of 80 mm that joins two nodules, one of them faint, a plain of 70 mm, and a nodule alone."""
    probability = np.zeros((12, 20, 90), np.float32)
    probability[2:4, 2:4, 5:85] = 0.15
    probability[1:5, 1:5, 10:14], probability[1:5, 1:5, 70:74] = 0.9, 0.35
    probability[8:10, 8:12, 10:80] = 0.3
    probability[1:5, 14:18, 20:24] = 0.15
    labels, found = find_candidates(probability, grid(probability.shape), SegmentConfig())
    assert sorted((round(one.max, 2), one.volume_mm3) for one in found) == [
        (0.15, 64),
        (0.3, 2 * 4 * 70),
        (0.35, 64),
        (0.9, 64),
    ]
    assert sorted(np.unique(labels)) == [0, 1, 2, 3, 4]
    half = find_candidates(probability, grid(probability.shape, (0.5, 0.5, 0.5)), CONFIG)[1]
    # 40 mm are not too large, and so nothing is shed.
    assert sum(one.volume_mm3 for one in half) == np.count_nonzero(probability) / 8


def test_a_candidate_says_where_it_is_and_how_sure() -> None:
    probability = np.zeros((4, 5, 6), np.float32)
    probability[1, 2, 3:5] = [0.25, 0.75]
    probability[3, 4, 0] = 0.1  # not above the threshold
    labels, [found] = find_candidates(probability, grid((4, 5, 6), (2.0, 0.5, 0.5)), CONFIG)
    assert np.argwhere(labels).tolist() == [[1, 2, 3], [1, 2, 4]]
    assert found.centre_lps_mm == pytest.approx((-100 + 3.75 * 0.5, 50 + 2 * 0.5, 7 + 1 * 2.0))
    assert (found.label, found.volume_mm3, found.max, found.mean) == (1, 1.0, 0.75, 0.5)
    assert found.p95 == pytest.approx(0.25 + 0.95 * 0.5)
    assert found.volume_weighted == pytest.approx(0.5 * 1 / (1 + math.pi / 6 * 27))
    assert [found.score(kind) for kind in ("max", "mean")] == [0.75, 0.5]


def test_candidates_leave_out_what_nodules_leave_out() -> None:
    probability, lungs = np.zeros((20, 20, 40), np.float32), np.zeros((20, 20, 40), np.uint8)
    probability[5:9, 5:9, 5:9] = probability[5:9, 5:9, 30:34] = 0.2
    probability[15, 15, 5] = 0.9
    lungs[:, :, :20] = 1
    config = SegmentConfig()
    assert len(find_candidates(probability, grid(probability.shape), config)[1]) == 2
    assert len(find_candidates(probability, grid(probability.shape), config, lungs)[1]) == 1
    labels, found = find_candidates(probability * 0, grid(probability.shape), config)
    assert (labels.max(), found) == (0, ())
