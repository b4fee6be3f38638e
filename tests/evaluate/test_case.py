"""The protocol's numbers on scans that can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.scored import hold_out, labelled, network, numbered, said
from helpers.voxelwise import count_voxel_by_voxel
from scipy import ndimage

from lungseg.config import SegmentConfig
from lungseg.dataset.cutting import to_grid
from lungseg.dataset.stored_scans import read_scan
from lungseg.errors import DataError
from lungseg.evaluate import metrics
from lungseg.evaluate.baseline import baseline_figures, threshold_baseline
from lungseg.evaluate.case import CaseResult, evaluate_case
from lungseg.evaluate.kept import kept_prediction
from lungseg.evaluate.summary import summarise
from lungseg.segment.predict import segment
from lungseg.storage import open_store

SHAPE = (40, 40, 120)
MM = (1.0, 1.0, 1.0)
CONFIG = SegmentConfig()


def box(x: int, side: int = 4) -> np.ndarray:
    """uint8, 1 in a cube of `side` voxels that starts at column `x` of row and slice 10."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[10 : 10 + side, 10 : 10 + side, x : x + side] = 1
    return mask


EMPTY = np.zeros(SHAPE, np.uint8)


def score(
    probability: np.ndarray,
    mask: np.ndarray,
    ignore: np.ndarray = EMPTY,
    spacing_mm: tuple[float, float, float] = MM,
    lungs: np.ndarray | None = None,
) -> CaseResult:
    stored = to_grid(labelled(numbered(mask, ignore), spacing_mm), spacing_mm)
    return evaluate_case(stored, said(probability, stored, lungs), CONFIG, case_id="a")


def test_the_truth_scores_full_marks() -> None:
    truth = box(10) + box(90, side=8)
    result = score(truth, truth)
    assert (result.dice, result.soft_dice, result.mean_iou, result.accuracy, result.loss) == (1, 1, 1, 1, 0)
    assert (result.per_nodule_dice, result.crop_dice) == (1, 1)
    assert (result.nodules, result.detected, result.components, result.false_positives) == (2, 2, 2, 0)
    assert result.cross_entropy < 1e-6


def test_a_missed_nodule_and_a_false_positive_are_counted() -> None:
    """Two nodules of 64 voxels; one is hit by half, the other missed, and a third place is marked."""
    hit = box(10)
    hit[:, :, 12:] = 0
    result = score(hit + box(50), box(10) + box(100))
    assert (result.nodules, result.detected, result.components, result.false_positives) == (2, 1, 2, 1)
    assert result.dice == pytest.approx(2 * 32 / (96 + 128))
    assert result.per_nodule_dice == pytest.approx((2 * 32 / (32 + 64) + 0) / 2)
    assert result.accuracy == pytest.approx(1 - (32 + 64 + 64) / np.prod(SHAPE))
    # Cubes of 64 mm: the first reaches to x = 44 and leaves out the false positive at 50, the second
    # begins at x = 70 and holds nothing but the miss.
    assert result.crop_dice == pytest.approx((2 / 3 + 0) / 2)


def test_the_nodule_crop_is_64_mm_wide_on_any_spacing() -> None:
    truth, inside, outside = box(50), box(77), box(85)
    for spacing_mm, expected in (((1.0, 1.0, 1.0), (2 / 3, 1.0)), ((1.0, 1.0, 0.5), (2 / 3, 2 / 3))):
        for far, dice in zip((inside, outside), expected, strict=True):
            result = score(truth + far, truth, spacing_mm=spacing_mm)
            assert result.crop_dice == pytest.approx(dice)


def test_ignore_regions_are_neither_target_nor_false_positive() -> None:
    truth, ignored = box(10), box(60)
    result = score(truth + ignored, truth, ignored)
    assert (result.dice, result.soft_dice, result.accuracy, result.false_positives) == (1, 1, 1, 0)
    assert result.components == 2
    both = score(EMPTY, truth + ignored, ignored)
    assert (both.nodules, both.crop_dice) == (1, 0)
    assert score(truth + box(62), truth, ignored).false_positives == 0  # it touches the region


def test_a_scan_without_nodules_rewards_only_silence() -> None:
    silent, loud = score(EMPTY, EMPTY), score(box(10), EMPTY)
    assert (silent.dice, silent.soft_dice, silent.mean_iou) == (1, 1, 1)
    assert (loud.dice, loud.soft_dice, loud.false_positives) == (0, 0, 1)
    assert silent.per_nodule_dice is silent.crop_dice is loud.per_nodule_dice is None


def test_small_components_leave_the_mask_but_not_the_soft_dice() -> None:
    speck = box(60, side=2)  # 8 mm3 < 14 mm3
    result = score(box(10) + speck, box(10))
    assert (result.dice, result.components) == (1, 1)
    assert result.soft_dice == pytest.approx(128 / (128 + 8))
    assert result.loss == pytest.approx(8 / (128 + 8))


def test_lungs_are_used_as_in_prediction() -> None:
    truth, lungs = box(10), np.zeros(SHAPE, np.uint8)
    lungs[:, :, :40] = 1
    probability = (truth + box(80)).astype(np.float32)
    assert score(probability, truth, lungs=lungs).false_positives == 0
    assert score(probability, truth).false_positives == 1


def test_whole_scan_figures_are_those_counted_voxel_by_voxel() -> None:
    random = np.random.default_rng(0)
    mask, ignore, probability = random.random((3, 12, 14, 16))
    mask, ignore = (mask > 0.8).astype(np.uint8), (ignore > 0.9).astype(np.uint8)
    probability = probability.astype(np.float16)
    stored = to_grid(labelled(numbered(mask, ignore), MM), MM)
    found = evaluate_case(stored, said(probability, stored), SegmentConfig(min_volume_mm3=0))
    expected = count_voxel_by_voxel(mask, probability, probability > 0.5, ignore)
    for name in ("dice", "mean_iou", "accuracy", "soft_dice", "cross_entropy"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-5)


def test_mean_iou_and_cross_entropy_give_the_examples_of_keras_documentation() -> None:
    def of(truth: list[int], probability: list[float]) -> CaseResult:
        stored = to_grid(labelled(numbered(np.array([[truth]])), MM), MM)
        prediction = said(np.array([[probability]]), stored)
        return evaluate_case(stored, prediction, SegmentConfig(min_volume_mm3=0))

    assert of([0, 0, 1, 1], [0, 1, 0, 1]).mean_iou == pytest.approx(0.33333334)
    said_by_keras = [0.2689414, 0.9975274, 0.93086158, 0.047425873]
    expected = -np.mean(np.log([1 - 0.2689414, 0.9975274, 1 - 0.93086158, 1 - 0.047425873]))
    assert of([0, 1, 0, 0], said_by_keras).cross_entropy == pytest.approx(expected, rel=1e-3)  # of float16


def test_a_second_piece_of_a_nodule_is_a_false_positive_one_to_one() -> None:
    """Columns 10, 11 and 13 of four: the larger piece stands for the nodule."""
    broken = box(10)
    broken[:, :, 12] = 0
    result = evaluate_case(
        (stored := to_grid(labelled(numbered(box(10)), MM), MM)),
        said(broken, stored),
        SegmentConfig(min_volume_mm3=0),
    )
    assert (result.components, result.false_positives, result.per_nodule_dice) == (2, 0, 2 * 48 / (48 + 64))
    assert result.matching_any.dice_errors_as_0 == pytest.approx((2 * 32 / (32 + 64), 2))
    assert summarise([result])["dice_errors_as_0"] == pytest.approx(1 / 3)


def test_the_summary_averages_scans_over_scans_and_nodules_over_nodules() -> None:
    one = score(box(10), box(10))
    two = score(box(10) + box(30), box(10) + box(30) + box(110))
    none = score(box(10), EMPTY)
    summary = summarise([one, two, none])
    assert summary["cases"] == 3
    assert summary["dice"] == pytest.approx((1 + 0.8 + 0) / 3)
    assert summary["loss"] == pytest.approx((0 + 0.2 + 1) / 3)
    assert summary["per_nodule_dice"] == pytest.approx(3 / 4)
    assert summary["crop_dice"] == pytest.approx(3 / 4)
    assert (summary["nodules"], summary["detected"], summary["sensitivity"]) == (4, 3, 0.75)
    assert summary["false_positives_per_scan"] == pytest.approx(1 / 3)
    assert summarise([none])["sensitivity"] is None
    with pytest.raises(DataError, match="split-empty"):
        summarise([])


def test_the_baseline_marks_what_is_dense_within_the_lungs() -> None:
    volume_hu = np.array([[[-900, -400, -399, 50, 50]]], np.int16)
    lungs = np.array([[[1, 1, 1, 1, 0]]], np.uint8)
    baseline = threshold_baseline(volume_hu, lungs)
    assert baseline.dtype == np.float32
    np.testing.assert_array_equal(baseline, [[[0, 0, 1, 1, 0]]])


def test_the_baseline_is_scored_like_a_model() -> None:
    """A dense ball of two: half of what is dense is a nodule."""
    scan = labelled(numbered(box(10)), MM, 0.7 * (box(10) + box(50)))
    stored = to_grid(scan, MM)
    found = baseline_figures(stored, said(EMPTY, stored), CONFIG)
    assert found == {"dice": [pytest.approx(2 / 3)], "per_nodule_dice": [1.0], "crop_dice": [1.0]}


def test_masks_are_those_of_predict_on_the_scans_own_grid(tmp_path: Path) -> None:
    """From thick slices and fine pixels to 1 mm and back, the kept probabilities rounded to float16."""
    spacing_mm = (2.5, 0.7, 0.8)
    random = np.random.default_rng(3)
    smooth = ndimage.gaussian_filter(random.random((24, 50, 60)), (1.5, 5, 5))
    probability = np.clip((smooth - smooth.mean()) / smooth.std() / 4 + 0.35, 0, 1)
    scan = labelled(numbered(probability > 0.55), spacing_mm, probability)
    manifest, model = hold_out(open_store(tmp_path), [scan], MM)
    (entry,) = manifest.held_out["test"]
    prediction = kept_prediction(open_store(tmp_path), entry, model, "test", network)
    wanted = segment(network, scan.volume, model.recipe).labels > 0
    found, box = prediction.own_labels(prediction.components(CONFIG), scan.volume.geometry, CONFIG.threshold)
    assert 2000 < wanted.sum() < 30_000
    assert np.count_nonzero((found > 0) != wanted) <= 0.001 * wanted.sum()
    assert (found[box] > 0).sum() == (found > 0).sum()
    stored = read_scan(open_store(tmp_path), entry)
    result = evaluate_case(stored, prediction, CONFIG)
    assert result.dice == metrics.dice(scan.mask, found > 0)
    assert result.working_grid_dice == metrics.dice(
        stored.mask == 1, prediction.components(CONFIG), stored.mask == 255
    )
    assert result.dice != result.working_grid_dice


def test_a_nodule_near_where_the_lungs_end_is_at_the_pleura() -> None:
    """One reaches out of the lungs, one lies 6 mm within them."""
    truth, lungs = box(10) + box(60), np.zeros(SHAPE, np.uint8)
    lungs[4:24, 4:30, 12:100] = 1
    assert [row.pleural for row in score(EMPTY, truth, lungs=lungs).rows] == [True, False]
    assert [row.pleural for row in score(EMPTY, truth).rows] == [None, None]
