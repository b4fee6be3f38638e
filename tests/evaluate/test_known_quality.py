"""A model whose errors are known, through every family: the figures are those computed by hand.

One scan of 1 mm voxels holds four cubes of 6 voxels a side. The model shifts the first by one voxel, erodes
the second by one all around, finds the third twice over (two halves, apart), misses the fourth, and plants
two false positives and one mark on an ignored region.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from lungseg.config import SegmentConfig
from lungseg.evaluate.bootstrap import interval, ratio, resample
from lungseg.evaluate.calibration import reliability
from lungseg.evaluate.froc import MISSED, Hits, froc, luna16_hits, overlap_hits
from lungseg.evaluate.matching import match, overlap
from lungseg.evaluate.surfaces import surface_distances
from lungseg.scan.volume import Geometry
from lungseg.segment.candidates import find_candidates

SHAPE = (30, 40, 90)
GRID = Geometry(SHAPE, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
IGNORED_X, PLANTED_X = 70, (55, 80)
CUBES_X = (2, 14, 26, 40)


def cube(x: int, side: int = 6, low: int = 10) -> tuple[slice, ...]:
    return slice(low, low + side), slice(low, low + side), slice(x, x + side)


@pytest.fixture(scope="module")
def scan() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodule numbers, ignored voxels, and the model's probability."""
    numbers, ignore = np.zeros(SHAPE, np.int16), np.zeros(SHAPE, np.uint8)
    for number, x in enumerate(CUBES_X, start=1):
        numbers[cube(x)] = number
    ignore[cube(IGNORED_X)] = 1
    probability = np.zeros(SHAPE, np.float32)
    probability[cube(CUBES_X[0] + 1)] = 0.875
    probability[ndimage.binary_erosion(numbers == 2, np.ones((3, 3, 3)))] = 0.75
    probability[cube(CUBES_X[2])] = 0.625
    probability[12:14, :, CUBES_X[2] : CUBES_X[2] + 6] = 0  # a gap: slices 10, 11 and 14, 15 are left
    probability[14:16, :, CUBES_X[2] : CUBES_X[2] + 6] *= 0.8  # 0.5
    for x, p in zip(PLANTED_X, (0.9375, 0.25), strict=True):
        probability[cube(x, side=3)] = p
    probability[cube(IGNORED_X)] = 0.96875
    return numbers, ignore, probability


def test_detection(scan: tuple[np.ndarray, ...]) -> None:
    numbers, ignore, probability = scan
    labels, found = find_candidates(probability, GRID, SegmentConfig())
    scores = np.array([one.score("max") for one in found])
    assert sorted(scores) == pytest.approx([0.25, 0.5, 0.625, 0.75, 0.875, 0.9375, 0.96875])
    centres_mm = np.array([(x + 2.5, 12.5, 12.5) for x in (*CUBES_X, IGNORED_X)])
    marks_mm = np.array([one.centre_lps_mm for one in found])
    args = marks_mm, scores, centres_mm[:4], np.full(4, 6.0), centres_mm[4:], np.full(1, 6.0)
    luna = luna16_hits(*args)
    assert luna.nodule_scores.tolist() == pytest.approx([0.875, 0.75, 0.625, MISSED])
    assert sorted(luna.false_positive_scores) == pytest.approx([0.25, 0.9375])  # the other half is neither
    # One false positive before the first hit, then three hits, then another: the line rises from (0, 0).
    assert froc([luna]).at() == pytest.approx([0, 0, 0, 0.75, 0.75, 0.75, 0.75])
    assert froc([luna]).cpm == pytest.approx(3 / 7)
    assert froc([luna]).threshold_at(1) == pytest.approx(0.625)
    table = overlap(numbers, labels, ignore)
    by_label = scores[table.components - 1]
    overlapping = overlap_hits(table.iou.T, by_label, table.ignored(0.1))
    assert overlapping.nodule_scores.tolist() == pytest.approx([0.875, 0.75, 0.625, MISSED])
    assert sorted(overlapping.false_positive_scores) == pytest.approx([0.25, 0.5, 0.9375])
    brier = (0.125**2 + 0.25**2 + 0.375**2 + 0.9375**2 + 0.25**2) / 5
    assert reliability([luna]).brier == pytest.approx(brier)


def test_overlap_and_surfaces(scan: tuple[np.ndarray, ...]) -> None:
    numbers, ignore, probability = scan
    components, count = ndimage.label(probability >= 0.5)
    assert count == 6
    table = overlap(numbers, components, ignore)
    iou = [5 / 7, 64 / 216, 72 / 216]
    dice = [10 / 12, 128 / 280, 144 / 288]
    loose = match(table, 0.1)
    assert dict(zip([nodule for nodule, _ in loose.pairs], loose.iou, strict=True)) == pytest.approx(
        dict(zip((1, 2, 3), iou, strict=True))
    )
    assert (loose.missed, len(loose.false_positives)) == ((4,), 2)
    assert loose.f1 == (3, 3 + 0.5 + 1)
    assert loose.sq == pytest.approx((sum(iou), 3))
    assert loose.pq == pytest.approx((sum(iou), 4.5))
    assert loose.dice_errors_as_0 == pytest.approx((sum(dice), 6))
    strict = match(table, 0.5)
    assert (len(strict.pairs), len(strict.missed), len(strict.false_positives)) == (1, 3, 4)
    assert strict.pq == pytest.approx((iou[0], 1 + 1.5 + 2))

    shifted, eroded, _ = (
        surface_distances(numbers == nodule, components == component, GRID.spacing_mm)
        for nodule, component in sorted(loose.pairs)
    )
    assert (shifted.hausdorff_mm(100), shifted.dice(1)) == (1, 1)
    # Faces of an eroded cube are 1 mm in; its corners alone are further away, by the diagonal.
    assert eroded.hausdorff_mm(100) == pytest.approx(math.sqrt(3))
    assert (eroded.dice(0.99), eroded.dice(2)) == (0, 1)


def test_intervals() -> None:
    """Two patients, one with 1 of 2 nodules found and one with 2 of 2: draws give 1/2, 3/4 or 1."""
    scans = [Hits(np.array([0.5, MISSED]), np.empty(0)), Hits(np.array([0.5, 0.25]), np.empty(0))]
    found = [float((scan.nodule_scores > MISSED).sum()) for scan in scans]
    sensitivity = interval(ratio(found, [2, 2]), ["a", "b"], resample(["a", "b"]))
    assert (sensitivity.value, sensitivity.low, sensitivity.high) == (0.75, 0.5, 1)
    assert sensitivity.means_little
