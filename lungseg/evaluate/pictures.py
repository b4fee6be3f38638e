"""The nodules that a model outlines worst, as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lungseg.config import SegmentConfig
from lungseg.dataset.stored_scans import StoredScan
from lungseg.evaluate.case import CaseResult
from lungseg.evaluate.kept import Prediction
from lungseg.evaluate.nodule import NoduleScore
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
    return [_picture(row, case_id, config, *look(case_id)) for row, case_id in every[:WORST]]


def _picture(
    row: NoduleScore, case_id: str, config: SegmentConfig, stored: StoredScan, prediction: Prediction
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
    # Linear is near enough for a picture: a mask as `predict` brings it onto the scan's grid takes seconds.
    probability = prediction.float32
    below = np.minimum(probability, np.float32(config.threshold))
    inside_only = np.where(prediction.components(config) > 0, probability, below)
    found = resample_onto(inside_only, prediction.geometry, part)[0] > np.float32(config.threshold)
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
