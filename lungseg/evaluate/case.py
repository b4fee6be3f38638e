"""The numbers of one scan; each is named for what it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
from scipy import ndimage

from lungseg.config import SegmentConfig
from lungseg.evaluate import metrics
from lungseg.segment.postprocess import components

CROP_MM = 64.0


@dataclass(frozen=True)
class CaseResult:
    """One scan. None where a number has no meaning: nodule numbers of a scan without nodules.

    `dice`, `mean_iou` and `accuracy` compare the whole scan's final mask (thresholded, small components
    gone); `soft_dice`, `loss` (1 - soft_dice) and `cross_entropy` compare the probabilities.
    `per_nodule_dice` is the mean over nodules of the Dice with the components that touch each, misses as 0.
    `crop_dice` is the mean over nodules of the Dice in a cube of 64 mm around each.
    `false_positives` are components that touch neither nodule nor ignore region.
    """

    case_id: str
    loss: float
    accuracy: float
    mean_iou: float
    dice: float
    soft_dice: float
    cross_entropy: float
    nodules: int
    detected: int
    per_nodule_dice: float | None
    crop_dice: float | None
    components: int
    false_positives: int


def evaluate_case(
    probability: np.ndarray,
    mask: np.ndarray,
    ignore: np.ndarray,
    spacing_mm: tuple[float, float, float],
    config: SegmentConfig,
    *,
    lungs: np.ndarray | None = None,
    case_id: str = "",
) -> CaseResult:
    """Score one scan. All arrays are [z, y, x] on one grid of `spacing_mm` (z, y, x).

    The probability becomes a mask as `lungseg predict` makes it, with the same `lungs`. A nodule of the
    reference is a 26-connected component of `mask` outside `ignore`, detected if a component touches it.
    Raises GeometryError("shape-mismatch").
    """
    labels = components(probability, config, spacing_mm, lungs)
    predicted = labels > 0
    soft_dice = metrics.soft_dice(mask, probability, ignore)
    nodule_labels = cc3d.connected_components((mask != 0) & (ignore == 0), connectivity=26).astype(np.int32)
    nodule_dices = metrics.per_nodule_dice(nodule_labels, labels, ignore)
    true_or_ignored = np.unique(labels[(mask != 0) | (ignore != 0)])
    found = int(labels.max(initial=0))
    return CaseResult(
        case_id=case_id,
        loss=1 - soft_dice,
        accuracy=metrics.accuracy(mask, predicted, ignore),
        mean_iou=metrics.mean_iou(mask, predicted, ignore),
        dice=metrics.dice(mask, predicted, ignore),
        soft_dice=soft_dice,
        cross_entropy=metrics.binary_cross_entropy(mask, probability, ignore),
        nodules=len(nodule_dices),
        detected=sum(score > 0 for score in nodule_dices),
        per_nodule_dice=mean_or_none(nodule_dices),
        crop_dice=mean_or_none(_crop_dices(nodule_labels, predicted, mask, ignore, spacing_mm)),
        components=found,
        false_positives=found - int(np.count_nonzero(true_or_ignored)),
    )


def _crop_dices(
    nodule_labels: np.ndarray,
    predicted: np.ndarray,
    mask: np.ndarray,
    ignore: np.ndarray,
    spacing_mm: tuple[float, float, float],
) -> list[float]:
    """Dice in a cube of CROP_MM about the middle of each nodule's box, clipped at the scan's border."""
    scores = []
    for box in ndimage.find_objects(nodule_labels):
        middles = [(side.start + side.stop) / 2 for side in box]
        halves = [CROP_MM / 2 / spacing for spacing in spacing_mm]
        cube = tuple(
            slice(max(0, round(middle - half)), round(middle + half))
            for middle, half in zip(middles, halves, strict=True)
        )
        scores.append(metrics.dice(mask[cube], predicted[cube], ignore[cube]))
    return scores


def mean_or_none(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
