"""The nodules that a model outlines worst, as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lungseg.config import SegmentConfig
from lungseg.dataset.stored_scans import StoredScan
from lungseg.evaluate.case import CaseResult
from lungseg.evaluate.kept import Prediction
from lungseg.evaluate.nodule import NoduleScore
from lungseg.evaluate.scans import AT_ONCE
from lungseg.scan.resample import resample_onto
from lungseg.show.page import outlines, png

WORST = 10
SIDE_MM = 50.0
Look = Callable[[str], tuple[StoredScan, Prediction]]
"""The scan of a case id, and what the network says of it."""


def worst_nodules(results: Sequence[CaseResult], config: SegmentConfig, look: Look) -> list[dict[str, Any]]:
    """A picture each of those of lowest Dice, of equal ones the largest first."""
    every = [(row, case.case_id) for case in results for row in case.rows]
    every.sort(key=lambda one: (one[0].outline.dice, -one[0].diameter_mm))
    worst = every[:WORST]

    def draw(case_id: str) -> list[dict[str, Any]]:
        stored, prediction = look(case_id)
        sure = _sure(prediction, config)
        rows = [row for row, its_case in worst if its_case == case_id]
        return [_picture(row, case_id, stored, prediction, sure, config.threshold) for row in rows]

    cases = list(dict.fromkeys(case_id for _, case_id in worst))
    with ThreadPoolExecutor(AT_ONCE) as threads:
        drawn = {case_id: iter(those) for case_id, those in zip(cases, threads.map(draw, cases), strict=True)}
    return [next(drawn[case_id]) for _, case_id in worst]


def _sure(prediction: Prediction, config: SegmentConfig) -> np.ndarray:
    """float32 [z, y, x]: the probability in components that stay, elsewhere the threshold at most. Linear is
    near enough for a picture: a mask as `predict` brings it onto the scan's grid takes seconds."""
    below = np.minimum(prediction.float32, np.float32(config.threshold))
    return np.where(prediction.components(config) > 0, prediction.float32, below)


def _picture(
    row: NoduleScore,
    case_id: str,
    stored: StoredScan,
    prediction: Prediction,
    sure: np.ndarray,
    threshold: float,
) -> dict[str, Any]:
    """The slice of the scan's own grid with most of the nodule, as `card.picture`; the image is what the
    network saw."""
    truth = stored.truth
    inside = truth.numbers == row.number
    z = int(inside.sum(axis=(1, 2)).argmax())
    middle = np.argwhere(inside[z]).mean(axis=0)
    spacing_mm = truth.geometry.spacing_mm
    sides = [
        slice(max(0, int(at - SIDE_MM / 2 / mm)), int(at + SIDE_MM / 2 / mm) + 1)
        for at, mm in zip(middle, spacing_mm[1:], strict=True)
    ]
    box = (slice(z, z + 1), *sides)
    numbers = truth.numbers[box][0]
    height, width = numbers.shape
    box = (slice(z, z + 1), *(slice(s.start, s.start + n) for s, n in zip(sides, numbers.shape, strict=True)))
    part = truth.geometry.part(box)
    image = resample_onto(stored.volume.volume_hu, stored.volume.geometry, part)[0]
    found = resample_onto(sure, prediction.geometry, part)[0] > np.float32(threshold)
    return {
        "case_id": case_id,
        "nodule_id": row.nodule.nodule_id,
        "diameter_mm": row.diameter_mm,
        "dice": row.outline.dice,
        "width_mm": round(width * spacing_mm[2], 3),
        "height_mm": round(height * spacing_mm[1], 3),
        "png": png(image),
        "truth": outlines(numbers > 0, spacing_mm),
        "predicted": outlines(found, spacing_mm),
        "ignore": outlines(numbers < 0, spacing_mm),
    }
