"""The protocol's numbers on scans that can be counted by hand, and their report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lungseg.config import SegmentConfig
from lungseg.dataset.case import Nodule
from lungseg.errors import DataError, GeometryError
from lungseg.evaluate.case import CaseResult, evaluate_case
from lungseg.evaluate.protocol import summarise, threshold_baseline
from lungseg.evaluate.report import READER_CEILING, reader_ceiling, write_report

SHAPE = (40, 40, 120)
MM = (1.0, 1.0, 1.0)
CONFIG = SegmentConfig()
CEILING = reader_ceiling([Nodule("n", (0.0, 0.0, 0.0), 8.0, 3)])


def box(x: int, side: int = 4) -> np.ndarray:
    """uint8, 1 in a cube of `side` voxels that starts at column `x` of row and slice 10."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[10 : 10 + side, 10 : 10 + side, x : x + side] = 1
    return mask


EMPTY = np.zeros(SHAPE, np.uint8)


def score(probability: np.ndarray, mask: np.ndarray, ignore: np.ndarray = EMPTY) -> CaseResult:
    return evaluate_case(probability.astype(np.float32), mask, ignore, MM, CONFIG, case_id="a")


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
            result = evaluate_case((truth + far).astype(np.float32), truth, EMPTY, spacing_mm, CONFIG)
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
    assert evaluate_case(probability, truth, EMPTY, MM, CONFIG, lungs=lungs).false_positives == 0
    assert evaluate_case(probability, truth, EMPTY, MM, CONFIG).false_positives == 1


def test_grids_that_differ_are_refused() -> None:
    with pytest.raises(GeometryError, match="shape-mismatch"):
        evaluate_case(np.zeros((4, 4, 4), np.float32), EMPTY, EMPTY, MM, CONFIG)


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


def test_the_report_holds_every_number_under_its_name(tmp_path: Path) -> None:
    results = [score(box(10), box(10)), replace(score(EMPTY, EMPTY), case_id="a-longer-name")]
    extra = {"baseline": {"dice": 0.0123}, "broken": float("nan")}

    text, machine = write_report(
        results, summarise(results), tmp_path / "new", "run-1", "test", CEILING, extra
    )

    assert re.fullmatch(r"evaluation-\d{8}T\d{6}Z\.txt", text.name)
    assert machine.name == text.name.replace(".txt", ".json")
    assert sorted(tmp_path.rglob("*.*")) == sorted([text, machine])

    said = json.loads(machine.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert (said["run"], said["split"], said["summary"]["dice"]) == ("run-1", "test", 1.0)
    assert [case["case_id"] for case in said["cases"]] == ["a", "a-longer-name"]
    assert said["cases"][1]["crop_dice"] is None
    assert said["extra"] == {"baseline": {"dice": 0.0123}, "broken": None}
    assert said["reader_ceiling"] == {"reader_to_reader_dice": 0.75, "reader_to_consensus_dice": 0.86}

    lines = text.read_text().splitlines()
    for name in ("loss", "accuracy", "mean IoU", "Dice (full scan", "nodule-crop Dice", "per-nodule Dice"):
        assert sum(line.startswith(name) for line in lines) == 1
    assert any("0.75" in line and "0.86" in line for line in lines)
    header, *rows = lines[-3:]
    assert header.split()[0] == "case"
    assert len({len(line) for line in (header, *rows)}) == 1  # columns are aligned
    assert [row.split()[4] for row in rows] == ["1.0000", "1.0000"]
    assert header.split()[4] == "dice"


def test_the_readers_of_lidc_are_no_ceiling_of_data_that_has_none(tmp_path: Path) -> None:
    of_lidc, of_pairs = (Nodule("n", (0.0, 0.0, 0.0), 8.0, readers) for readers in (3, 0))
    assert reader_ceiling([of_pairs, of_lidc]) == READER_CEILING
    assert reader_ceiling([of_pairs]) is reader_ceiling([]) is None
    results = [score(box(10), box(10))]
    text, machine = write_report(results, summarise(results), tmp_path, "r", "test", None, {})
    assert json.loads(machine.read_text())["reader_ceiling"] is None
    assert "LIDC" not in text.read_text()


def test_a_report_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = [score(EMPTY, EMPTY)]
    with pytest.raises(DataError, match="output-unwritable"):
        write_report(results, summarise(results), tmp_path / "file", "r", "test", None, {})
